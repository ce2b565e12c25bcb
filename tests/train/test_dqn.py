"""The script of DQN: the run folder of `train.ppo`, its own settings, presets and errors."""

import json

import numpy as np
import pytest

from jaxrl import load_policy
from jaxrl.agents import dqn
from train import _cli, _envs, _presets, _run, play
from train import dqn as script

ARGV = [
    *("--seed", "3", "--num-seeds", "2", "--eval-episodes", "6", "--total-steps", "128"),
    *("--num-envs", "4", "--num-steps", "8", "--batch-size", "8", "--hidden", "8"),
    *("--buffer-size", "64", "--learning-starts", "32", "--no-progress"),
]


def test_every_preset_is_a_config_that_its_environment_takes():
    for env_id, preset in _presets.DQN.items():
        dqn.check_config(dqn.Config(**preset.config), *_envs.probe(env_id, preset.env_kwargs))


def test_without_a_name_it_trains_on_cartpole_as_tuned():
    options, config = _cli.parse(script.dqn, [])
    assert options.env == "CartPole-v1"
    assert config == dqn.Config(**_presets.DQN["CartPole-v1"].config)


def test_a_run_fills_its_folder_and_its_policy_plays(tmp_path, capsys):
    assert script.main([*ARGV, "--runs-dir", str(tmp_path), "--name", "pole"]) == 0
    folder = tmp_path / "pole"
    assert {p.name for p in folder.iterdir()} == set(_run.FILES) - {"animation.gif", "checkpoints"}
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["agent"]) == ("finished", "dqn")
    assert (summary["env_steps"], summary["env_steps_total"]) == (128, 256)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 4  # two seeds, four updates
    assert {"loss", "q", "num_gradient_steps", "episode_return"} <= set(rows[0].split(","))
    action = load_policy(folder)(np.zeros((5, 4)))
    assert action.shape == (5,)
    capsys.readouterr()
    assert play.main([str(folder), "--episodes", "4", "--no-animate"]) == 0
    assert "steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env", "Pendulum-v1"], "error: DQN needs discrete actions, but this environment has 1"),
        (["--train-every", "3"], "error: train_every = 3 must divide num_steps = 8"),
        (["--loss", "l1"], "error: loss = 'l1' must be one of 'huber', 'squared'"),
        (
            ["--num-seeds", "20000", "--buffer-size", "1e6"],
            "error: num_seeds = 20000: the states of so many seeds ask for",
        ),
        (
            ["--buffer-size", "1e15"],
            "error: buffer_size = 1000000000000000 transitions of 42 bytes",
        ),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(tmp_path, capsys, argv, words):
    assert script.main([*ARGV, "--runs-dir", str(tmp_path), *argv]) == 2
    assert capsys.readouterr().err.startswith(words)
    assert not list(tmp_path.iterdir())
