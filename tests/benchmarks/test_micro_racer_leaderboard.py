"""MicroRacer's leaderboard: its arithmetic, its bars, a tiny run of every row, wrong input."""

import json

import jax
import numpy as np
import pytest

from benchmarks import micro_racer_leaderboard as board
from jaxrl.envs import Ending
from train import _envs, _presets


def a_row(name="sac", kind="peak", success=0.96, steps: float | None = 590.0, **more):
    seed = {"success_rate": success, "success_length_mean": steps}
    row = {"name": name, "kind": kind, "agent": name.partition("_")[0], **seed, **more}
    return {**row, "per_seed": [seed]}


def test_mean_speed_is_distance_over_time_and_a_failed_step_moves_nobody():
    _, params = _envs.probe("MicroRacer-v0", {})
    rows = {
        # two agents, two laps: 100 steps of 0.25, completed; 9 steps of 0.5 and a crash
        "return": np.array([[100 * 0.01, 9 * 0.02 - 3.0], [50 * 0.008, 50 * 0.008]], np.float32),
        "length": np.array([[100, 10], [50, 50]]),
        "ending": np.array(
            [[Ending.COMPLETED, Ending.CROSSING_BORDER], [Ending.NONE, Ending.COMPLETED]], np.int32
        ),
    }
    expected = [(100 * 0.25 + 9 * 0.5) / 109, 0.2]
    np.testing.assert_allclose(board.mean_speeds(rows, params), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("success", "steps", "met"),
    [(0.95, 600.0, True), (0.949, 500.0, False), (0.99, 600.1, False), (0.0, None, False)],
)
def test_a_peak_needs_both_laps_and_steps(success, steps, met):
    (bar, *_) = board.bars([a_row(success=success, steps=steps)])
    assert bar["bar"].startswith("SAC at its peak: 95 % in 600 steps")
    assert bar["met"] == met


def test_at_the_originals_budget_more_laps_than_the_namesake_are_asked_for():
    rows = [a_row("ppo", "50k", 0.838, 700.0), a_row("td3", "50k", 0.731, 2000.0)]
    ppo, td3 = board.bars(rows)
    assert (ppo["bar"], ppo["met"]) == ("PPO at 50k: more than 83.8 %", False)  # as many: not more
    assert (td3["bar"], td3["met"]) == ("TD3 at 50k: more than 73.0 %", True)


def test_at_the_originals_budget_the_laps_of_all_seeds_count():
    """0.9, 0.9 and 0.3: a median of 0.9, but 0.7 of all laps."""
    row = a_row("td3", "50k", 0.9)
    row["per_seed"] = [{"success_rate": rate} for rate in (0.9, 0.3, 0.9)]
    bar, *_ = board.bars([row])
    assert (bar["met"], bar["reached"]) == (False, "70.0 %, median 90.0 %")


def test_the_best_is_the_row_nearest_to_the_bar():
    careful = a_row("sac", success=0.995, steps=560.0)
    fast = a_row("td3", success=0.97, steps=470.0)
    race = a_row("race", kind="race", success=0.981, steps=479.0) | {"agent": "ppo"}
    *_, best, aim = board.bars([careful, fast])
    assert not best["met"]
    assert "(TD3)" in best["bar"]  # misses by 1 point, the other by a sixth of the steps
    *_, best, aim = board.bars([careful, fast, race, a_row("ddpg", success=0.0, steps=None)])
    assert best["met"]
    assert "(PPO, paid for lap time)" in best["bar"]
    assert not aim["met"]


def test_the_published_rows_are_those_of_the_specification():
    """400 laps each, so that completion is a whole number of quarters of a percent."""
    for theirs in board.PUBLISHED.values():
        assert abs(400 * theirs.success_rate - round(400 * theirs.success_rate)) < 0.21
    assert {n: round(100 * p.success_rate, 1) for n, p in board.PUBLISHED.items()} == {
        "ddpg": 92.0,
        "ppo": 83.8,
        "td3": 73.0,
        "dsac": 42.2,
        "sac": 16.8,
        "ddpg_parameter_noise": 2.5,
    }
    assert set(board.LABELS) == set(board.PUBLISHED)


def test_every_agent_has_settings_that_its_learner_takes():
    every = board.entries(board.Options())
    assert len(every) == 6 + 6 + 1 + 6
    for entry in every:
        env, params = _envs.probe("MicroRacer-v0", entry.preset.env_kwargs)
        module = board.importlib.import_module(f"jaxrl.agents.{entry.agent}")
        config = module.Config(**entry.preset.config)
        module.check_config(config, env, _envs.with_train_params(params, entry.preset.train_params))
        if entry.kind == "50k":  # the last update may be rounded up, by less than 3 %
            updates = -(-config.total_steps // (config.num_envs * config.num_steps))
            assert 50_000 <= updates * config.num_envs * config.num_steps <= 51_500
    names = {entry.name: entry.preset for entry in every if entry.kind == "peak"}
    for name in ("sac", "td3", "dsac", "ddpg"):
        assert names[name] is _presets.find(name, "MicroRacer-v0")  # the script's defaults
    assert names["ddpg_parameter_noise"].config["noise"] == "parameter"
    assert dict(_presets.MICRO_RACER_RACE[1].train_params)["time_cost"] > 0


def tiny_settings():
    small = {"num_envs": 2, "num_steps": 8, "total_steps": 32, "hidden": (8,)}
    replay = {"batch_size": 4, "learning_starts": 8, "buffer_size": 32}
    presets = {"ppo": _presets.Preset({**small, "num_minibatches": 2})}
    for name in ("ddpg", "td3", "dsac", "sac"):
        presets[name] = _presets.Preset({**small, **replay}, train_params={"failure_reward": -5.0})
    noisy = {**presets["ddpg"].config, "noise": "parameter"}
    return {**presets, "ddpg_parameter_noise": _presets.Preset(noisy)}


@pytest.mark.slow
def test_a_tiny_run_writes_table_plot_and_json(tmp_path, monkeypatch, capsys):
    tiny = {name: small_bank(preset) for name, preset in tiny_settings().items()}
    monkeypatch.setattr(_presets, "MICRO_RACER_50K", tiny)
    json_path, plot = tmp_path / "board.json", tmp_path / "board.png"
    argv = ["--num-seeds", "2", "--episodes", "3", "--agents", "td3", "--kinds", "50k"]
    assert board.cli([*argv, "--json", str(json_path), "--plot", str(plot)]) == 0
    (row,) = json.loads(json_path.read_text())["rows"]
    assert (row["name"], row["kind"], row["env_steps"]) == ("td3", "50k", 32)
    assert (row["num_seeds"], len(row["per_seed"])) == (2, 2)
    assert row["train_params"] == {"failure_reward": -5.0}
    assert row["config"]["hidden"] == [8]
    for seed in row["per_seed"]:
        assert sum(seed["endings"].values()) == 3
        assert seed["speed_mean"] > 0
        assert seed["return_mean"] >= -3  # a crash costs what it does in the original, not 5
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "| TD3, at the original's budget | 32 |" in out
    assert "| original: DDPG | 50,000 | 92.0 % |  | 6.18 | 730 |" in out


def fake_training(monkeypatch):
    """Rows without any training; returns the list of those asked for."""
    trained = []

    def train(entry, setup, options):
        del setup
        trained.append((entry.name, entry.kind))
        measured = dict.fromkeys(("compile_s", "wall_s", "eval_s", "cpu_s", "row_cpu_s"), 1.0)
        reached = {"success_rate": 0.97, "success_length_mean": 500.0, "return_mean": 6.0}
        row = {**board.settings(entry, options), **measured, **reached, "speed_mean": 0.3}
        return {**row, "env_steps": 10, "steps_per_s": 10.0, "per_seed": [reached]}

    monkeypatch.setattr(board, "train_and_evaluate", train)
    monkeypatch.setattr(board.SetupMaker, "__call__", lambda self, kwargs: None)
    return trained


def test_resuming_trains_only_what_is_new(tmp_path, monkeypatch):
    trained = fake_training(monkeypatch)
    path = tmp_path / "board.json"
    argv = ["--json", str(path), "--plot", str(tmp_path / "board.png"), "--agents", "td3"]
    assert board.cli([*argv, "sac", "--kinds", "50k"]) == 0
    first = json.loads(path.read_text())
    trained.clear()
    assert board.cli([*argv, "sac", "--kinds", "50k", "peak", "--resume"]) == 0
    assert trained == [("td3", "peak"), ("sac", "peak")]
    rows = json.loads(path.read_text())["rows"]
    assert rows[:2] == first["rows"]
    trained.clear()
    other = ["--json", str(path), "--plot", "None", "--agents", "ddpg", "--kinds", "50k"]
    assert board.cli([*other, "--resume"]) == 0
    kept = json.loads(path.read_text())["rows"][:4]
    assert kept == rows  # of agents that are not asked for
    trained.clear()
    assert board.cli([*argv, "--kinds", "50k", "--eval-seed", "2", "--resume"]) == 0
    assert trained == [("td3", "50k")]  # judged on other tracks: not the same row


def test_a_row_is_on_the_disk_as_soon_as_it_is_trained(tmp_path, monkeypatch):
    trained = fake_training(monkeypatch)
    path = tmp_path / "board.json"
    train = board.train_and_evaluate

    def interrupted(*args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(board, "train_and_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        board.cli(["--json", str(path), "--plot", "None"])
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == [n for n, _ in trained]


def test_resuming_that_is_stopped_keeps_the_rows_not_yet_reached(tmp_path, monkeypatch):
    fake_training(monkeypatch)
    path = tmp_path / "board.json"
    argv = ["--json", str(path), "--plot", "None", "--kinds", "50k", "--resume", "--agents"]
    assert board.cli([*argv, "sac", "ppo", "td3"]) == 0
    settings = board.settings

    def changed(entry, options):  # all but TD3 have new settings
        return settings(entry, options) | ({} if entry.name == "td3" else {"sweep": [[0.5, 0.0]]})

    train = board.train_and_evaluate

    def interrupted(entry, setup, options):
        if entry.name == "ppo":
            raise KeyboardInterrupt
        return {**train(entry, setup, options), "sweep": [[0.5, 0.0]]}

    monkeypatch.setattr(board, "settings", changed)
    monkeypatch.setattr(board, "train_and_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        board.cli([*argv, "sac", "ppo", "td3"])
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["sac"]["sweep"] == [[0.5, 0.0]]
    assert rows["ppo"]["sweep"] == rows["td3"]["sweep"] == []  # of the run before


def small_bank(preset):
    return _presets.Preset(preset.config, {"num_tracks": 3}, preset.train_params)


def test_a_file_that_is_no_leaderboard_is_not_resumed(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("[1]")
    assert board.cli(["--json", str(path), "--resume"]) == 2
    assert "holds no leaderboard to resume" in capsys.readouterr().err
    assert path.read_text() == "[1]"


@pytest.mark.slow
def test_a_sweep_gives_every_agent_its_own_numbers():
    """Two agents alike but for the time cost part ways; two alike in all things do not."""
    setup = _envs.make_env("MicroRacer-v0", num_tracks=3)
    entry = board.Entry(
        "ppo", "frontier", "ppo", tiny_settings()["ppo"], ((0.5, 0.0), (0.5, 0.0), (0.5, 0.9))
    )
    row = board.train_and_evaluate(entry, setup, board.Options(episodes=3))
    same, twin, other = ({**s, "time_cost": None} for s in row["per_seed"])
    assert same == twin
    assert same != other
    assert [s["time_cost"] for s in row["per_seed"]] == [0.0, 0.0, 0.9]
    table = board.frontier_markdown([row])
    assert table.startswith("| agent | gamma 0.5 | gamma 0.5 | gamma 0.5, time 0.9 |")
    assert "| PPO | " in table


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--agents", "alphago"], "agents: 'alphago' must be one of ddpg, ddpg_parameter_noise"),
        (["--kinds", "fast"], "kinds: 'fast' must be one of 50k, peak, race, frontier"),
        (["--num-seeds", "0"], "num_seeds = 0 must be an integer >= 1"),
        (["--episodes", "0"], "episodes = 0 must be an integer >= 1"),
        (["--episodes", "100000"], "episodes = 100000 must be <= 30000"),
        (["--eval-seed", "-1"], "eval_seed = -1 must be an integer >= 0"),
        (["--total-steps", "1"], "total_steps = 1 must be an integer >= 4"),
        (["--frontier", "0.99"], "frontier: '0.99' must be gamma:time_cost"),
        (["--frontier", "1.5:0"], "gamma = 1.5 must lie in [0.0, 1.0]"),
        (["--frontier", "0.9:nan"], "time_cost = nan must lie in"),
        (["--agents", "sac", "--kinds", "race"], "leave no row to train"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(_presets, "MICRO_RACER_RACE", ("ppo", _presets.Preset()))
    monkeypatch.setattr(jax, "jit", None)  # nothing may be compiled
    assert board.cli(argv) == 2
    assert message in capsys.readouterr().err
