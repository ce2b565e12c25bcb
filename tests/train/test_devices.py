"""Training scripts on several devices: spread over seeds, bit for bit the run of one device."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnax
import jax
import numpy as np
import pytest

from jaxrl import policy, sharding, sinks
from jaxrl.agents import ppo
from jaxrl.apart import NETS
from tests.train.same_runs import assert_same, rows_of
from train import _cli, _cost, _devices, _run

SMALL = [
    *("--eval-episodes", "4", "--eval-every-episodes", "2", "--no-animate", "--no-progress"),
    *("--num-seeds", "2"),
]
PENDULUM = [
    *("--env", "Pendulum-v1", "--num-envs", "4", "--num-steps", "8", "--total-steps", "1920"),
    *("--learning-starts", "100", "--batch-size", "16", "--buffer-size", "600", "--hidden", "8"),
]
SETTINGS = {
    "q_learning": ["--env", "MarsRover-v0", "--total-steps", "24000"],
    "ppo": [
        *("--env", "CartPole-v1", "--num-envs", "4", "--num-steps", "32", "--total-steps", "2560"),
        *("--num-epochs", "1", "--hidden", "8"),
    ],
    "sac": [*PENDULUM, "--normalize-obs"],
}
EXACT = ("--lanes", "one-by-one")  # on one device, what two devices do with a seed each


def train(agent, runs, name, *more):
    """Run the script in this process, which has eight devices."""
    argv = [*SETTINGS[agent], *SMALL, "--runs-dir", str(runs), "--name", name, *map(str, more)]
    return importlib.import_module(f"train.{agent}").main(argv)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one device."""
    runs = tmp_path_factory.mktemp("one")
    assert train("q_learning", runs, "run", *EXACT) == 0
    return runs / "run"


@pytest.mark.parametrize(
    ("given", "plugins", "platforms", "expected"),
    [
        ({}, [], None, "1"),
        ({}, ["cuda"], None, None),  # an accelerator's host code keeps its threads
        ({}, ["cuda"], "cpu", "1"),
        ({"NPROC": "4"}, [], None, None),
        ({"PJRT_NPROC": "4"}, [], None, "4"),
    ],
)
def test_cpu_programs_run_on_one_thread_unless_the_user_says(
    given, plugins, platforms, expected, monkeypatch
):
    for name in ("NPROC", "PJRT_NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platforms)
        _devices.use_one_thread()
    finally:
        jax.config.update("jax_platforms", before)
    assert os.environ.get("PJRT_NPROC") == expected


@pytest.mark.parametrize(
    ("num_seeds", "available", "expected"), [(4, 2, 2), (4, 3, 2), (1, 8, 1), (6, 4, 3), (5, 4, 1)]
)
def test_as_many_devices_as_can_have_equally_many_seeds(num_seeds, available, expected):
    assert _devices.most_devices(num_seeds, available) == expected


@pytest.mark.slow
def test_on_cpu_each_core_is_a_device_of_the_seeds(tmp_path):
    """In a process of its own, as JAX has begun here and keeps its devices."""
    program = (
        "import os, sys; os.sched_getaffinity = lambda _: {0, 1}; "
        "from train import ppo; ppo.main(sys.argv[1:])"
    )
    argv = [*SETTINGS["ppo"], *SMALL, "--runs-dir", str(tmp_path), "--name", "run"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 devices" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seed_devices"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_seeds_on_two_devices_are_the_run_of_one_bit_for_bit(agent, tmp_path):
    assert train(agent, tmp_path, "one", *EXACT) == 0
    assert train(agent, tmp_path, "two", "--seed-devices", 2) == 0
    assert_same(tmp_path / "one", tmp_path / "two")
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (summary["seed_devices"], summary["env_devices"]) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_environments_on_two_devices_learn_the_same(agent, tmp_path):
    # ten updates: later, rounding has grown
    steps = {"ppo": 1280, "sac": 320}[agent]
    for name, more in {"one": EXACT, "two": ("--env-devices", 2)}.items():
        assert train(agent, tmp_path, name, "--total-steps", steps, *more) == 0
    assert_alike(tmp_path)


def assert_alike(runs):
    """The runs `one` and `two` end alike, but for rounding."""
    rows = [rows_of(runs / name / "metrics.csv") for name in ("one", "two")]
    assert len(rows[0]) == 20
    values = [[float(x) for r in some[-2:] for x in r.values() if x] for some in rows]
    np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-4)
    paths = [runs / name / "policies" / "seed_1.msgpack" for name in ("one", "two")]
    policies = [policy.read_policy(path).policy for path in paths]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *policies)


@pytest.mark.parametrize(
    ("given", "cores", "learn_apart", "expected"),
    [
        ({"num_seeds": 1}, 2, True, (1, 2)),
        ({"num_seeds": 1}, 2, False, (1, 1)),
        ({"num_seeds": 1}, 1, True, (1, 1)),
        ({"num_seeds": 2}, 2, True, (2, 1)),  # seeds first: they need not talk
        ({"num_seeds": 2}, 4, True, (2, 2)),
        ({"num_seeds": 3}, 8, True, (3, 2)),
        ({"num_seeds": 4, "net_devices": 2}, 4, True, (2, 2)),
        ({"num_seeds": 1, "net_devices": 1}, 2, True, (1, 1)),
    ],
)
def test_cores_that_seeds_leave_are_for_networks(given, cores, learn_apart, expected, monkeypatch):
    made = []
    monkeypatch.setattr(_devices, "num_cores", lambda: cores)
    monkeypatch.setattr(_devices, "only_cpu", lambda: True)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PJRT_NPROC", "1")

    class Config:
        jax_num_cpu_devices = -1

        def update(self, name, value):
            made.append(value)

    monkeypatch.setattr(_devices.jax, "config", Config())
    default = _devices.make_cpu_devices(_cli.Options(**given), learn_apart=learn_apart)
    assert (default.seeds, default.nets) == expected
    assert made == ([expected[0] * expected[1]] if max(expected) > 1 else [])


@pytest.mark.parametrize("nets", [1, 2])
def test_the_cost_is_that_of_one_device_and_no_note_is_told_twice(nets):
    env, params = gymnax.make("CartPole-v1")
    config = ppo.Config(total_steps=100, num_envs=2, num_steps=8, hidden=(4,), learn_apart=True)
    with pytest.warns(UserWarning, match="not a multiple"):
        alone = ppo.make_train(config, env, params)
    with pytest.warns(UserWarning, match="not a multiple"):
        train = ppo.make_train(config, env, params, NETS if nets == 2 else None)
    run = _run.Run(
        ppo,
        _cli.Options(),
        config,
        SimpleNamespace(env=env, params=params),
        sharding.spread(train, sharding.make_mesh(num_net_devices=nets), config.num_envs),
        Path(),
        "",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted = _run.count_cost(run)
    assert counted == _cost.count_run(ppo, config, env, params, alone)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_networks_on_two_devices_are_the_run_of_one(agent, tmp_path):
    steps = {"ppo": 1280, "sac": 320}[agent]  # ten updates: later, rounding may have grown
    apart = ("--learn-apart", "--seed-devices", 1, "--total-steps", steps, *EXACT)
    assert train(agent, tmp_path, "one", *apart) == 0
    assert train(agent, tmp_path, "two", *apart, "--net-devices", 2) == 0
    assert_alike(tmp_path)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (summary["seed_devices"], summary["net_devices"]) == (1, 2)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The run on two devices, stopped in the middle."""
    original = sinks.csv_sink

    @contextlib.contextmanager
    def stopping(path, append=False):
        with original(path, append) as sink:

            def both(chunk):
                sink(chunk)
                if chunk.last_update == 25 and path.name == "metrics.csv":
                    os.kill(os.getpid(), signal.SIGTERM)

            yield both

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "csv_sink", stopping)
        more = ("--checkpoint-every", 4000, "--seed-devices", 2)
        assert train("q_learning", tmp_path, "cut", *more) == 143
    return tmp_path / "cut"


def test_a_run_stopped_on_two_devices_goes_on_on_one(one, stopped, tmp_path, capsys):
    """Every seed by itself: the whole is the run of one device, to the last bit."""
    summary = json.loads((stopped / "summary.json").read_text())
    assert (summary["seed_devices"], summary["env_devices"]) == (2, 1)
    other = shutil.copytree(stopped, tmp_path / "other")
    argv = ["--no-progress", "--seed-devices", "1"]
    script = importlib.import_module("train.q_learning")
    assert script.main(["--resume", str(stopped), *argv, *EXACT]) == 0
    assert "to rounding" not in capsys.readouterr().out
    assert_same(one, stopped)
    assert script.main(["--resume", str(other), *argv]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "written with 1 seeds side by side on a device and this is with 2" in out
    assert "to rounding, not bit for bit" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed-devices", "3"], "num_seeds = 2 must be a multiple of seed_devices = 3"),
        (["--seed-devices", "0"], "seed_devices = 0"),
        (["--env-devices", "0"], "env_devices = 0"),
        (["--lanes", "fast"], "--lanes"),
        (
            ["--seed-devices", "2", "--env-devices", "8"],
            "2 * 8 = 16, but there are 8 cpu device(s)",
        ),
        (["--net-devices", "3"], "net_devices = 3 must be 1 or 2"),
        (["--net-devices", "2"], "net_devices = 2 needs --learn-apart"),
        (["--net-devices", "2", "--learn-apart", "--env-devices", "2"], "one of them must be 1"),
        (
            ["--net-devices", "2", "--learn-apart", "--seed-devices", "8", "--num-seeds", "8"],
            "seed_devices * net_devices = 8 * 2 = 16, but there are 8 cpu device(s)",
        ),
        (["--env-devices", "3"], "num_envs = 4 must be a multiple of env_devices = 3"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(argv, said, tmp_path, capsys):
    assert train("ppo", tmp_path, "refused", *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "refused").exists()
