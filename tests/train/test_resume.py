"""A run that is killed and resumed is the run that was not, to the last bit."""

import contextlib
import csv
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrl
from jaxrl import checkpoint, sinks
from train import _folder

ROOT = Path(__file__).parents[2]
REAL = [
    *("--env", "Pendulum-v1", "--num-envs", "4", "--num-steps", "8", "--total-steps", "1920"),
    *("--learning-starts", "100", "--batch-size", "16", "--buffer-size", "600", "--hidden", "8"),
]
SETTINGS = {
    "ppo": [
        *("--env", "CartPole-v1", "--num-envs", "4", "--num-steps", "32", "--total-steps", "7680"),
        *("--num-epochs", "1", "--hidden", "8"),
    ],
    "dqn": [*("--env", "CartPole-v1"), *REAL[2:], "--prioritized"],
    "sac": [*REAL, "--normalize-obs"],
    "td3": REAL,
    "ddpg": [*REAL, "--noise", "ou"],
    "dsac": REAL,
    "q_learning": ["--env", "MarsRover-v0", "--total-steps", "24000"],
    "reinforce": [
        *("--env", "MarsRover-v0", "--num-envs", "4", "--num-steps", "16", "--hidden", "8"),
        *("--num-states", "16", "--max-rollout-steps", "20", "--total-steps", "3840"),
    ],
}
NUM_UPDATES = 60
NUM_SEEDS = 2


def argv(agent, runs, name="run", *more):
    steps = int(SETTINGS[agent][SETTINGS[agent].index("--total-steps") + 1])
    return [
        *SETTINGS[agent],
        *("--num-seeds", str(NUM_SEEDS), "--eval-episodes", "4", "--eval-every-episodes", "2"),
        *("--no-progress", "--no-animate", "--runs-dir", str(runs), "--name", name),
        *("--checkpoint-every", str(steps // 6), *more),
    ]


def train(agent, arguments):
    """Run the script in this process."""
    return importlib.import_module(f"train.{agent}").main([str(x) for x in arguments])


def start(agent, arguments):
    """Run the script in a process of its own, with this one's settings of JAX."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    command = [sys.executable, "-m", f"train.{agent}", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same_rows(a, b, name):
    """The file is the same, the times when its rows were written apart."""
    rows = [[{**row, "wall_s": ""} for row in rows_of(folder / name)] for folder in (a, b)]
    assert rows[0] == rows[1]
    assert rows[0]


def same_run(a, b):
    """Two finished runs are the same, bit for bit."""
    same_rows(a, b, "metrics.csv")
    same_rows(a, b, "evaluation_curve.csv")
    rows = rows_of(a / "metrics.csv")
    assert [(int(r["update"]), int(r["seed"])) for r in rows] == [
        (update, seed) for update in range(1, NUM_UPDATES + 1) for seed in range(NUM_SEEDS)
    ]
    for name in ("evaluation.csv", "policy.msgpack", "policies/seed_0.msgpack"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for folder in (a, b):
        assert max(checkpoint.steps(folder / "checkpoints")) == int(rows[-1]["env_steps"])
    same_states(a, b, int(rows[-1]["env_steps"]))


def same_states(a, b, step):
    """The whole states at a step are the same: replay, optimisers, environments, keys."""
    folders = [folder / "checkpoints" for folder in (a, b)]
    leaves = [checkpoint.verify(folder, step)["leaves"] for folder in folders]
    assert leaves[0] == leaves[1]
    names = [f"{i:05d}" for i, leaf in enumerate(leaves[0]) if np.prod(leaf["shape"])]
    states = [checkpoint._read_arrays(folder / str(step), names) for folder in folders]
    for name in names:
        np.testing.assert_array_equal(states[0][name], states[1][name], leaves[0][int(name)])


def kill_when(process, folder, num_rows, while_saving):
    """Kill a process once it has written so many rows of metrics; return whether it still ran."""
    began, path = time.time(), folder / "metrics.csv"
    while process.poll() is None:
        if path.is_file() and path.stat().st_mtime > began:
            saving = any(checkpoint.UNFINISHED in p.name for p in folder.glob("checkpoints/*"))
            if path.read_bytes().count(b"\n") > num_rows and (saving or not while_saving):
                process.kill()
                process.communicate()
                return True
        time.sleep(0.0005)
    return False


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("agent", SETTINGS)
def test_killed_three_times_the_run_ends_as_if_nothing_had_happened(agent, tmp_path, monkeypatch):
    # 24 kills over the agents; the moments are random, and the same in every test run
    random = np.random.default_rng([7, *agent.encode()])
    cache = ("--compilation-cache", tmp_path / "cache")
    whole = start(agent, argv(agent, tmp_path, "whole", *cache))
    out = whole.communicate()[0].decode()
    assert whole.returncode == 0, out
    folder = tmp_path / "cut"
    arguments = argv(agent, tmp_path, "cut", *cache)
    while_saving = random.permutation([False, True, False])
    for third in range(3):
        row = NUM_SEEDS * random.integers(18 * third + 1, 18 * (third + 1))
        process = start(agent, arguments)
        assert kill_when(process, folder, row, while_saving[third]), process.communicate()[0]
        assert process.returncode == -signal.SIGKILL
        arguments = ["--resume", folder, "--no-progress", *cache]
    last = start(agent, arguments)
    out = last.communicate()[0].decode()
    assert last.returncode == 0, out
    same_run(tmp_path / "whole", folder)
    summary = json.loads((folder / "summary.json").read_text())
    print(agent, [bool(x) for x in while_saving], summary["resumed_at"])
    assert not list(folder.glob(f"checkpoints/*{checkpoint.UNFINISHED}*"))


# in this process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs: every run here is the same program."""
    return ["--compilation-cache", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module", autouse=True)
def _cache_setting():
    """The script sets the cache for the process: the next test file has none."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nobody disturbed."""
    runs = tmp_path_factory.mktemp("whole")
    assert train("q_learning", argv("q_learning", runs, "run", *cache)) == 0
    return runs / "run"


def signal_at(update, number, monkeypatch):
    """Let the process get a signal when the rows of an update are written."""
    original = sinks.tensorboard_sink

    @contextlib.contextmanager
    def signalling(*args):
        with original(*args) as sink:

            def both(chunk):
                sink(chunk)
                if chunk.last_update == update and "td_error" in chunk.metrics:
                    os.kill(os.getpid(), number)

            yield both

    monkeypatch.setattr(sinks, "tensorboard_sink", signalling)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, cache):
    """A run that SIGTERM stopped while update 26 was running; copy it before touching it."""
    runs = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        signal_at(25, signal.SIGTERM, monkeypatch)
        before = signal.getsignal(signal.SIGTERM)
        assert train("q_learning", argv("q_learning", runs, "run", *cache)) == 143
        assert signal.getsignal(signal.SIGTERM) is before
    return runs / "run"


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def resume(folder, *more):
    return train("q_learning", ["--resume", folder, "--no-progress", *more])


def refused(folder, capsys, *more):
    """The one sentence that says why; nothing in the folder has changed."""
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    capsys.readouterr()
    assert resume(folder, *more) == 2
    assert before == {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_a_killed_run_ends_as_if_nothing_had_happened(whole, tmp_path, cache):
    folder = tmp_path / "cut"
    process = start("q_learning", argv("q_learning", tmp_path, "cut", *cache))
    assert kill_when(process, folder, NUM_SEEDS * 27, while_saving=False)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    assert resume(folder, *cache) == 0
    same_run(whole, folder)


def test_sigterm_saves_and_the_run_goes_on(whole, stopped, copy, cache, capsys):
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    last = max(checkpoint.steps(stopped / "checkpoints"))
    rows = rows_of(stopped / "metrics.csv")
    assert last == int(rows[-1]["env_steps"])  # the chunk that ran was finished and saved
    assert int(rows[-1]["update"]) in (26, 27)
    assert resume(copy, *cache) == 0
    assert f"from the checkpoint at {last:,} steps" in capsys.readouterr().out
    same_run(whole, copy)
    summary = json.loads((copy / "summary.json").read_text())
    assert (summary["status"], summary["resumed_at"]) == ("finished", [last])
    first, whole_summary = (json.loads((f / "summary.json").read_text()) for f in (stopped, whole))
    for name in ("env_steps", "flops", "eval_return_mean", "best_seed"):
        assert summary[name] == whole_summary[name]
    assert summary["run_s"] > first["run_s"]  # of both parts together
    assert summary["compile_s"] > first["compile_s"]
    walls = [float(r["wall_s"]) for r in rows_of(copy / "metrics.csv")]
    assert walls == sorted(walls)


def test_tensorboard_has_every_point_once(whole, stopped, copy, cache):
    assert resume(copy, *cache) == 0
    points = []
    for folder in (whole, copy):
        (path,) = (folder / "tensorboard" / "seed_1").iterdir()
        points.append(path.stat().st_size)
        assert path.read_bytes().count(b"td_error") == NUM_UPDATES
    assert points[0] == points[1]


def test_a_finished_run_says_so(whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert resume(whole) == 0
    assert "is finished: there is nothing to go on with" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*")}


def test_rows_after_the_checkpoint_are_cut_and_half_a_row_too(whole, copy, cache):
    shutil.rmtree(copy / "checkpoints" / str(max(checkpoint.steps(copy / "checkpoints"))))
    with (copy / "metrics.csv").open("a") as file:
        file.write("0,27,10800,1.")  # killed while it wrote
    assert resume(copy, *cache) == 0
    same_run(whole, copy)


def test_killed_before_the_first_checkpoint_it_begins_again(whole, copy, cache, capsys):
    shutil.rmtree(copy / "checkpoints")
    assert resume(copy, *cache) == 0
    assert "no checkpoint was written" in capsys.readouterr().out
    same_run(whole, copy)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(whole, copy, cache, capsys):
    *_, before, last = checkpoint.steps(copy / "checkpoints")
    files = [p for p in (copy / "checkpoints" / str(last)).rglob("*") if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    assert resume(copy, *cache) == 0
    out = capsys.readouterr().out
    assert f"note: damaged, the one before is used: {file}" in out
    assert f"from the checkpoint at {before:,} steps" in out
    same_run(whole, copy)
    assert (copy / "checkpoints" / f"{last}{checkpoint.DAMAGED}").is_dir()


def change_identity(folder, name, value):
    """Write into every checkpoint that it was made so, with checksums that fit."""
    for path in folder.glob("checkpoints/*/manifest.json"):
        content = json.loads(path.read_text())["content"]
        assert name in content["metadata"]["identity"]
        content["metadata"]["identity"][name] = value
        path.write_text(json.dumps({"content": content, "sha256": checkpoint._digest(content)}))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("config.gamma", 0.5, "config.gamma is 0.5 in the checkpoint and 0.9 here"),
        ("env", "FrozenLake-misc", "env is 'FrozenLake-misc' in the checkpoint and 'MarsRover-v0'"),
        ("env parameter .max_steps_in_episode", 7, "max_steps_in_episode is 7 in the checkpoint"),
        ("seeds", [3, 4], "seeds is [3, 4] in the checkpoint and [0, 1] here"),
        ("version of jax", "0.1.2", f"jax is '0.1.2' in the checkpoint and '{jax.__version__}'"),
        ("version of jaxrl", "9", f"jaxrl is '9' in the checkpoint and '{jaxrl.__version__}' here"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(name, value, words, copy, capsys):
    change_identity(copy, name, value)
    assert words in refused(copy, capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--gamma", "0.5"], "--gamma = 0.5 contradicts the run in"),
        (["--num-seeds", "3"], "--num-seeds = 3 contradicts the run in"),
        (["--env", "FrozenLake-misc"], "--env = 'FrozenLake-misc' contradicts the run in"),
        (["--eval-every", "7"], "--eval-every = 7 contradicts"),
        (["--env-kwargs", "length=9"], "--env-kwargs = {'length': 9} contradicts"),
        (["--name", "other"], "--name = 'other' contradicts"),
        (["--overwrite"], "--overwrite replaces a run and --resume goes on with it"),
        (["--keep-checkpoints", "0"], "keep_checkpoints = 0"),
    ],
)
def test_options_that_contradict_the_run_are_refused_by_name(more, words, copy, capsys):
    assert words in refused(copy, capsys, *more)


def test_options_that_repeat_the_run_are_taken(copy, cache):
    more = ["--gamma", "0.9", "--num-seeds", "2", "--name", "run", "--runs-dir", copy.parent]
    assert resume(copy, *more, "--checkpoint-every", "3000", "--keep-checkpoints", "3") == 0
    # 24000 is a multiple; the best may be one of the last
    assert len(checkpoint.steps(copy / "checkpoints")) in (3, 4)


def test_what_cannot_be_resumed_is_refused(copy, tmp_path, capsys):
    assert "does not hold a run" in refused(tmp_path / "nowhere", capsys)
    assert train("ppo", ["--resume", copy]) == 2
    assert "is a run of q_learning, not of ppo: use python -m" in capsys.readouterr().err
    with (copy / "metrics.csv").open("r+") as file:
        file.truncate(100)
    assert "rows are missing" in refused(copy, capsys)
    for path in copy.glob("checkpoints/*/manifest.json"):
        path.unlink()
    assert "no checkpoint in" in refused(copy, capsys)
    with _folder.lock(copy):
        assert "another process is writing the run" in refused(copy, capsys)
    written = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(written | {"checkpoint_every": None}))
    assert "was started without --checkpoint-every" in refused(copy, capsys)
    (copy / "config.json").write_text("{}")
    assert "is not that of a run of this version" in refused(copy, capsys)


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(
    whole, tmp_path, cache, monkeypatch, capsys
):
    finalize = checkpoint._Handler.finalize

    def full(self, directory):
        if self.content["step"] > 8000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        finalize(self, directory)

    monkeypatch.setattr(checkpoint._Handler, "finalize", full)
    assert train("q_learning", argv("q_learning", tmp_path, "full", *cache)) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint of step 12000 could not be written to" in out
    assert "(No space left on device); the earlier ones are kept" in out
    assert "when that is mended, go on with --resume" in out
    assert checkpoint.steps(tmp_path / "full" / "checkpoints") == [4000, 8000]
    monkeypatch.undo()
    assert resume(tmp_path / "full", *cache) == 0
    same_run(whole, tmp_path / "full")


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("q_learning", argv("q_learning", tmp_path / "file")) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_ctrl_c_saves_too(whole, tmp_path, cache, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(31, signal.SIGINT, patch)
        assert train("q_learning", argv("q_learning", tmp_path, "cut", *cache)) == 130
    assert f"go on with --resume {tmp_path / 'cut'}" in capsys.readouterr().out
    assert resume(tmp_path / "cut", *cache) == 0
    same_run(whole, tmp_path / "cut")


# the evaluation while training --------------------------------------------------------------------


@pytest.mark.parametrize(
    "agent",
    [pytest.param(a, marks=[] if a == "q_learning" else pytest.mark.slow) for a in SETTINGS],
)
def test_evaluation_while_training_changes_nothing(agent, tmp_path, cache):
    """The whole state at the end is the same, bit for bit, whatever the interval."""
    steps = int(SETTINGS[agent][SETTINGS[agent].index("--total-steps") + 1])
    per_update, numbers = steps // NUM_UPDATES, {}
    for every in (0, per_update, 7 * per_update):
        folder = tmp_path / str(every)
        more = ("--eval-every", str(every), *cache)
        assert train(agent, argv(agent, tmp_path, str(every), *more)) == 0
        path = folder / "evaluation_curve.csv"
        rows = rows_of(path) if path.exists() else []
        numbers[every] = [int(r["update"]) for r in rows if r["seed"] == "1"]
        same_rows(tmp_path / "0", folder, "metrics.csv")
        same_states(tmp_path / "0", folder, steps)
    assert numbers == {
        0: [],
        per_update: list(range(1, NUM_UPDATES + 1)),
        7 * per_update: list(range(7, NUM_UPDATES + 1, 7)),
    }
