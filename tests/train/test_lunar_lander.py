"""LunarLander learnt here: it lands, its file flies in Gymnasium, and Gymnasium's flies here."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxrl.policy import read_policy
from train import _envs, td3
from train import ppo as script

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of pygame and of SWIG

SEEDS = ["--num-seeds", "2", "--eval-episodes", "50", "--no-animate", "--no-progress"]
ARGV = ["--env", "LunarLander-v3", "--total-steps", "401408", *SEEDS]  # 98 updates
TD3_ARGV = ["--env", "LunarLanderContinuous-v3", "--total-steps", "160000", *SEEDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder of two seeds of the preset, at two fifths of its steps."""
    runs = tmp_path_factory.mktemp("runs")
    assert script.main([*ARGV, "--runs-dir", str(runs), "--name", "lander"]) == 0
    return runs / "lander"


def paired(seeds, theirs, ours):
    """Mean return in Gymnasium, and how many standard errors ours is away from it."""
    difference = (ours["return"] - theirs["return"]).mean(0)
    error = max(difference.std() / np.sqrt(len(seeds)), 0.01 * abs(theirs["return"].mean()))
    return theirs["return"].mean(), difference.mean() / error


def test_ppo_learns_to_land(folder):
    summary = json.loads((folder / "summary.json").read_text())
    returns = [seed["return_mean"] for seed in summary["per_seed"]]
    # a random policy earns -185, one that only hovers about 0, one that lands 200 and more
    assert np.mean(returns) > 150, returns
    assert max(returns) > 200, returns


@pytest.mark.timeout(600)
def test_td3_learns_to_land(tmp_path):
    assert td3.main([*TD3_ARGV, "--runs-dir", str(tmp_path), "--name", "lander"]) == 0
    summary = json.loads((tmp_path / "lander" / "summary.json").read_text())
    returns = [seed["return_mean"] for seed in summary["per_seed"]]
    # where it hovers to the time limit, as with rewards of three steps, it earns about 0
    assert np.mean(returns) > 150, returns


@pytest.mark.timeout(600)
def test_its_file_flies_in_gymnasium_as_it_does_here(folder):
    pytest.importorskip("Box2D", reason="Box2D is not installed (pip install gymnasium[box2d])")
    from benchmarks.lunar_lander_transfer import fly_saved

    seeds = np.arange(600_000, 600_060)
    theirs, ours = fly_saved([folder / "policy.msgpack"], seeds)
    mean, errors = paired(seeds, theirs, ours)
    assert mean > 150
    assert abs(errors) < 3


@pytest.mark.timeout(600)
def test_what_stable_baselines3_learnt_in_gymnasium_flies_here():
    pytest.importorskip("Box2D", reason="Box2D is not installed (pip install gymnasium[box2d])")
    from benchmarks.lunar_lander_transfer import fly_sb3

    seeds = np.arange(700_000, 700_060)
    theirs, ours = fly_sb3(seeds)
    mean, errors = paired(seeds, theirs, ours)
    assert mean > 150
    assert abs(errors) < 3


def test_the_animation_shows_the_landing(folder, tmp_path):
    setup = _envs.make_env("LunarLander-v3")
    assert setup.animate is not None
    saved = read_policy(folder)
    act = saved.act_fn()
    shown = setup.animate(lambda obs: act(saved.policy, obs), 0, 1, tmp_path / "a.gif")
    words, num_steps = shown.rsplit(" ", 2)[0], int(shown.split()[-2])
    assert words in [
        f"one episode, {end} after" for end in ("landed", "crashed", "out of view", "time limit")
    ]
    with Image.open(tmp_path / "a.gif") as picture:
        assert 1 < getattr(picture, "n_frames", 1) <= num_steps // 2 + 2 + 25
