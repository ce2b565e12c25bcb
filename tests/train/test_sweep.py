"""Sweeps: lanes against single runs, chunks, resuming, the statistics by hand, wrong input."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import spaces
from jaxrl.agents import dqn, ppo
from train import _cli, _envs, _report, _sweep, sweep

TINY = [
    *("--env", "Pendulum-v1", "--num-seeds", "2", "--eval-episodes", "4", "--seed", "3"),
    *("--total-steps", "512", "--num-envs", "4", "--num-steps", "32", "--num-epochs", "2"),
    *("--num-minibatches", "2", "--hidden", "8"),
]
RATES = [1e30, 1e-3, 3e-3, 1e-2, 3e-2]
SWEPT = ["--grid", "learning_rate=" + ",".join(map(str, RATES)), "--agent", "ppo"]


def run(folder: Path, *argv: str) -> int:
    return sweep.main([*argv, "--runs-dir", str(folder.parent), "--name", folder.name])


def agents_of(folder: Path) -> dict[tuple[float, int], dict[str, str]]:
    with (folder / "agents.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(float(row["learning_rate"]), int(row["seed"])): row for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Five learning rates, the first of which diverges, with seeds 3 and 4: ten agents, in chunks
    of four, the last of which is filled up."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder, *SWEPT, *TINY, "--max-agents", "4") == 0
    assert len(list(folder.glob("chunks/*.json"))) == 3
    return folder


# what it trains -----------------------------------------------------------------------------------


def test_lanes_are_the_single_runs_of_their_settings(whole):
    """A lane of the second chunk, and one of the last."""
    _, config = _cli.parse(ppo, TINY)
    setup = _envs.make_env("Pendulum-v1")

    @jax.jit
    def single(rate):
        train = ppo.make_train(config.replace(learning_rate=rate), setup.env, setup.params)
        return ppo.get_policy(train(jax.random.key(4))[0])

    act = ppo.make_act(config, *spaces.read(setup.env, setup.params))
    policies = _report.stack([single(jnp.float32(1e-2)), single(jnp.float32(3e-2))])
    rows = _report.evaluate(setup, act, policies, 0, 4)
    for i, rate in enumerate((1e-2, 3e-2)):
        expected, lane = _report.aggregate(rows, i, {}), agents_of(whole)[rate, 4]
        rounding = 1e-4 * abs(expected["return_mean"])  # of returns; their deviation is small
        for name in ("return_mean", "return_std", "discounted_return_mean"):
            assert float(lane[name]) == pytest.approx(expected[name], rel=1e-4, abs=rounding)
    others = {float(row["return_mean"]) for row in agents_of(whole).values() if row["return_mean"]}
    assert len(others) == 8  # every other lane is another agent


@pytest.mark.slow
def test_agents_over_three_devices_are_the_same(whole, tmp_path):
    """Ten agents, two on each of three devices: two chunks, the second filled up."""
    more = ("--max-agents", "6", "--seed-devices", "3")
    assert run(tmp_path / "s", *SWEPT, *TINY, *more) == 0
    assert len(list((tmp_path / "s").glob("chunks/*.json"))) == 2
    here, there = agents_of(tmp_path / "s"), agents_of(whole)
    assert here.keys() == there.keys()
    for agent, row in there.items():
        assert here[agent]["diverged"] == row["diverged"]
        if row["return_mean"]:
            expected = pytest.approx(float(row["return_mean"]), rel=1e-4)
            assert float(here[agent]["return_mean"]) == expected


def test_the_files_are_complete_and_agree(whole):
    assert {path.name for path in whole.iterdir()} == set(sweep.FILES)
    summary = json.loads((whole / "summary.json").read_text())
    lanes = agents_of(whole)
    with (whole / "settings.csv").open() as file:
        settings = list(csv.DictReader(file))
    assert [row["num_seeds"] for row in settings] == ["2"] * 5
    scores = {
        rate: [float(lanes[rate, seed]["return_mean"]) for seed in (3, 4)] for rate in RATES[1:]
    }
    order = sorted(scores, key=lambda rate: -np.mean(scores[rate]))
    assert [float(row["learning_rate"]) for row in settings] == [*order, 1e30]
    for row, rate in zip(settings, order, strict=False):
        assert float(row["mean"]) == pytest.approx(np.mean(scores[rate]))
        assert float(row["iqm_low"]) == pytest.approx(min(scores[rate]))  # of two seeds
    assert summary["best"]["values"] == {"learning_rate": order[0]}
    # the one that diverged has no score and cannot be the best
    assert (settings[-1]["num_diverged"], settings[-1]["iqm"]) == ("2", "")
    assert lanes[1e30, 3]["diverged"] == "1"
    assert summary["num_diverged"] == 2
    # the command it tells is that setting
    words = summary["best_command"].split()
    assert words[:3] == ["python", "-m", "train.ppo"]
    options, config = _cli.parse(ppo, words[3:])
    tiny, wanted = _cli.parse(ppo, [*TINY, "--learning-rate", str(order[0])])
    assert config == wanted
    assert (options.env, options.seed, options.num_seeds) == (tiny.env, 3, 2)


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch, capsys):
    """The bookkeeping alone: instead of training, an agent's return is its seed."""
    trained = []

    def train(sweep, program, lanes, save, say):
        for lane in lanes:
            if len(trained) == 3:
                raise KeyboardInterrupt
            trained.append(lane.id)
            stats = {"return_mean": float(lane.seed), "endings": {"done": 1}}
            result = {"lane": lane.id, "setting": lane.setting, "seed": lane.seed}
            save([{**result, "diverged": False, "stats": stats}], {})

    monkeypatch.setattr(_sweep, "run_program", train)
    argv = ["--agent", "ppo", "--grid", "gamma=0.9,0.99", *TINY, "--num-seeds", "3"]
    folder = tmp_path / "sweep"
    assert run(folder, *argv) == 130
    assert "interrupted: 3 of 6 agents are done" in capsys.readouterr().out
    assert not (folder / "settings.csv").exists()
    first, trained[:] = [*trained], []
    assert run(folder, *argv) == 0
    assert "6 agents, 3 of them done before" in capsys.readouterr().out
    assert not set(first) & set(trained)
    assert len(set(first) | set(trained)) == 6
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["scores"] for row in summary["settings"]] == [[3.0, 4.0, 5.0]] * 2
    # all is done: another call trains nothing; a damaged file is named
    trained[:] = []
    assert run(folder, *argv) == 0
    assert trained == []
    damaged = next((folder / "chunks").glob("*.json"))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert run(folder, *argv) == 2
    assert f"{damaged} is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path):
    """SIGKILL after the first program's chunk; sizes make programs of their own."""
    argv = [
        *("--agent", "ppo", "--each", "hidden=8", "hidden=4,4", "--uniform", "gamma=0.9:0.99"),
        *("--num-samples", "2", *TINY[:-2], "--runs-dir", str(tmp_path)),
    ]
    code = (
        "import os, sys; from train import _sweep, sweep; write = _sweep.write_atomic\n"
        "def kill(path, content):\n"
        "    write(path, content)\n"
        "    if path.parent.name == 'chunks': os.kill(os.getpid(), 9)\n"
        "_sweep.write_atomic = kill; sweep.main(sys.argv[1:])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, *argv, "--name", "sweep"],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert run(tmp_path / "sweep", *argv, "--max-agents", "3") == 0
    assert run(tmp_path / "whole", *argv) == 0
    ours, theirs = (
        json.loads((tmp_path / name / "summary.json").read_text())["settings"]
        for name in ("sweep", "whole")
    )
    assert [row["static"] for row in ours] == [row["static"] for row in theirs]
    assert {str(row["static"]["hidden"]) for row in ours} == {"[8]", "[4, 4]"}
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["scores"], b["scores"], rtol=1e-4)


def test_another_sweep_in_the_folder_is_refused(whole, tmp_path, capsys):
    before = (whole / "sweep.json").read_bytes()
    argv = [*SWEPT, *TINY, "--gamma", "0.5"]
    assert run(whole, *argv) == 2
    error = capsys.readouterr().err
    assert "holds another sweep (config.gamma: 0.95, now 0.5)" in error
    assert error.count("\n") == 1
    assert (whole / "sweep.json").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    assert run(tmp_path, *SWEPT, *TINY, "--overwrite") == 2
    assert "does not hold a sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# settings -----------------------------------------------------------------------------------------


def test_every_grid_point_meets_every_sample():
    axes = _sweep.parse_axes(
        ppo.Config, ["learning_rate=1e-4,1e-3", "gamma=0.9,0.99"], [], ["ent_coef=1e-4:1e-1"]
    )
    settings = _sweep.make_settings(axes, 3, sample_seed=0)
    assert len(settings) == len({tuple(s.items()) for s in settings}) == 2 * 2 * 3
    samples = [s["ent_coef"] for s in settings[:3]]
    for i, rate in enumerate((1e-4, 1e-3)):
        for j, gamma in enumerate((0.9, 0.99)):
            part = settings[6 * i + 3 * j : 6 * i + 3 * j + 3]
            assert [(s["learning_rate"], s["gamma"]) for s in part] == [(rate, gamma)] * 3
            assert [s["ent_coef"] for s in part] == samples
    assert _sweep.make_settings((), 0, 0) == [{}]


def test_samples_fill_their_range_and_stay_when_others_come():
    log = _sweep.Axis("ent_coef", "log_uniform", (1e-4, 1e-1))
    flat = _sweep.Axis("gamma", "uniform", (0.5, 0.9))
    drawn = np.array(_sweep.draw(log, 4000, 0))
    assert (drawn.min() >= 1e-4) & (drawn.max() <= 1e-1)
    # a third of the samples in each decade; standard error 0.0075
    for decade in (1e-4, 1e-3, 1e-2):
        share = ((decade <= drawn) & (drawn < 10 * decade)).mean()
        assert share == pytest.approx(1 / 3, abs=0.03)
    assert np.mean(_sweep.draw(flat, 4000, 0)) == pytest.approx(0.7, abs=0.01)
    assert _sweep.draw(log, 5, 0) == list(drawn[:5])
    assert _sweep.draw(log, 5, 1) != list(drawn[:5])
    both = _sweep.make_settings((log, flat), 5, 0)
    assert [s["ent_coef"] for s in both] == list(drawn[:5])


def test_sizes_and_switches_are_read_by_their_type():
    each = _sweep.parse_each(
        dqn.Config, ["hidden=64,64", "hidden=128", "dueling=true", "num_envs=1e1", "num_envs=4"]
    )
    assert each == {"hidden": [(64, 64), (128,)], "dueling": [True], "num_envs": [10, 4]}


# statistics ---------------------------------------------------------------------------------------


def test_interquartile_mean_by_hand():
    # of eight, two are cut at each end: (3 + 4 + 5 + 6) / 4
    assert _sweep.interquartile_mean([100, 1, 6, 2, 5, 3, 4, 7]) == 4.5
    assert _sweep.interquartile_mean([0, 1, 5, 100]) == 3.0  # one at each end
    assert _sweep.interquartile_mean([0, 1, 5]) == 2.0  # none


def test_bootstrap_interval():
    assert _sweep.interval(np.array([3.0]), np.mean) is None
    assert _sweep.interval(np.full(5, 2.0), _sweep.interquartile_mean) == (2.0, 2.0)
    # the mean of n coins: 0.5 +- 1.96 * 0.5 / 20
    coins = np.tile([0.0, 1.0], 200)
    low, high = _sweep.interval(coins, np.mean) or (0, 0)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.006)


# memory -------------------------------------------------------------------------------------------


def test_as_many_lanes_as_fit_are_taken():
    asked = []

    def compile_for(n: int) -> Any:
        asked.append(n)
        stats = SimpleNamespace(
            argument_size_in_bytes=100,
            output_size_in_bytes=10 * n,
            temp_size_in_bytes=5 * n,
            alias_size_in_bytes=10 * n,
            generated_code_size_in_bytes=50,
        )
        return SimpleNamespace(memory_analysis=lambda: stats)

    # 150 + 5 n bytes
    assert _sweep.fit(compile_for, 100, 650, "an agent")[0] == 100
    assert asked == [100]
    n = _sweep.fit(compile_for, 1000, 650, "an agent")[0]
    assert 150 + 5 * n <= 650
    assert n >= 50
    assert _sweep.fit(compile_for, 7, None, "an agent")[0] == 7
    with pytest.raises(_sweep.DoesNotFit, match=r"an agent takes 1.55e-07 GB"):
        _sweep.fit(compile_for, 1000, 154, "an agent")


def test_xla_is_asked_for_the_memory_of_a_program():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    plain = jax.jit(lambda x: x + 1).lower(x).compile()
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    need, less = _sweep.program_bytes(plain), _sweep.program_bytes(in_place)
    assert need is not None
    assert less is not None
    assert need >= 8000  # argument and result
    assert need - less == 4000  # the result takes the argument's place


def test_an_agent_that_does_not_fit_is_told(tmp_path, capsys):
    assert run(tmp_path / "s", *SWEPT, *TINY, "--max-memory", "1e-7") == 2
    error = capsys.readouterr().err
    assert "max_memory = 1e-07 GB: one agent's state takes" in error
    assert error.count("\n") == 1


# wrong input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--agent", "alphago"], ["agent = 'alphago'", "'ppo'"]),
        (["--grid", "learning_rte=1"], ["'learning_rte'", "did you mean learning_rate?"]),
        (["--grid", "learning_rate"], ["'learning_rate' must be name=value,value"]),
        (["--grid", "learning_rate=1e-3,fast"], ["learning_rate = 'fast'", "not a number"]),
        (["--grid", "learning_rate=1e-3,nan"], ["learning_rate = 'nan'", "finite"]),
        (["--grid", "learning_rate=1e-3,-1"], ["learning_rate = -1.0", "(0.0, inf)"]),
        (["--grid", "gamma=0.9,1.5"], ["gamma = 1.5"]),
        (["--grid", "gamma=0.9,0.9"], ["gamma has a value twice"]),
        (["--grid", "gamma=0.9", "--resume", "runs/a"], ["--resume", "same command"]),
        (["--grid", "gamma=0.9", "--uniform", "gamma=0:1"], ["gamma is swept twice"]),
        (["--grid", "gamma=0.9", "--gamma", "0.8"], ["gamma is swept and set by --gamma"]),
        (["--grid", "hidden=64,64"], ["hidden is a size or a switch", "--each hidden="]),
        (["--grid", "params.gravity=1,2"], ["'gravity'", "parameters"]),
        (["--grid"], ["--grid", "expected at least one argument"]),
        (["--log-uniform", "ent_coef=0:1", "--num-samples", "4"], ["ent_coef", "above 0"]),
        (["--uniform", "ent_coef=1:0", "--num-samples", "4"], ["ent_coef = 1:0", "low < high"]),
        (["--uniform", "ent_coef=0.1", "--num-samples", "4"], ["ent_coef = 0.1", "low:high"]),
        (["--uniform", "ent_coef=0:1"], ["num_samples must be given", "ent_coef"]),
        (["--uniform", "gamma=0:1.5", "--num-samples", "99"], ["gamma = 1.", "[0.0, 1.0]"]),
        (["--num-samples", "4"], ["num_samples = 4", "--uniform"]),
        (["--uniform", "ent_coef=0:1", "--num-samples", "0"], ["num_samples = 0"]),
        (["--uniform", "ent_coef=0:1", "--num-samples", "1e6"], ["agents, more than 100000"]),
        (["--each", "gamma=0.9"], ["gamma is a real setting", "--grid gamma="]),
        (["--each", "hiden=64"], ["'hiden'", "did you mean hidden?"]),
        (["--each", "hidden=big"], ["hidden = 'big'", "64,64"]),
        (["--each", "num_envs=4", "num_envs=4"], ["num_envs = 4 is given twice"]),
        (["--each", "normalize_obs=maybe"], ["normalize_obs = 'maybe'", "true or false"]),
        (["--each", "num_minibatches=4", "num_minibatches=3"], ["num_minibatches = 3", "divide"]),
        (["--score", "fame"], ["score = 'fame'", "'success_rate'"]),
        (["--max-memory", "-1"], ["max_memory = -1.0"]),
        (["--max-agents", "0"], ["max_agents = 0"]),
        (["--sample-seed", "x"], ["sample_seed = 'x'"]),
        (["--seed-devices", "9"], ["seed_devices = 9", "there are 8 cpu"]),
        (["--env-devices", "2"], ["env_devices = 2", "single runs"]),
        (["--distributed", "auto"], ["distributed = 'auto'", "one process"]),
        (["--frobnicate", "1"], ["frobnicate"]),
    ],
)
def test_wrong_input_is_one_sentence(argv, words, tmp_path, capsys):
    argv = [*TINY, *argv, "--runs-dir", str(tmp_path / "runs")]
    if "--num-minibatches" in argv and "num_minibatches=4" in argv:
        at = argv.index("--num-minibatches")
        argv = [*argv[:at], *argv[at + 2 :]]
    if "hidden=big" in argv or "hiden=64" in argv or "num_envs=4" in argv:
        for name in ("--hidden", "--num-envs"):
            at = argv.index(name)
            argv = [*argv[:at], *argv[at + 2 :]]
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()
