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


@pytest.mark.filterwarnings("ignore")  # of pygame and of SWIG
def test_frames_are_gymnasiums():
    pytest.importorskip("Box2D", reason="Box2D is not installed (pip install gymnasium[box2d])")
    import gymnasium

    from benchmarks.lunar_lander_parity import draws

    theirs = gymnasium.make("LunarLander-v3", render_mode="rgb_array")
    theirs.reset(seed=3)
    terrain = lunar_lander.terrain(jnp.asarray(draws(3)[0], jnp.float32), params)
    first = lunar_lander.start(terrain, jnp.zeros(2), jnp.zeros(2, jnp.int32), params)
    shown = 0
    for t in range(60):  # nothing fires: the flames differ
        theirs.step(0)
        if t % 20 < 19:
            continue
        bare = theirs.unwrapped
        world, legs = first.world, bare.legs
        hull = world.hull._replace(
            x=bare.lander.worldCenter[0], y=bare.lander.worldCenter[1], a=bare.lander.angle
        )
        leg = world.leg._replace(
            x=np.asarray([leg.worldCenter[0] for leg in legs]),
            y=np.asarray([leg.worldCenter[1] for leg in legs]),
            a=np.asarray([leg.angle for leg in legs]),
        )
        ours = env.render(first.replace(world=world._replace(hull=hull, leg=leg)), params)
        theirs_frame = np.asarray(theirs.render())
        # the lander covers 0.6 % of the frame: all of it, not only most of the sky, must agree
        apart = np.abs(theirs_frame.astype(int) - ours).max(axis=-1) > 100
        assert apart.mean() < 0.003
        purple = [(np.abs(f.astype(int) - render.BODY).sum(-1) < 90) for f in (theirs_frame, ours)]
        overlap = (purple[0] & purple[1]).sum() / (purple[0] | purple[1]).sum()
        assert overlap > 0.8
        shown += 1
    assert shown == 3


def test_a_colour_of_later_frames_is_kept(tmp_path):
    frames = [np.zeros((60, 90, 3), np.uint8) for _ in range(30)]
    for frame in frames[10:]:
        frame[20:40, 20:40] = render.FLAME
    render.save_animation(frames, tmp_path / "flame.gif")
    with Image.open(tmp_path / "flame.gif") as image:
        image.seek(image.n_frames - 1)
        shown = np.asarray(image.convert("RGB"))[30, 30]
    assert np.abs(shown.astype(int) - render.FLAME).max() < 10


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
