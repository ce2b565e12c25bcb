"""A run that is killed and resumed is the run that was not: states, metrics, evaluation, policies."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrl import checkpoint

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
    last = [max(checkpoint.steps(folder / "checkpoints")) for folder in (a, b)]
    assert last[0] == last[1] == int(rows[-1]["env_steps"])
    places = [folder / "checkpoints" / str(last[0]) for folder in (a, b)]
    leaves = [checkpoint.verify(place.parent, last[0])["leaves"] for place in places]
    assert leaves[0] == leaves[1]
    names = [f"{i:05d}" for i, leaf in enumerate(leaves[0]) if np.prod(leaf["shape"])]
    states = [checkpoint._read_arrays(place, names) for place in places]
    for name in names:  # the whole state: replay, optimisers, environments, keys
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
