"""The script of REINFORCE: the run folder of `train.ppo`, and its own settings and errors."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl
from jaxrl import policy
from jaxrl.agents import reinforce
from train import _cli, _envs, _presets, _run
from train import reinforce as script

ARGV = [
    *("--env", "MarsRover-v0", "--seed", "3", "--num-seeds", "2", "--eval-episodes", "6"),
    *("--total-steps", "128", "--num-envs", "4", "--num-steps", "8", "--num-states", "8"),
    *("--num-rollouts", "2", "--hidden", "8", "--no-animate"),
]
SETTINGS = {
    **_presets.REINFORCE["MarsRover-v0"].config,
    "total_steps": 128,
    "num_envs": 4,
    "num_steps": 8,
    "num_states": 8,
    "num_rollouts": 2,
    "hidden": (8,),
}


def test_every_preset_is_a_config_that_its_environment_takes():
    assert set(_presets.REINFORCE) == {"CartPole-v1", "MarsRover-v0"}
    for env_id, preset in _presets.REINFORCE.items():
        config = reinforce.Config(**preset.config)
        reinforce.check_config(config, *_envs.probe(env_id, preset.env_kwargs))


def test_the_preset_is_the_default():
    options, config = _cli.parse(script.reinforce, ["--env", "MarsRover-v0"])
    assert config == reinforce.Config(**_presets.REINFORCE["MarsRover-v0"].config)
    assert options.env_kwargs == ("start=uniform",)


def test_a_run_fills_its_folder(tmp_path):
    assert script.main([*ARGV, "--runs-dir", str(tmp_path), "--name", "rover"]) == 0
    folder = tmp_path / "rover"
    assert {p.name for p in folder.iterdir()} == set(_run.FILES) - {"animation.gif", "checkpoints"}
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["agent"]) == ("finished", "reinforce")
    assert (summary["env_steps"], summary["env_steps_total"]) == (128, 256)
    assert [s["seed"] for s in summary["per_seed"]] == [3, 4]
    # the same run without the script, in one piece
    setup = _envs.make_env("MarsRover-v0", start="uniform")
    train = reinforce.make_train(reinforce.Config(**SETTINGS), setup.env, setup.params)
    keys = jnp.stack([jax.random.key(3), jax.random.key(4)])
    state = jax.jit(jax.vmap(train.init))(keys)
    state, metrics = jax.device_get(jax.jit(jax.vmap(lambda s: train.run(s, 4)))(state))
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "4"]
    assert [int(row["env_steps"]) for row in rows] == [32, 64, 96, 128]
    for name in ("rollout_steps", "return_error", "return_mean", "value_loss"):
        written = np.array([row[name] for row in rows], np.float32)
        np.testing.assert_array_equal(written, metrics[name][1], err_msg=name)
    saved = policy.read_policy(folder / "policies" / "seed_4.msgpack")
    expected = jax.tree.map(lambda x: x[1], reinforce.get_policy(state))
    jax.tree.map(np.testing.assert_array_equal, saved.policy.params, expected.params)
    assert jaxrl.load_policy(folder)(np.eye(6, dtype=np.float32)).shape == (6,)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-states", "33"], ["num_states = 33", "at most num_envs * num_steps = 4 * 8 = 32"]),
        (["--num-rollouts", "0"], ["num_rollouts = 0", "integer >= 1"]),
        (["--returns", "td"], ["returns = 'td'", "'rollouts', 'episode'"]),
        (["--baseline", "median"], ["baseline = 'median'", "'value', 'mean', 'none'"]),
        (["--gamma", "1.5"], ["gamma = 1.5"]),
    ],
)
def test_wrong_settings_end_in_one_sentence(argv, words, tmp_path, capsys):
    assert script.main([*ARGV, *argv, "--runs-dir", str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not (tmp_path / "runs").exists()


def test_help_says_what_is_tuned(capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help", "--env", "CartPole-v1"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "REINFORCE" in text
    assert "tuned for CartPole-v1" in text
