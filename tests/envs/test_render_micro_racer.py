"""Pictures of MicroRacer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrl.envs import Ending, MicroRacer
from jaxrl.envs.render import micro_racer as render

env = MicroRacer(num_tracks=4)


@pytest.fixture(scope="module")
def episode():
    """Full throttle straight ahead: it ends at the border."""
    params = env.default_params
    return params, render.drive(env, params, lambda obs: jnp.asarray([1.0, 0.0]), jax.random.key(0))


def test_drive_keeps_the_first_and_the_last_state(episode):
    _, states = episode
    assert states.ending[-1] == Ending.CROSSING_BORDER
    assert (states.ending[:-1] == Ending.NONE).all()
    np.testing.assert_array_equal(states.time, np.arange(len(states.time)))


def test_frame_shows_the_car_and_the_road_where_they_are(episode):
    params, states = episode
    state = jax.tree.map(lambda leaf: leaf[3], states)
    frame = env.render(state, params, size=400)
    assert (frame.shape, frame.dtype) == ((400, 400, 3), np.uint8)
    picture = render.TrackPicture(params.tracks, int(state.track), 400)
    row, column = picture.pixel(state.position)
    near = frame[row - 3 : row + 4, column - 3 : column + 4].reshape(-1, 3).astype(int)
    assert (np.abs(near - render.CAR).sum(axis=1) < 90).any()
    # the other side of the ring: road, and grass beyond; the middle of the lens: the car
    across = np.asarray(params.tracks.midline[int(state.track), 60])
    row, column = picture.pixel(across)
    assert np.abs(frame[row, column].astype(int) - render.ROAD).sum() < 40
    np.testing.assert_array_equal(frame[200, 2], render.GRASS)
    lens = frame[185:216, 185:216].reshape(-1, 3).astype(int)
    assert (np.abs(lens - render.CAR).sum(axis=1) < 30).any()


def test_animations_are_written(episode, tmp_path):
    params, states = episode
    frames = render.render_episode(states, params, size=96, every=5)
    assert len(frames) == len({*range(0, len(states.time), 5), len(states.time) - 1})
    render.save_animation(frames, tmp_path / "lap.gif")
    with Image.open(tmp_path / "lap.gif") as image:
        assert image.size == (96, 96)
        assert image.n_frames > 1
    with pytest.raises(ValueError, match=r"lap.bmp must end in .gif or .mp4"):
        render.save_animation(frames, tmp_path / "lap.bmp")
    with pytest.raises(ValueError, match="no frames"):
        render.save_animation([], tmp_path / "lap.gif")
    with pytest.raises(ValueError, match="size = 9"):
        env.render(jax.tree.map(lambda leaf: leaf[0], states), params, size=9)
