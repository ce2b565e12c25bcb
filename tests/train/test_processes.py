"""Several processes that are one run, on loopback: equal to one process, killed, resumed."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrl import checkpoint
from tests.train.same_runs import assert_same, rows_of
from train import _processes

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--eval-episodes", "4", "--eval-every-episodes", "2", "--no-animate", "--no-progress"),
]
SETTINGS = {
    "q_learning": ["--env", "MarsRover-v0", "--total-steps", "24000"],
    "ppo": [
        *("--env", "CartPole-v1", "--num-envs", "4", "--num-steps", "32", "--total-steps", "7680"),
        *("--num-epochs", "1", "--hidden", "8"),
    ],
    "sac": [
        *("--env", "Pendulum-v1", "--num-envs", "4", "--num-steps", "8", "--total-steps", "1920"),
        *("--learning-starts", "100", "--batch-size", "16", "--buffer-size", "600"),
        *("--hidden", "8", "--normalize-obs"),
    ],
}
NUM_UPDATES = 60
EXACT = ("--lanes", "one-by-one")


def argv(agent, folder, num_seeds, *more):
    steps = int(SETTINGS[agent][SETTINGS[agent].index("--total-steps") + 1])
    place = ("--runs-dir", folder.parent, "--name", folder.name, "--num-seeds", num_seeds)
    every = ("--checkpoint-every", steps // 6)
    return [str(x) for x in (*SETTINGS[agent], *SMALL, *place, *every, *more)]


def start(agent, arguments, num_processes, cache):
    """Start the processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    command = [sys.executable, "-m", f"train.{agent}", *map(str, arguments)]
    command += ["--coordinator", coordinator, "--num-processes", str(num_processes)]
    command += ["--compilation-cache", str(cache)]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(i)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]


def finish(processes, code=0):
    """Wait for all; return what each has said."""
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def assert_same_to_the_end(a, b):
    """Two finished runs are the same, bit for bit, their last checkpoints included."""
    assert_same(a, b)
    step = int(rows_of(a / "metrics.csv")[-1]["env_steps"])
    leaves = checkpoint.verify(a / "checkpoints", step)["leaves"]
    assert leaves == checkpoint.verify(b / "checkpoints", step)["leaves"]
    names = [f"{i:05d}" for i, leaf in enumerate(leaves) if np.prod(leaf["shape"])]
    states = [checkpoint._read_arrays(f / "checkpoints" / str(step), names) for f in (a, b)]
    for name in names:
        np.testing.assert_array_equal(states[0][name], states[1][name], leaves[int(name)])


def wait_for_rows(processes, folder, num_rows):
    """Wait until so many rows of metrics are written."""
    path = folder / "metrics.csv"
    while not path.is_file() or path.read_bytes().count(b"\n") <= num_rows:
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs."""
    return tmp_path_factory.mktemp("cache")


def one_process(agent, folder, num_seeds):
    """The run in one process, this one, on one device."""
    script = importlib.import_module(f"train.{agent}")
    assert script.main(argv(agent, folder, num_seeds, *EXACT)) == 0


@pytest.mark.slow  # three processes, each of which imports for eight seconds
@pytest.mark.timeout(600)
def test_two_processes_are_the_run_of_one_bit_for_bit(tmp_path, cache):
    processes = start("q_learning", argv("q_learning", tmp_path / "two", 2), 2, cache)
    one_process("q_learning", tmp_path / "one", 2)
    (out, _), (nothing, _) = finish(processes)
    assert_same_to_the_end(tmp_path / "one", tmp_path / "two")
    assert "on 2 devices of 2 processes" in out
    assert "[Gloo]" in nothing or not nothing  # the first one alone reports
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_four_processes_and_a_killed_one_resumed_by_two_are_the_run_of_one(agent, tmp_path, cache):
    one_process(agent, tmp_path / "one", 4)
    arguments = argv(agent, tmp_path / "four", 4, *EXACT)
    finish(start(agent, arguments, 4, cache))
    assert_same_to_the_end(tmp_path / "one", tmp_path / "four")
    folder = tmp_path / "cut"
    processes = start(agent, argv(agent, folder, 4, *EXACT), 4, cache)
    wait_for_rows(processes, folder, 4 * 25)
    assert_ends(processes, folder, victim=2)
    finish(start(agent, ["--resume", folder, "--no-progress"], 2, cache))
    assert_same_to_the_end(tmp_path / "one", folder)


def assert_ends(processes, folder, victim):
    """Kill one: the others end within a minute with a sentence that says how to go on."""
    processes[victim].kill()
    killed = time.monotonic()
    for i, process in enumerate(processes):
        _, error = process.communicate(timeout=max(1.0, 60 - (time.monotonic() - killed)))
        if i == victim:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode in (1, -signal.SIGABRT), error
        sentences = [line for line in error.splitlines() if line.startswith("error: process")]
        assert len(sentences) == 1, error
        assert f"process {i} of {len(processes)}" in sentences[0]
        assert f"Start all processes again with --resume {folder}" in sentences[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_within_a_minute_and_the_run_goes_on(victim, tmp_path, cache):
    one_process("q_learning", tmp_path / "one", 2)
    folder = tmp_path / "cut"
    processes = start("q_learning", argv("q_learning", folder, 2), 2, cache)
    wait_for_rows(processes, folder, 2 * 20)
    assert_ends(processes, folder, victim)
    # by one process, which has no others
    script = importlib.import_module("train.q_learning")
    assert script.main(["--resume", str(folder), "--no-progress", *EXACT]) == 0
    assert_same_to_the_end(tmp_path / "one", folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_to_one_lets_all_save_and_exit(tmp_path, cache):
    one_process("ppo", tmp_path / "one", 2)
    folder = tmp_path / "cut"
    processes = start("ppo", argv("ppo", folder, 2), 2, cache)
    wait_for_rows(processes, folder, 2 * 5)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, code=143)
    rows = rows_of(folder / "metrics.csv")
    assert len(rows) < 2 * NUM_UPDATES
    assert max(checkpoint.steps(folder / "checkpoints")) == int(rows[-1]["env_steps"])
    finish(start("ppo", ["--resume", folder, "--no-progress"], 2, cache))
    assert_same_to_the_end(tmp_path / "one", folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_environments_over_two_processes_learn_the_same(tmp_path, cache):
    """Gradients are summed over processes: equal to rounding after ten updates."""
    ten = ("--total-steps", "1280")
    arguments = [*argv("ppo", tmp_path / "two", 1, "--env-devices", 2), *ten]
    processes = start("ppo", arguments, 2, cache)
    script = importlib.import_module("train.ppo")
    assert script.main([*argv("ppo", tmp_path / "one", 1), *ten]) == 0
    finish(processes)
    rows = [rows_of(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    assert len(rows[0]) == 10
    values = [[float(x) for x in some[-1].values() if x] for some in rows]
    np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_first_process_refuses_all_refuse(tmp_path, cache):
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    said = finish(start("q_learning", argv("q_learning", folder, 2), 2, cache), code=2)
    for _, error in said:
        (line,) = [line for line in error.splitlines() if "error" in line]
        assert line.startswith(f"error: {folder} exists and does not hold a run")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_waits_in_vain_says_so(tmp_path):
    script = "from train import _processes, q_learning; _processes.JOIN_S = 3; q_learning.main()"
    more = ["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "1"]
    command = [sys.executable, "-c", script, *argv("q_learning", tmp_path / "run", 2), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (2, -signal.SIGABRT)
    assert "error: coordinator = 127.0.0.1:1, process_id = 1: " in done.stderr
    assert "same coordinator" in done.stderr
    assert not (tmp_path / "run").exists()


# what is refused, and the last words --------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--num-processes", "2"], "num_processes = 2 needs coordinator and process_id as well"),
        (["--coordinator", "host", "--num-processes", "2", "--process-id", "0"], "HOST:PORT"),
        (["--coordinator", "h:1", "--num-processes", "1", "--process-id", "0"], "integer >= 2"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "process_id = 2"),
        (
            [
                *("--coordinator", "h:1", "--num-processes", "2", "--process-id", "0"),
                *("--distributed", "slurm"),
            ],
            "distributed = 'slurm' contradicts coordinator = 'h:1'",
        ),
    ],
)
def test_processes_that_cannot_be_meant_are_refused(more, said, tmp_path, capsys):
    script = importlib.import_module("train.q_learning")
    assert script.main([*argv("q_learning", tmp_path / "refused", 2), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("told", "said"), [("first\nlast\n", "last\n"), ("first\ndone\n", ""), ("", "")]
)
def test_the_watcher_speaks_only_of_an_end_without_words(told, said):
    command = [sys.executable, "-I", "-S", "-c", _processes.WATCHER]
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=True)
    assert done.stderr == said


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:6", True),
        ("Timed out while waiting for async_write_complete barrier.", True),
        ("the checkpoint of step 8 could not be written (No space left on device)", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
        ("num_seeds = 3 must be a multiple of seed_devices = 2", False),
    ],
)
def test_the_loss_of_a_process_is_told_from_other_errors(text, is_lost):
    assert bool(_processes.LOST.search(text)) == is_lost
