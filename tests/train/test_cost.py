"""The cost of runs: counted before, measured after, predicted in between."""

import contextlib
import importlib
import json
import warnings
from typing import Any

import gymnax
import numpy as np
import pytest

import jaxrl.envs  # noqa: F401  (registers ours)
from jaxrl import agents
from jaxrl.agents import ppo
from jaxrl.cost.energy import Energy, Reading
from jaxrl.sinks import Chunk
from train import _cost, _run, cost
from train import ppo as script

SETTINGS: dict[str, Any] = {
    "total_steps": 1024,
    "num_envs": 8,
    "num_steps": 32,
    "num_epochs": 2,
    "num_minibatches": 2,
    "hidden": (8,),
}
ARGV = ["--env", "CartPole-v1", "--num-seeds", "2", "--eval-episodes", "4"]
for _name, _value in SETTINGS.items():
    _values = _value if isinstance(_value, tuple) else (_value,)
    ARGV += ["--" + _name.replace("_", "-"), *map(str, _values)]

# CartPole: 4 observations, 2 actions, one hidden layer of 8
ACTOR, CRITIC, FIRST = 4 * 8 + 8 * 2, 4 * 8 + 8 * 1, 4 * 8
MACS = 1024 * (ACTOR + 2 * CRITIC) + 1024 * 2 * (3 * (ACTOR + CRITIC) - 2 * FIRST)


def counted(env_id="CartPole-v1", **changes):
    env, params = gymnax.make(env_id)
    config = ppo.Config(**(SETTINGS | changes))
    return _cost.count_run(ppo, config, env, params, ppo.make_train(config, env, params))


# before -------------------------------------------------------------------------------------------


def test_counted_columns_by_hand():
    columns = counted().columns(num_seeds=3)
    assert columns["policy_parameters"] == 4 * 8 + 8 + 8 * 2 + 2
    assert columns["parameters"] == columns["policy_parameters"] + 4 * 8 + 8 + 8 + 1
    assert columns["macs_network"] == 3 * MACS
    assert columns["flops_network"] == 6 * MACS
    # an action: its layers, two biases, tanh, the normaliser (5 on 4 numbers), the largest of 2
    assert 2 * ACTOR < columns["flops_per_action"] < 2 * ACTOR + 60
    assert columns["flops"] == sum(
        columns[f"flops_{part}"] for part in ("network", "environment", "other")
    )
    assert min(columns["flops_environment"], columns["flops_other"]) > 0
    assert columns["flops_warnings"] == []
    half = counted().columns(num_seeds=3, num_updates=2)
    assert half["macs_network"] == 3 * MACS // 2


def test_the_environment_is_counted_step_by_step():
    """Twice the steps, twice the environment; its share does not depend on the network."""
    a, b = counted(), counted(total_steps=2048)
    wide = counted(hidden=(64, 64))
    assert b.columns()["flops_environment"] == 2 * a.columns()["flops_environment"]
    assert wide.columns()["flops_environment"] == a.columns()["flops_environment"]
    more_envs = counted(num_envs=16, num_steps=16)
    assert more_envs.columns()["flops_environment"] == pytest.approx(
        a.columns()["flops_environment"], rel=0.02
    )


@pytest.mark.parametrize("name", agents.NAMES)
def test_every_agent_can_be_counted(name):
    """On the first environment that it takes: what `train` and `train.cost` rely on."""
    agent = importlib.import_module(f"jaxrl.agents.{name}")
    config = agent.Config()
    for env_id, kwargs in (
        ("CartPole-v1", {}),
        ("Pendulum-v1", {}),
        ("MarsRover-v0", {"observation": "index"}),
    ):
        env, params = gymnax.make(env_id, **kwargs)
        with contextlib.suppress(ValueError):
            agent.check_config(config, env, params)
            break
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rounded steps
        train = agent.make_train(config, env, params)
    columns = _cost.count_run(agent, config, env, params, train).columns()
    parts = [columns[f"flops_{part}"] for part in ("network", "environment", "other")]
    assert (parts[0] > 0) == (name != "q_learning")  # a table is no network
    assert min(parts[1:]) > 0
    assert columns["flops"] == sum(parts)
    assert columns["parameters"] >= columns["policy_parameters"] > 0
    assert 0 < columns["flops_per_action"] < columns["flops_per_update"]


def test_loop_steps_are_those_that_wait_for_each_other():
    # an update: 32 steps, 32 of the return, 32 of the advantage, 2 epochs of 2 minibatches
    assert counted().update.loop_steps == 3 * 32 + 2 + 2 * 2
    assert counted(num_envs=16).update.loop_steps == 3 * 32 + 2 + 2 * 2


# the script ---------------------------------------------------------------------------------------


def test_the_script_prints_and_writes_without_training(tmp_path, capsys):
    path = tmp_path / "cost.json"
    assert cost.main(["--agent", "ppo", *ARGV, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "2 seed(s) of 1,024 steps, not run" in out
    assert "time and energy: unknown without a calibration" in out
    columns = json.loads(path.read_text())
    assert columns["flops_network"] == 4 * MACS
    assert columns["flops_method"] == _cost.FLOPS_METHOD
    assert not any(name.startswith("predicted") for name in columns)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--agent", "alphago"], "agent = 'alphago' must be one of 'ppo'"),
        (["--calibrate-seconds", "0"], "calibrate_seconds = 0.0 must lie in (0.0, 3600.0]"),
        (["--model-card", "card.md"], "--run FOLDER and --model-card FILE go together"),
        (["--num-envs", "0"], "num_envs = 0 must be an integer >= 1"),
        (["--calibration", "nowhere.json"], "nowhere.json"),
        (["--frobnicate", "1"], "frobnicate"),
    ],
)
def test_wrong_input_is_one_sentence(argv, message, capsys):
    assert cost.main(["--env", "CartPole-v1", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err


# calibration --------------------------------------------------------------------------------------


def test_a_calibration_predicts_what_was_planted(tmp_path, monkeypatch, capsys):
    def took(agent, config, env, params, num_seeds, seconds):
        run = _cost.count_run(agent, config, env, params, agent.make_train(config, env, params))
        features = run.features(10, num_seeds)
        s = 1e-9 * features["flops"] + 2e-6 * features["env_steps"] + 3e-5 * features["loop_steps"]
        return {**features, "seconds": s, "energy_J": 25 * s, "energy_method": "estimated (test)"}

    monkeypatch.setattr(_cost, "time_run", took)
    path, out = tmp_path / "calibration.json", tmp_path / "cost.json"
    assert cost.main([*ARGV, "--calibrate", str(path)]) == 0
    assert cost.main([*ARGV, "--calibration", str(path), "--json", str(out)]) == 0
    columns = json.loads(out.read_text())
    run = counted()
    expected = 1e-9 * 2 * 4 * run.update.flops + 2e-6 * 2048 + 3e-5 * 4 * run.update.loop_steps
    assert columns["predicted_s"] == pytest.approx(expected, rel=5e-3)  # three digits
    assert columns["predicted_J"] == pytest.approx(25 * expected, rel=5e-2)  # two
    assert columns["predicted_s_relative_error"] < 1e-6
    assert "predicted from estimated (test) of 8 short runs" in columns["predicted_J_method"]
    assert "time [s]" in capsys.readouterr().out
    # of another environment its error is not known
    argv = ["--env", "Pendulum-v1", "--calibration", str(path)]
    assert cost.main(argv) == 0
    assert "the calibration is of ppo on CartPole-v1" in capsys.readouterr().out
    content = json.loads(path.read_text())
    content["machine"]["devices"] = ["a GPU"]
    path.write_text(json.dumps(content))
    assert cost.main([*ARGV, "--calibration", str(path)]) == 0
    assert "the calibration is of another machine" in capsys.readouterr().out
    path.write_text("{}")
    assert cost.main([*ARGV, "--calibration", str(path)]) == 2


def test_a_timed_run_is_counted_as_far_as_it_ran():
    env, params = gymnax.make("CartPole-v1")
    row = _cost.time_run(ppo, ppo.Config(**SETTINGS), env, params, num_seeds=2, seconds=0.01)
    updates = row["env_steps"] / (2 * 256)
    assert updates >= 2
    assert row["flops"] == counted().update.flops * 2 * updates
    assert row["seconds"] > 0


# after --------------------------------------------------------------------------------------------


def test_the_first_update_above_a_threshold():
    metrics = {
        "episode_return": np.array([[1.0, 5.0, np.nan, 9.0], [np.nan, 3.0, 4.0, 2.0]]),
        "num_episodes": np.array([[1, 1, 0, 1], [0, 1, 1, 1]]),
    }
    # means over seeds, the last known where no episode ended: none, 4, 4.5, 5.5
    for threshold, update in [(3.0, 2), (4.2, 3), (5.5, 4), (6.0, None)]:
        assert _cost.first_update_above(metrics, threshold) == update


def test_energy_between_two_readings_is_a_straight_line():
    log = _cost.EnergyLog(meter=None)  # pyright: ignore[reportArgumentType]
    log.points = [(10, 100.0), (20, 300.0)]
    assert (log.J_after(5), log.J_after(10), log.J_after(15)) == (50.0, 100.0, 200.0)
    assert log.J_after(21) is None
    log.points = [(10, None)]
    assert log.J_after(5) is None


class Clock:
    """A meter that has spent 10 J more at every look."""

    def __init__(self):
        self.J = 0.0

    def so_far(self):
        self.J += 10.0
        return Energy(1.0, (Reading("CPU package-0", self.J, "measured (test)"),))


def test_summary_columns_by_hand():
    clock = Clock()
    log = _cost.EnergyLog(clock)  # pyright: ignore[reportArgumentType]
    returns = np.array([[1.0, 2.0, 3.0, 4.0]] * 2)
    for i in range(2):
        log(Chunk((0, 1), 2 * i, 256, 0.0, {"episode_return": returns[:, 2 * i : 2 * i + 2]}))
    used = _cost.RunEnergy(
        Energy(3.0, (Reading("CPU", 7.0, "measured (test)"),)), clock.so_far(), log
    )
    columns = _cost.summary_columns(
        counted(),
        used,
        {"episode_return": returns, "num_episodes": np.ones((2, 4))},
        num_seeds=2,
        num_updates=4,
        run_s=0.5,
        threshold=2.5,
        g_per_kwh=360.0,
    )
    assert columns["flops_per_s"] == columns["flops"] / 0.5
    assert (columns["energy_J"], columns["compile_energy_J"]) == (30.0, 7.0)
    assert columns["J_per_1M_steps"] == pytest.approx(30.0 / 2048e-6)
    # the return passes 2.5 with update 3: 10 J after two updates, 20 J after four
    assert columns["J_to_threshold"] == 15.0
    assert columns["env_steps_to_threshold"] == 3 * 256 * 2
    assert columns["gCO2e"] == pytest.approx(30.0 * 1e-4)
    assert columns["energy_method"] == columns["compile_energy_method"] == "measured (test)"


def test_a_training_run_writes_and_prints_its_cost(tmp_path, capsys):
    argv = [*ARGV, "--threshold", "5", "--g-per-kwh", "300", "--watts-per-core", "8"]
    argv += ["--runs-dir", str(tmp_path), "--name", "run"]
    assert script.main(argv) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["flops_network"] == 4 * MACS
    assert summary["flops_per_s"] == pytest.approx(summary["flops"] / summary["run_s"])
    for name in ("energy_J", "compile_energy_J", "J_per_1M_steps", "J_to_threshold", "gCO2e"):
        assert summary[name] > 0, name
    assert summary["J_to_threshold"] <= summary["energy_J"]
    assert summary["J_per_1M_steps"] == pytest.approx(summary["energy_J"] / 2048e-6, rel=0.05)
    for name in ("energy_method", "compile_energy_method", "gCO2e_method", "flops_method"):
        assert summary[name]
    out = capsys.readouterr().out
    assert "energy of 1M steps [J]" in out

    card = tmp_path / "card.md"
    argv = ["--run", str(tmp_path / "run"), "--model-card", str(card), "--g-per-kwh", "300"]
    assert cost.main(argv) == 0
    lines = card.read_text().splitlines()
    assert lines[:2] == ["---", "co2_eq_emissions:"]
    grams = float(lines[2].removeprefix("  emissions: ").removesuffix("  # g"))
    assert grams == pytest.approx(summary["gCO2e"], rel=0.06)
    assert "x 300 g/kWh (given by the user)" in lines[3]


def test_no_evaluation_is_needed_for_the_cost_of_a_stopped_run():
    names = set(counted().columns())
    assert "J_to_threshold" not in names  # only a run has one
    assert not names & set(_run.no_evaluation())
