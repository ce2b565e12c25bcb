"""MicroRacer for the scripts: evaluated once on each unseen track, and drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from train import _animation, _envs, _report


@pytest.fixture(scope="module")
def setup():
    return _envs.make_env("MicroRacer-v0", num_tracks=3)


def straight_on(policy, obs):
    """Full throttle, and steer a share `policy` () toward the longest ray."""
    return jnp.stack([jnp.ones(()), -policy * obs[0] / 0.1])


def test_evaluation_is_on_as_many_different_unseen_tracks(setup):
    params, axes = setup.draw_params(0, 3)
    unseen = np.asarray(params.tracks.midline)[:, 0]
    assert unseen.shape[0] == 3
    together = np.concatenate([unseen, np.asarray(setup.params.tracks.midline)])
    assert len({m.tobytes() for m in together}) == 3 + 3
    assert axes.tracks == 0
    assert axes.dt is None  # the physics is shared


def test_evaluation_says_how_each_episode_ended(setup):
    rows = _report.evaluate(setup, straight_on, jnp.array([0.0, 1.0]), 0, 3)
    assert rows["success"].shape == (2, 3)
    assert not rows["success"][0].any()  # straight on ends at the border
    stats = _report.aggregate(rows, 0, setup.endings)
    assert stats["endings"] == {"crossing border": 3}
    assert (stats["success_rate"], stats["success_length_mean"]) == (0.0, None)
    # the failure's reward is -3, and a step's is what was driven
    assert (rows["return"][0] < -2).all()
    # the car that steers comes further
    assert rows["length"][1].mean() > rows["length"][0].mean()


def test_the_animation_shows_the_episode_to_its_end(setup, tmp_path):
    params, _ = setup.draw_params(0, 3)
    first = params.replace(tracks=jax.tree.map(lambda x: x[0], params.tracks))

    def act(obs):
        return straight_on(0.0, obs)

    shown = _animation.micro_racer(act, setup.env, first, jax.random.key(5), tmp_path / "a.gif")
    assert shown.startswith("one episode, crossing border after ")
    num_steps = int(shown.split()[-2])
    with Image.open(tmp_path / "a.gif") as picture:
        # every fourth state and the last one, then a rest of a second
        assert getattr(picture, "n_frames", 1) >= num_steps // 4 + 1
