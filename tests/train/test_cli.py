"""The command line: presets as defaults, every field documented, wrong input in one sentence."""

import dataclasses
import json
import re

import pytest

from jaxrl.agents import ppo
from train import _cli, _envs, _presets, play
from train import ppo as script


def test_the_preset_of_the_environment_is_the_default():
    preset = _presets.PPO["CartPole-v1"].config
    _, config = _cli.parse(ppo, ["--env", "CartPole-v1"])
    assert config == ppo.Config(**preset)
    _, config = _cli.parse(ppo, ["--env=CartPole-v1", "--learning-rate", "0.5"])
    assert config == ppo.Config(**{**preset, "learning_rate": 0.5})


def test_an_environment_without_a_preset_takes_the_defaults():
    options, config = _cli.parse(ppo, ["--env", "Acrobot-v1"])
    assert options.env == "Acrobot-v1"
    assert config == ppo.Config()


@pytest.mark.parametrize("text", ["2000000", "2_000_000", "2e6", "2E+6"])
def test_whole_numbers_may_be_written_as_people_do(text):
    assert _cli.parse(ppo, ["--total-steps", text])[1].total_steps == 2_000_000


def test_every_preset_is_a_config_that_its_environment_takes():
    for env_id, preset in _presets.PPO.items():
        ppo.check_config(ppo.Config(**preset.config), *_envs.probe(env_id, preset.env_kwargs))


@pytest.mark.parametrize(
    ("main", "classes"), [(script.main, (_cli.Options, ppo.Config)), (play.main, (play.Options,))]
)
def test_help_documents_every_field(main, classes, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for cls in classes:
        for field in dataclasses.fields(cls):
            name = "--" + field.name.replace("_", "-")
            flag = "PATH A" if field.name == "path" else rf"{name}(, --no-| [A-Z{{\[])"
            start = re.search(flag, text)
            assert start is not None, f"{name} is not in the help"
            help_text = text[start.end() :].split("(default:")[0]
            words = [w for w in help_text.split() if w[:2] != "--" and not w.isupper()]
            assert words, f"{field.name} has no help: {help_text!r}"


TINY = ["--env", "CartPole-v1", "--total-steps", "64", "--num-envs", "2", "--num-steps", "32"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env", "CartPol-v1"], ["env = 'CartPol-v1'", "CartPole-v1", "--list-envs"]),
        (["--env", "microracer"], ["env = 'microracer'", "MicroRacer-v0"]),
        ([*TINY, "--total-steps", "-5"], ["total_steps = -5", "integer >= 1"]),
        ([*TINY, "--total-steps", "1.5"], ["--total-steps", "'1.5' is not a whole number"]),
        ([*TINY, "--total-steps", "1e400"], ["--total-steps", "is not a whole number"]),
        ([*TINY, "--num-envs", "0"], ["num_envs = 0"]),
        ([*TINY, "--num-minibatches", "3"], ["num_minibatches = 3", "must divide"]),
        ([*TINY, "--learning-rate", "nan"], ["learning_rate = nan"]),
        ([*TINY, "--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
        ([*TINY, "--gamma", "1.5"], ["gamma = 1.5"]),
        ([*TINY, "--state-dependent-std"], ["state_dependent_std = True", "discrete"]),
        ([*TINY, "--num-seeds", "0"], ["num_seeds = 0"]),
        ([*TINY, "--seed", "-1"], ["seed = -1"]),
        ([*TINY, "--seed", "3e9"], ["seed = 3000000000", "2**31"]),
        ([*TINY, "--eval-episodes", "0"], ["eval_episodes = 0"]),
        ([*TINY, "--name", "../elsewhere"], ["name = '../elsewhere'", "--runs-dir"]),
        ([*TINY, "--num-env", "4"], ["--num-env", "did you mean --num-envs"]),
        ([*TINY, "--env-kwargs", "size=3"], ["env_kwargs", "CartPole-v1"]),
        ([*TINY, "--train-params", "gravitas=3"], ["'gravitas'", "gravity"]),
        ([*TINY, "--train-params", "gravity=nan"], ["gravity = nan", "finite"]),
        ([*TINY, "--train-params", "gravity"], ["train_params", "name=value"]),
        (["--env-kwargs", "obstacle=false"], ["'obstacle'", "obstacles"]),
        (["--env-kwargs", "obstacles"], ["'obstacles'", "name=value"]),
        (["--env-kwargs", "observation=video"], ["observation = 'video'"]),
        (["--env-kwargs", "obstacles=off"], ["obstacles = 'off'", "True or False"]),
        (["--env-kwargs", "num_tracks=2.5"], ["num_tracks = 2.5", "integer"]),
        (["--max-grad-norm", "inf"], ["max_grad_norm = inf"]),
        (["--eval-episodes", "30001"], ["eval_episodes = 30001", "30000"]),
    ],
)
def test_wrong_input_ends_in_one_sentence(argv, words, tmp_path, capsys):
    assert script.main([*argv, "--runs-dir", str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "─" not in captured.err
    for word in words:
        assert word in captured.err
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_touched(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"format": "jaxrl run 1"}))
    argv = [*TINY, "--runs-dir", str(tmp_path), "--name", "mine"]
    assert script.main(argv) == 2
    error = capsys.readouterr().err
    assert str(folder) in error
    assert "--overwrite" in error
    assert [p.name for p in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("config", [None, "not json", '{"format": "another tool"}', "[]"])
def test_overwrite_never_touches_what_is_no_run(config, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "summary.json").write_text("my notes")
    if config is not None:
        (folder / "config.json").write_text(config)
    before = {p.name: p.read_text() for p in folder.iterdir()}
    argv = [*TINY, "--runs-dir", str(tmp_path), "--name", "mine", "--overwrite"]
    assert script.main(argv) == 2
    assert "does not hold a run" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in folder.iterdir()} == before


def test_a_runs_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert script.main([*TINY, "--runs-dir", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "file" in error
    assert "--runs-dir" in error
    assert error.count("\n") == 1


def test_list_envs_names_ours_and_gymnax_s(capsys):
    assert script.main(["--list-envs"]) == 0
    assert {"MicroRacer-v0", "CartPole-v1"} <= set(capsys.readouterr().out.split())


def test_env_kwargs_are_read_as_python_values():
    pairs = ("obstacles=false", "num_tracks=8", "observation=lidar", "x=0.5")
    expected = {"obstacles": False, "num_tracks": 8, "observation": "lidar", "x": 0.5}
    assert _cli.parse_pairs("env_kwargs", pairs) == expected


def test_train_params_change_training_and_not_the_evaluation():
    params = _envs.with_train_params(_envs.probe("CartPole-v1", {})[1], {"gravity": 1.5})
    assert params.gravity == 1.5
    assert _envs.make_env("CartPole-v1").draw_params(0, 1)[0].gravity == 9.8
