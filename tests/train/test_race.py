"""Races: the table by hand, one program against single drives, drivers that cannot drive."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrl import policy, spaces
from jaxrl.envs import Ending, MicroRacer
from jaxrl.envs.render import micro_racer as pictures
from jaxrl.normalize import RunningStats
from jaxrl.types import Policy
from train import _envs, _race, race

# Pilots that steer to the longest ray at most as fast as their name says.
PILOTS = """
import math

def steer(obs, speed):
    direction, _, longest, _, v = obs
    change = (min(max(2 * longest, 0.12), speed) - v) / 0.004
    after = max(v + 0.004 * min(max(change, -1), 1), 1e-3)
    most = min(math.pi / 6, 1.741 * 0.04 / after)
    return [min(max(change, -1), 1), min(max(-direction / most, -1), 1)]

def slow(obs): return steer(obs, 0.2)
def fast(obs): return steer(obs, 0.25)
def crash(obs): return (1.0, 0.0)
def brake(obs): return [-1.0, steer(obs, 0.2)[1]]
def nan(obs): return [float("nan"), 0.0]
def three(obs): return [1.0, 0.0, 0.0]
def word(obs): return "left"
def late(obs): return [1.0, 0.0] if obs[4] < 0.3 else 1 / 0
number = 3
"""


@pytest.fixture(autouse=True)
def pilots(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "race_pilots.py").write_text(PILOTS)
    (folder / "race_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(scope="module")
def line():
    """Three tracks without obstacles (compiled once in this file) and the starts on them."""
    return _race.line_up({"obstacles": False}, {}, 3, 7)


def save(path, agent, env="MicroRacer-v0", width=16, **env_kwargs):
    """Save an untrained policy, normaliser and all, and return its path."""
    module = policy.agent_module(agent)
    config = module.Config(hidden=(width, 8), normalize_obs=agent == "ppo")
    action, obs_shape = spaces.read(*_envs.probe(env, env_kwargs))
    params = module.policy_net(config, action).init(jax.random.key(width), jnp.zeros(obs_shape))
    stats = RunningStats(jnp.full(obs_shape, 0.1), jnp.full(obs_shape, 0.5), jnp.ones(()))
    trained = Policy(params, stats if agent == "ppo" else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    policy.save_policy(
        path,
        policy.SavedPolicy(agent, config, action, obs_shape, env, env_kwargs, 0, trained),
    )
    return path


# the table ----------------------------------------------------------------------------------------


def test_standings_by_hand():
    done, border, slow, limit = 1, 2, 4, 0
    ending = np.array(
        [
            [done, done, border, done, slow],  # a
            [done, done, done, border, border],  # b
            [done, limit, done, done, border],  # c
        ]
    )
    steps = np.array(
        [[500, 400, 3, 600, 9], [500, 390, 700, 20, 1], [510, 1000, 650, 600, 2]], np.int32
    )
    # track 0: a and b share; 1: b; 2: c; 3: a and c share; 4: nobody
    rows = _race.standings(["a", "b", "c"], ending, steps, dt=0.04)
    # b, a and c have 2 wins and 3 laps each: the mean lap decides, 500, 530 and 586.67
    assert [(r["place"], r["driver"], r["wins"], r["shared_wins"]) for r in rows] == [
        (1, "a", 2, 2),
        (2, "b", 2, 1),
        (3, "c", 2, 1),
    ]
    a, b, c = rows
    assert a["completed"] == b["completed"] == c["completed"] == 3
    assert a["lap_steps_mean"] == 500
    assert a["lap_time_mean"] == pytest.approx(20.0)
    assert b["lap_steps_mean"] == pytest.approx((500 + 390 + 700) / 3)
    assert (a["places"], b["places"], c["places"]) == ([2, 1, 0], [2, 1, 0], [2, 0, 1])
    assert a["lap_steps_best"] == 400
    assert [r["common_lap_steps_mean"] for r in rows] == [500, 500, 510]  # track 0 alone
    assert c["endings"] == {
        "crossing border": 1,
        "wrong direction": 0,
        "too slow": 0,
        "time limit": 1,
    }
    assert a["endings"]["too slow"] == 1


def test_equal_rows_share_the_place_and_no_lap_is_no_win():
    ending = np.array([[1, 2], [1, 2], [2, 2], [2, 2]])
    steps = np.array([[5, 1], [5, 1], [1, 1], [1, 1]])
    rows = _race.standings(list("wxyz"), ending, steps, dt=1.0)
    assert [(r["place"], r["wins"]) for r in rows] == [(1, 1), (1, 1), (3, 0), (3, 0)]
    assert rows[2]["lap_steps_mean"] is None


# driving ------------------------------------------------------------------------------------------


def test_fast_beats_slow_and_the_crash_is_told(tmp_path, capsys):
    out, told = tmp_path / "race.gif", tmp_path / "race.json"
    names = ["slow", "crash", "fast", "brake"]
    argv = [f"race_pilots:{name}" for name in names]
    argv += ["--tracks", "3", "--seed", "7", "--no-obstacles", "--size", "200"]
    assert race.main([*argv, "--out", str(out), "--json", str(told)]) == 0
    content = json.loads(told.read_text())
    table = {row["driver"]: row for row in content["standings"]}
    assert [row["driver"] for row in content["standings"]][:2] == ["fast", "slow"]
    assert (table["fast"]["wins"], table["slow"]["wins"]) == (3, 0)
    assert table["slow"]["completed"] == 3
    assert table["crash"]["endings"]["crossing border"] == 3
    assert table["brake"]["endings"]["too slow"] == 3
    # a lap of 5.6 or more at 0.25 and at 0.2 takes at least so many steps of 0.04
    assert table["fast"]["lap_steps_mean"] > 5.6 / 0.25 / 0.04
    assert table["slow"]["lap_steps_mean"] > 5.6 / 0.2 / 0.04
    laps = {lap["driver"]: lap for lap in content["laps"]}
    assert laps["crash"]["ending"] == ["crossing border"] * 3
    assert content["obstacles"] is False
    printed = capsys.readouterr().out
    assert "crash did not arrive: 3 crossing border" in printed
    assert "no obstacles" in printed
    with Image.open(out) as picture:
        assert picture.size == (200, 200)
        assert picture.n_frames >= laps["slow"]["steps"][0] // 4
    # nothing is overwritten without being asked
    before = out.read_bytes()
    assert race.main([*argv, "--out", str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert out.read_bytes() == before


def pilot(speed, obs):
    """Steer to the longest ray, at most so fast; obs (*batch, 5)."""
    direction, longest, v = obs[..., 0], obs[..., 2], obs[..., 4]
    change = (jnp.clip(2 * longest, 0.12, speed) - v) / 0.004
    most = jnp.minimum(np.pi / 6, 1.741 * 0.04 / jnp.maximum(v, 1e-3))
    return jnp.clip(jnp.stack([change, -direction / most], axis=-1), -1, 1)


def test_one_program_is_the_single_drives(line, tmp_path):
    """Policies of different agents, widths, normalisers and observations, twice the same file."""
    files = [
        save(tmp_path / "a" / "policy.msgpack", "ppo"),
        save(tmp_path / "b" / "policies" / "seed_2.msgpack", "sac", width=24),
        save(tmp_path / "c" / "policy.msgpack", "ppo", width=32, observation="lidar"),
    ]
    sources = [str(files[0].parent), str(files[1]), str(files[2]), str(files[0].parent)]
    drivers = _race.read_drivers([*sources[:2], "race_pilots:fast", *sources[2:]], [])
    assert [d.label for d in drivers] == ["a", "b seed_2", "fast", "c", "a (2)"]
    drivers.append(_race.Driver("pilot", "", pilot, jnp.float32(0.25)))
    params, start = line
    result = _race.race(drivers, params, start, shown=1)
    np.testing.assert_array_equal(result.ending[0], result.ending[4])
    np.testing.assert_array_equal(result.steps[0], result.steps[4])
    np.testing.assert_array_equal(result.ending[5], [Ending.COMPLETED] * 3)
    # the function of the host is that pilot too, apart from the speed in its steering limit
    np.testing.assert_allclose(result.steps[2], result.steps[5], rtol=0.03)
    ends = result.shown.position[-1]
    assert len({ends[d].tobytes() for d in (0, 1, 3, 5)}) == 4
    one = jax.tree.map(lambda x: x[1], start)
    for d in (1, 3, 5):
        driver = drivers[d]

        class FromTheStart(MicroRacer):
            """The same environment, which starts where the race did."""

            def reset_env(self, key, params):
                return self.observe(key, one, None, params), one

        states = pictures.drive(
            FromTheStart(observation=driver.observation),
            params,
            lambda obs, driver=driver: driver.act(driver.policy, obs),
            jax.random.key(0),
        )
        assert result.ending[d, 1] == states.ending[-1]
        assert result.steps[d, 1] == states.time[-1]
        shown = result.shown.position[: len(states.time), d]
        np.testing.assert_allclose(shown, states.position, atol=1e-4)
    # the record ends with the last car, the others rest where they ended
    assert len(result.shown.time) == result.steps[:, 1].max() + 1
    np.testing.assert_array_equal(result.shown.time[-1], result.steps[:, 1])


def test_the_start_is_that_of_the_environment_and_the_same_for_all(line):
    params, start = line
    np.testing.assert_array_equal(start.position, params.tracks.start)
    speed = np.hypot(*np.asarray(start.velocity).T)
    assert ((speed >= 0.07 - 1e-6) & (speed < 0.5)).all()
    assert len(np.unique(speed)) > 1
    again = _race.line_up({"obstacles": False}, {}, 3, 7)[1]
    np.testing.assert_array_equal(again.velocity, start.velocity)


# wrong input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["nobody to race"]),
        (["nowhere"], ["nowhere does not exist", "run folder"]),
        (["race_missing:fast"], ["race_missing:fast", "cannot be imported", "ModuleNotFoundError"]),
        (["race_broken:fast"], ["race_broken:fast", "ZeroDivisionError"]),
        (["race_pilots:none"], ["race_pilots has no none"]),
        (["race_pilots:number"], ["race_pilots:number", "not a function"]),
        (["race_pilots:nan"], ["race_pilots:nan", "[nan, 0.0]", "finite"]),
        (["race_pilots:three"], ["race_pilots:three", "two numbers"]),
        (["race_pilots:word"], ["race_pilots:word", "'left'", "two numbers"]),
        (["race_pilots:fast", "--tracks", "0"], ["tracks = 0", "integer >= 1"]),
        (["race_pilots:fast", "--tracks", "20000"], ["tracks = 20000", "10000"]),
        (["race_pilots:fast", "--seed", "-1"], ["seed = -1"]),
        (["race_pilots:fast", "--show-track", "100"], ["show_track = 100", "below tracks = 100"]),
        (["race_pilots:fast", "--out", "race.bmp"], ["race.bmp", ".gif or .mp4"]),
        (["race_pilots:fast", "--out", "no/where.gif"], ["no folder no"]),
        (["race_pilots:fast", "--size", "20"], ["size = 20"]),
        (["race_pilots:fast", "--labels", "a", "b"], ["labels: 2 for 1 drivers"]),
        (
            ["race_pilots:fast", "race_pilots:slow", "--labels", "a", "a"],
            ["'a' stands for several"],
        ),
    ],
)
def test_wrong_input_is_one_sentence(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert race.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


def test_a_policy_of_another_environment_is_refused(tmp_path, capsys):
    path = save(tmp_path / "pole" / "policy.msgpack", "ppo", env="CartPole-v1")
    assert race.main([str(path)]) == 2
    assert "was trained on CartPole-v1: only policies of MicroRacer-v0" in capsys.readouterr().err


def test_a_function_that_fails_on_the_way_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert race.main(["race_pilots:late", "--tracks", "3", "--no-obstacles", "--no-animate"]) == 2
    error = capsys.readouterr().err
    assert "race_pilots:late raised ZeroDivisionError on track" in error
    assert error.count("\n") == 1


def test_the_board_orders_cars_and_colours_differ(line):
    params, start = line
    first = jax.tree.map(lambda x: np.asarray(x[0]), start)
    cars = [
        first.replace(angle=np.float32(-1.0), time=np.int32(30)),
        first.replace(ending=np.int32(Ending.TOO_SLOW), time=np.int32(9)),
        first.replace(ending=np.int32(Ending.COMPLETED), time=np.int32(25)),
        first.replace(angle=np.float32(-2.0), time=np.int32(30)),
        first.replace(ending=np.int32(Ending.COMPLETED), time=np.int32(20)),
    ]
    assert pictures.race_order(cars, 1000) == [4, 2, 3, 0, 1]
    assert pictures.race_order(cars, 30) == [4, 2, 3, 0, 1]  # the limit: behind those that drive
    for num in (2, 8, 20):
        assert len(set(pictures.race_colours(num))) == num
    states = jax.tree.map(lambda *x: np.stack(x)[None], *cars)
    frame = pictures.render_race(states, list("abcde"), params, size=400)[0]
    for colour in pictures.race_colours(5):  # its square on the board
        assert (np.abs(frame.astype(int) - colour).sum(axis=-1) < 12).sum() >= 20
    with pytest.raises(ValueError, match="one for each of 5 cars"):
        pictures.render_race(states, ["a"], params)
