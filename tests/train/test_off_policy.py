"""The scripts of the learners from replay: from the command line to a folder that can be played."""

import importlib
import json

import numpy as np
import pytest

import jaxrl

ARGV = [
    *("--env", "Pendulum-v1", "--num-seeds", "2", "--eval-episodes", "3", "--no-progress"),
    *("--total-steps", "480", "--num-envs", "4", "--num-steps", "60", "--learning-starts", "100"),
    *("--batch-size", "16", "--buffer-size", "200", "--hidden", "8", "--normalize-obs"),
]


@pytest.mark.parametrize(
    "agent", ["sac", *(pytest.param(a, marks=pytest.mark.slow) for a in ("td3", "ddpg", "dsac"))]
)
def test_a_run_from_the_command_line(agent, tmp_path):
    script = importlib.import_module(f"train.{agent}")
    assert script.main([*ARGV, "--runs-dir", str(tmp_path), "--name", "run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["agent"]) == ("finished", agent)
    assert (summary["env_steps"], len(summary["per_seed"])) == (480, 2)
    action = jaxrl.load_policy(tmp_path / "run")(np.zeros((5, 3)))
    assert action.shape == (5, 1)
    assert np.abs(action).max() <= 2.0  # Nm, Pendulum's bounds


@pytest.mark.parametrize("agent", ["td3", "ddpg", "dsac"])
def test_an_environment_that_does_not_fit_is_refused_in_one_sentence(agent, tmp_path, capsys):
    script = importlib.import_module(f"train.{agent}")
    assert script.main(["--env", "CartPole-v1", "--runs-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{agent.upper()} needs real actions, but this environment has 2 discrete" in error
    assert not list(tmp_path.iterdir())
