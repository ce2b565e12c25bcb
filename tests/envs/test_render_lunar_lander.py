"""LunarLander's pictures: what is drawn where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrl.envs import LunarLander, lunar_lander
from jaxrl.envs.render import lunar_lander as render

env = LunarLander()
params = env.default_params


@pytest.fixture(scope="module")
def state():
    u = jax.random.uniform(jax.random.key(0), (12,))
    terrain = lunar_lander.terrain(u, params)
    state = lunar_lander.start(terrain, jnp.zeros(2), jnp.zeros(2, jnp.int32), params)
    world = state.world  # lowered by 6 m, into the picture
    world = world._replace(
        hull=world.hull._replace(y=world.hull.y - 6), leg=world.leg._replace(y=world.leg.y - 6)
    )
    return state.replace(world=world)


def near(frame, x, y, colour, reach=2):
    row, column = render.pixel(x, y)
    patch = frame[row - reach : row + reach + 1, column - reach : column + reach + 1]
    return (np.abs(patch.reshape(-1, 3).astype(int) - colour).sum(axis=1) < 40).any()


def test_a_frame_shows_lander_ground_and_flags(state):
    frame = env.render(state, params)
    assert (frame.shape, frame.dtype) == ((400, 600, 3), np.uint8)
    assert near(frame, float(state.world.hull.x), float(state.world.hull.y), render.BODY)
    for j in (0, 1):
        assert near(frame, float(state.world.leg.x[j]), float(state.world.leg.y[j]), render.BODY)
    assert near(frame, 10.0, 3.2, render.MOON)  # the pad lies at 3.3 m
    assert near(frame, 10.0, 3.5, render.SKY)
    for i in (1, 4, 9):
        height = float(state.terrain[i])
        assert near(frame, 2.0 * i, height - 0.2, render.MOON)
        assert near(frame, 2.0 * i + 0.1, height + 0.6, render.SKY)
    for x in (8.0, 12.0):
        assert near(frame, x + 0.3, 10 / 3 + 45 / 30, render.FLAG)
    np.testing.assert_array_equal(frame[5, 5], render.SKY)


def test_flames_are_where_the_engines_fire(state):
    x, y = float(state.world.hull.x), float(state.world.hull.y)
    main = env.render(state.replace(throttle=jnp.asarray([1.0, 0.0])), params)
    assert near(main, x, y - 0.1 - 0.33 - 0.75, render.FLAME)
    none = env.render(state, params)
    assert not near(none, x, y - 0.1 - 0.33 - 0.75, render.FLAME)
    pushes_right = env.render(state.replace(throttle=jnp.asarray([0.0, 1.0])), params)
    assert near(pushes_right, x - 0.95, y + 0.37, render.FLAME)
    assert not near(pushes_right, x + 0.95, y + 0.37, render.FLAME)


def test_animations_are_written(state, tmp_path):
    states = jax.tree.map(lambda a: jnp.stack([a] * 7), state)
    states = states.replace(throttle=jnp.linspace(0, 1, 14).reshape(7, 2))
    frames = render.render_episode(states, params, width=90)
    assert len(frames) == 4  # 0, 2, 4, 6
    render.save_animation(frames, tmp_path / "landing.gif")
    with Image.open(tmp_path / "landing.gif") as image:
        assert image.size == (90, 60)
        assert image.n_frames > 1
    with pytest.raises(ValueError, match="width = 9 must be at least 60"):
        env.render(state, params, width=9)
