"""A tiny run from the command line to its folder: complete, repeatable, stoppable."""

import contextlib
import csv
import json
import os
import signal
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import jaxrl
from jaxrl import policy, sinks
from jaxrl.agents import ppo
from train import _envs, _report, _run, play
from train import ppo as script

SETTINGS: dict[str, Any] = {
    "total_steps": 1024,
    "num_envs": 8,
    "num_steps": 32,
    "num_epochs": 2,
    "num_minibatches": 2,
    "hidden": (8,),
}
NUM_UPDATES = 4
ARGV = [
    "--env",
    "CartPole-v1",
    "--num-seeds",
    "1",
    "--eval-episodes",
    "6",
    "--learning-rate",
    "2e-3",
    "--ent-coef",  # as Config has it, whatever the preset
    "0",
]
for _name, _value in SETTINGS.items():
    _values = _value if isinstance(_value, tuple) else (_value,)
    ARGV += ["--" + _name.replace("_", "-"), *map(str, _values)]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a finished run of seeds 3 and 4."""
    runs = tmp_path_factory.mktemp("runs")
    argv = [*ARGV, "--seed", "3", "--num-seeds", "2", "--runs-dir", str(runs), "--name", "two"]
    assert script.main(argv) == 0
    return runs / "two"


@pytest.fixture(scope="module")
def config():
    return ppo.Config(**SETTINGS, learning_rate=2e-3)


@pytest.fixture(scope="module")
def one_piece(config):
    """The same run without the script: all updates in one compiled call."""
    train = ppo.make_train(config, *gymnax.make("CartPole-v1"))
    keys = jnp.stack([jax.random.key(3), jax.random.key(4)])
    state = jax.jit(jax.vmap(train.init))(keys)
    return jax.device_get(jax.jit(jax.vmap(lambda s: train.run(s, NUM_UPDATES)))(state))


def test_all_files_are_there(folder):
    expected = set(_run.FILES) - {"animation.gif", "checkpoints"}  # there is no picture of CartPole
    assert {p.name for p in folder.iterdir()} == expected
    assert {p.name for p in folder.glob("policies/*")} == {"seed_3.msgpack", "seed_4.msgpack"}
    for seed in (3, 4):
        assert len(list(folder.glob(f"tensorboard/seed_{seed}/events*"))) == 1


def test_metrics_have_each_update_and_seed_once(folder):
    rows = rows_of(folder / "metrics.csv")
    assert [(int(r["update"]), int(r["seed"])) for r in rows] == [
        (update, seed) for update in range(1, NUM_UPDATES + 1) for seed in (3, 4)
    ]
    assert [int(r["env_steps"]) for r in rows[::2]] == [256, 512, 768, 1024]


def test_chunks_are_the_run_in_one_piece_bit_for_bit(folder, one_piece):
    state, metrics = one_piece
    for lane, seed in enumerate((3, 4)):
        saved = policy.read_policy(folder / "policies" / f"seed_{seed}.msgpack").policy
        expected = jax.tree.map(lambda x, lane=lane: x[lane], ppo.get_policy(state))
        jax.tree.map(np.testing.assert_array_equal, saved.params, expected.params)
        jax.tree.map(np.testing.assert_array_equal, saved.obs_stats, expected.obs_stats)
        rows = [r for r in rows_of(folder / "metrics.csv") if int(r["seed"]) == seed]
        for name, values in metrics.items():
            written = np.array([r[name] or "nan" for r in rows], np.float32)
            np.testing.assert_array_equal(written, values[lane], err_msg=name)


def test_config_json_repeats_the_run(folder, config):
    written = json.loads((folder / "config.json").read_text())
    assert (written["agent"], written["env"], written["env_kwargs"]) == ("ppo", "CartPole-v1", {})
    assert (written["seed"], written["num_seeds"], written["eval_episodes"]) == (3, 2, 6)
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in written["config"].items()
    }
    assert ppo.Config(**fields) == config


def test_summary_says_how_fast_and_how_good_on_what(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["env"], summary["agent"], summary["seeds"]) == ("CartPole-v1", "ppo", [3, 4])
    assert (summary["env_steps"], summary["env_steps_total"]) == (1024, 2048)
    assert summary["steps_per_s"] == pytest.approx(2048 / summary["run_s"])
    assert summary["compile_s"] > 0
    assert summary["jax"] == jax.__version__
    assert summary["jaxrl"] == jaxrl.__version__
    assert summary["devices"] == [d.device_kind for d in jax.devices()]
    assert summary["success_rate"] is None  # CartPole knows no success
    assert [s["seed"] for s in summary["per_seed"]] == [3, 4]
    assert summary["best_seed"] in (3, 4)
    returns = np.array([float(r["return"]) for r in rows_of(folder / "evaluation.csv")])
    assert returns.shape == (12,)
    assert summary["eval_return_mean"] == pytest.approx(returns.mean())
    assert summary["eval_return_std"] == pytest.approx(returns.std())
    assert summary["eval_return_iqm"] == pytest.approx(np.sort(returns)[3:9].mean())
    means = returns.reshape(2, 6).mean(axis=1)
    assert [s["return_mean"] for s in summary["per_seed"]] == pytest.approx(means)
    assert summary["median"]["return_mean"] == pytest.approx(np.median(means))
    assert summary["best_seed"] == (3, 4)[int(means.argmax())]


def test_evaluation_runs_every_seed_on_the_same_episodes(folder):
    setup = _envs.make_env("CartPole-v1")
    saved = policy.read_policy(folder / "policies" / "seed_3.msgpack")
    twice = _report.stack([saved.policy, saved.policy])
    rows = _report.evaluate(setup, saved.act_fn(), twice, 0, 6)
    np.testing.assert_array_equal(rows["length"][0], rows["length"][1])
    written = [int(r["length"]) for r in rows_of(folder / "evaluation.csv") if r["seed"] == "3"]
    assert rows["length"][0].tolist() == written  # and the reloaded policy plays as the trained one
    assert len(set(written)) > 1  # from different starts


def test_the_best_policy_loads_without_training(folder):
    best = json.loads((folder / "summary.json").read_text())["best_seed"]
    assert policy.read_policy(folder).seed == best
    assert jaxrl.load_policy(folder)(np.zeros((5, 4))).shape == (5,)


def test_the_learning_curve_is_a_picture(folder):
    picture = matplotlib.image.imread(folder / "learning_curve.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05  # something is drawn


def test_a_seed_of_many_is_the_run_of_that_seed(folder, tmp_path):
    argv = [*ARGV, "--seed", "4", "--runs-dir", str(tmp_path), "--name", "one"]
    assert script.main(argv) == 0
    one = policy.read_policy(tmp_path / "one")
    of_two = policy.read_policy(folder / "policies" / "seed_4.msgpack")
    # not bit for bit: XLA orders the sums of one and of two lanes differently
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
        one.policy.params,
        of_two.policy.params,
    )


def test_overwrite_replaces_the_run_and_keeps_what_is_not_its_own(folder, tmp_path):
    argv = [*ARGV, "--total-steps", "256", "--runs-dir", str(tmp_path), "--name", "again"]
    (tmp_path / "again" / "policies").mkdir(parents=True)
    (tmp_path / "again" / "config.json").write_text(json.dumps({"format": _run.FORMAT}))
    (tmp_path / "again" / "policies" / "seed_9.msgpack").write_text("old")
    (tmp_path / "again" / "notes.txt").write_text("mine")
    assert script.main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "again" / "notes.txt").read_text() == "mine"
    names = [p.name for p in (tmp_path / "again" / "policies").iterdir()]
    assert names == ["seed_0.msgpack"]
    assert len(rows_of(tmp_path / "again" / "metrics.csv")) == 1


def test_an_interrupted_run_keeps_metrics_and_policies(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def interrupting_sink(*_):
        def sink(chunk):
            if chunk.last_update == 2 and "policy_loss" in chunk.metrics:
                os.kill(os.getpid(), signal.SIGINT)

        yield sink

    monkeypatch.setattr(sinks, "tensorboard_sink", interrupting_sink)
    before = signal.getsignal(signal.SIGINT)
    assert script.main([*ARGV, "--runs-dir", str(tmp_path), "--name", "cut"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    # update 3 was running when update 2 was read: it is kept, the fourth is not begun
    rows = rows_of(tmp_path / "cut" / "metrics.csv")
    assert [int(r["update"]) for r in rows] == [1, 2, 3]
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["status"], summary["env_steps"]) == ("interrupted", 768)
    assert summary["eval_return_mean"] is None
    assert policy.read_policy(tmp_path / "cut").seed == 0
    assert "interrupted after 768 of 1,024 steps" in capsys.readouterr().out


def test_a_diverging_run_stops_and_names_seed_update_and_metric(tmp_path, capsys):
    argv = [*ARGV, "--learning-rate", "1e30", "--runs-dir", str(tmp_path), "--name", "nan"]
    assert script.main(argv) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "stopped: seed 0, update 1: " in out
    assert "lower --learning-rate" in out
    assert rows_of(tmp_path / "nan" / "metrics.csv")
    assert json.loads((tmp_path / "nan" / "summary.json").read_text())["status"] == "diverged"
    assert not (tmp_path / "nan" / "policy.msgpack").exists()


@pytest.mark.parametrize("num_updates", [1, 7, 61, 98, 244, 977, 10_000, 100_003, 1_000_000])
def test_chunks_make_up_the_run_in_few_sizes(num_updates):
    sizes = _run.chunk_sizes(num_updates)
    assert sum(sizes) == num_updates
    assert len(set(sizes)) <= 2  # each size is compiled
    assert min(num_updates, 20) <= len(sizes) <= 2001


def test_play_evaluates_without_training(folder, capsys, monkeypatch):
    monkeypatch.setattr(ppo, "make_train", None)
    assert play.main([str(folder), "--episodes", "6", "--seed", "0", "--policy", "seed_4"]) == 0
    out = capsys.readouterr().out
    per_seed = json.loads((folder / "summary.json").read_text())["per_seed"]
    # on seed 0 the episodes are those of the run's own evaluation
    assert f"{per_seed[1]['return_mean']:.2f} ± {per_seed[1]['return_std']:.2f}" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], ["nowhere does not exist"]),
        (["FOLDER", "--policy", "seed_9"], ["policy = 'seed_9'", "seed_3, seed_4"]),
        (["FOLDER", "--episodes", "0"], ["episodes = 0"]),
        (["FOLDER", "--out", "missing/x.gif"], ["missing"]),
        (["FOLDER/config.json"], ["config.json is not a policy file"]),
        ([], ["PATH"]),
    ],
)
def test_play_says_what_is_wrong(argv, words, folder, capsys):
    assert play.main([arg.replace("FOLDER", str(folder)) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_smoothing_counts_episodes_and_carries_the_last_value():
    metrics = {
        "num_episodes": np.array([[0.0, 1, 3, 0, 0]]),
        "episode_return": np.array([[np.nan, 10, 2, np.nan, np.nan]]),
    }
    # windows of two updates: none; 10; (10 + 3 * 2) / 4; 2; none, so the last known
    smooth = _report.smooth(metrics, "episode_return", 2)
    assert smooth == pytest.approx(np.array([[np.nan, 10, 4, 2, 2]]), nan_ok=True)
