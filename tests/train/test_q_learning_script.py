"""`python -m train.q_learning` from the command line to its folder, and back into play."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import jaxrl
from jaxrl.agents import q_learning
from train import _cli, _envs, _presets, _run, play
from train import q_learning as script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The default run, shortened: its environment is the agent's own."""
    runs = tmp_path_factory.mktemp("runs")
    argv = ["--total-steps", "8000", "--num-seeds", "2", "--eval-episodes", "4"]
    assert script.main([*argv, "--runs-dir", str(runs)]) == 0
    return runs / "MarsRover-v0__q_learning__seed0"


def test_the_run_folder_is_complete(folder):
    assert {p.name for p in folder.iterdir()} == set(_run.FILES) - {"checkpoints"}
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 8000 // 400
    assert {"td_error", "epsilon", "visited", "episode_return"} <= set(rows[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["agent"]) == ("finished", "q_learning")
    assert summary["eval_return_mean"] == 100.0  # left, at the preset's discount 0.9
    assert summary["eval_length_mean"] == 4.0


def test_the_saved_table_acts(folder):
    act = jaxrl.load_policy(folder)
    np.testing.assert_array_equal(act(np.eye(6))[1:5], 0)


def test_the_animation_shows_the_episode(folder, tmp_path):
    setup = _envs.make_env("MarsRover-v0")
    assert setup.animate is not None
    shown = setup.animate(lambda obs: obs.argmax() * 0 + 1, 0, 1, tmp_path / "right.gif")
    assert shown == "one episode, ended after 3 steps, return 40"
    for path in (tmp_path / "right.gif", folder / "animation.gif"):
        with Image.open(path) as picture:
            assert picture.size == (720, 200)
            assert getattr(picture, "n_frames", 1) >= 3
    assert _envs.make_env("MarsRover-v0", length=100).animate is None


def test_play_takes_the_table(folder, capsys):
    assert play.main([str(folder), "--episodes", "2", "--no-animate"]) == 0
    assert "100.00" in capsys.readouterr().out


def test_presets_are_configs_that_their_environments_take():
    for env_id, preset in _presets.Q_LEARNING.items():
        config = q_learning.Config(**preset.config)
        q_learning.check_config(config, *_envs.probe(env_id, preset.env_kwargs))
        _, parsed = _cli.parse(q_learning, ["--env", env_id])
        assert parsed == config
    assert _cli.parse(q_learning, [])[0].env == "MarsRover-v0"


def test_a_sequence_is_given_to_the_environment_with_commas():
    pairs = ("rewards=1,0,0.5", "terminal=0,", "start=uniform")
    kwargs = _cli.parse_pairs("env_kwargs", pairs)
    assert kwargs == {"rewards": (1, 0, 0.5), "terminal": (0,), "start": "uniform"}
    setup = _envs.make_env("MarsRover-v0", length=3, **kwargs)
    np.testing.assert_array_equal(setup.params.rewards, [1, 0, 0.5])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env", "CartPole-v1"], ["observation space", "table", "one-hot"]),
        (["--method", "dyna"], ["method = 'dyna'", "'sarsa'"]),
        (["--learning-rate", "2"], ["learning_rate = 2.0"]),
        (["--env-kwargs", "misstep_prob=2"], ["misstep_prob = 2", "[0, 1]"]),
        (["--env-kwargs", "start=0"], ["start = 0", "terminal"]),
        (["--env-kwargs", "size=3"], ["'size'", "length"]),
    ],
)
def test_wrong_input_ends_in_one_sentence(argv, words, tmp_path, capsys):
    assert script.main([*argv, "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()
