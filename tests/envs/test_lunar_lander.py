"""LunarLander: numbers by hand, both ends, batches, bad input."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import LanderEnding, LunarLander, LunarLanderContinuous, lunar_lander
from jaxrl.envs._lander_start import at_creation

KEY = jax.random.key(0)
env, continuous_env = LunarLander(), LunarLanderContinuous()
params = env.default_params
FLAT = jnp.full(11, 3.3)
WIND_INDEX = jnp.zeros(2, jnp.int32)
NO_NOISE = jnp.zeros(2)
MASS, INERTIA, CENTRE = 4.816666603, 0.7838807386, 0.1013071910


def upright(**changes):
    """A state with the hull's origin at (10, 13.33), at rest."""
    return lunar_lander.start(FLAT, jnp.zeros(2), WIND_INDEX, params).replace(
        world=at_creation()._replace(**changes)
    )


NUM = 64
GRAVITY = jnp.full(NUM, -10.0)


@pytest.fixture(scope="module")
def step():
    """Continuous steps of NUM landers: states, actions (n, 2); optionally gravity (n,)."""
    axes = jax.tree.map(lambda _: None, params).replace(gravity=0)
    run = jax.jit(jax.vmap(continuous_env.step_with, in_axes=(0, 0, 0, axes)))
    still = np.zeros((NUM, 2), np.float32)

    def call(state, action=still, noise=still, gravity=GRAVITY):
        state = jax.tree.map(np.asarray, state)
        action, noise = np.asarray(action, np.float32), np.asarray(noise, np.float32)
        return jax.device_get(run(state, action, noise, params.replace(gravity=gravity)))

    return call


@pytest.fixture(scope="module")
def flown(step):
    """Landers under random throttles for 80 steps: the states before each step and the last."""
    keys = jax.random.split(KEY, NUM)
    _, state = jax.jit(jax.vmap(continuous_env.reset_env, in_axes=(0, None)))(keys, params)
    rng = np.random.default_rng(0)
    states = [jax.device_get(state)]
    for _ in range(80):
        _, state, *_ = step(state, rng.uniform(-1, 1, (NUM, 2)), rng.uniform(-1, 1, (NUM, 2)))
        states.append(state)
    return states


def test_main_engine_by_hand():
    world = at_creation()
    v = lunar_lander.fire(world, jnp.float32(1), jnp.float32(0), NO_NOISE, params)
    # nozzle 4/30 m below the origin; impulse 13 * 4/30 = 1.7333 N s upward, through the middle
    assert v == pytest.approx((0.0, 13 * 4 / 30 / MASS, 0.0), abs=1e-6)
    half = lunar_lander.fire(world, jnp.float32(0.5), jnp.float32(0), NO_NOISE, params)
    assert half.y == pytest.approx(13 * 4 / 30 / MASS / 2)
    # dispersion (1, 0) / 30 m: the nozzle is 6/30 m away
    noisy = lunar_lander.fire(
        world, jnp.float32(1), jnp.float32(0), jnp.asarray([1 / 30, 0.0]), params
    )
    assert noisy.y == pytest.approx(13 * 6 / 30 / MASS)


def test_side_engine_by_hand():
    v = lunar_lander.fire(at_creation(), jnp.float32(0), jnp.float32(1), NO_NOISE, params)
    # offset (-0.4, 0) m, impulse 0.24 N s to the right, 14/30 m above the origin
    assert v.x == pytest.approx(0.24 / MASS)
    assert v.y == pytest.approx(0.0, abs=1e-7)
    assert v.w == pytest.approx(-(14 / 30 - CENTRE) * 0.24 / INERTIA, rel=1e-5)
    # lying on its side (a quarter turn left: tip = (1, 0)) the arm is 17/30 m, not 14/30
    world = at_creation()
    world = world._replace(hull=world.hull._replace(a=jnp.float32(np.pi / 2)))
    v = lunar_lander.fire(world, jnp.float32(0), jnp.float32(1), NO_NOISE, params)
    # offset (0, -0.4): impulse (0, 0.24) at (-17/30, -0.4) from the origin, which lies to the right
    # of the centre of mass
    assert v.w == pytest.approx((CENTRE - 17 / 30) * 0.24 / INERTIA, rel=1e-5)


@pytest.mark.parametrize(
    ("action", "main", "side"),
    [([0.0, 0.5], 0, 0), ([0.1, 0.6], 0.55, 0.6), ([2.0, -3.0], 1, -1), ([-1.0, 0.49], 0, 0)],
)
def test_throttles_by_hand(action, main, side):
    ours = lunar_lander.throttles(jnp.asarray(action), continuous=True)
    assert ours == pytest.approx((main, side), abs=1e-6)


def test_discrete_throttles():
    ours = [lunar_lander.throttles(a, continuous=False) for a in range(4)]
    assert ours == [(0, 0), (0, -1), (1, 0), (0, 1)]


def test_wind_by_hand():
    windy = params.replace(enable_wind=True)
    still = jnp.zeros(2, bool)
    index = jnp.asarray([10, -25], jnp.int32)
    force, torque, after = lunar_lander.wind(index, still, windy)
    # tanh(sin(0.2) + sin(0.1 pi)) = tanh(0.198669 + 0.309017) = 0.468141
    assert force == pytest.approx(15 * 0.468141, rel=1e-5)
    assert torque == pytest.approx(1.5 * np.tanh(np.sin(-0.5) + np.sin(-0.25 * np.pi)), rel=1e-5)
    np.testing.assert_array_equal(after, [11, -24])
    # a great index: sin(199.94) + sin(0.97 pi), in double precision
    far = jnp.asarray([9997, 9997], jnp.int32)
    expected = 15 * np.tanh(np.sin(0.02 * 9997) + np.sin(np.pi * 0.01 * 9997))
    assert lunar_lander.wind(far, still, windy)[0] == pytest.approx(expected, abs=1e-5)
    for touching in ([True, False], [False, True]):
        force, torque, after = lunar_lander.wind(index, jnp.asarray(touching), windy)
        assert (force, torque) == (0, 0)
        np.testing.assert_array_equal(after, index)
    assert lunar_lander.wind(index, still, params)[0] == 0


def test_shaping_by_hand():
    obs = jnp.asarray([0.3, 0.4, 0.6, -0.8, -0.5, 7.0, 1.0, 0.0])
    # -100 * 0.5 - 100 * 1 - 100 * 0.5 + 10
    assert lunar_lander.shaping_of(obs) == pytest.approx(-190.0)


def test_observation_by_hand():
    state = upright()
    world = state.world
    # the origin at (11, 13.3333 - 2) m: the centre of mass is 0.1013 m above
    world = world._replace(
        hull=world.hull._replace(x=jnp.float32(11), y=jnp.float32(34 / 3 + CENTRE)),
        hull_velocity=world.hull_velocity._replace(
            x=jnp.float32(2), y=jnp.float32(-3), w=jnp.float32(0.5)
        ),
        flag=jnp.asarray([True, False]),
    )
    obs = env.observe(KEY, state.replace(world=world), None, params)
    y = (34 / 3 - (10 / 3 + 0.6)) / (20 / 3)
    np.testing.assert_allclose(obs, [0.1, y, 0.4, -0.4, 0, 0.2, 1, 0], atol=1e-6)


def test_terrain_by_hand():
    # the last draw is the left neighbour of the first point and the right one of the last
    ours = lunar_lander.terrain(jnp.zeros(12).at[11].set(0.75), params)
    expected = np.zeros(11)
    expected[[0, 10]] = 0.33 * 5.0
    expected[[2, 8]] = 0.33 * 10 / 3  # the pad's first and last height
    expected[[3, 7]] = 0.33 * 20 / 3
    expected[4:7] = 3.3
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    flat = lunar_lander.terrain(jax.random.uniform(KEY, (12,)), params.replace(terrain_roughness=0))
    np.testing.assert_allclose(flat, FLAT, rtol=1e-5)


def test_a_push_moves_the_lander_at_the_start():
    # all bodies together weigh 4.8167 + 2 * 0.07111 kg; the push lasts one step
    state = lunar_lander.start(FLAT, jnp.asarray([0.0, 500.0]), WIND_INDEX, params)
    expected = 500 * 0.02 / (MASS + 2 * 0.0711111) - 0.2
    assert state.world.hull_velocity.y == pytest.approx(expected, abs=1e-3)
    np.testing.assert_allclose(state.world.leg_velocity.y, expected, atol=1e-3)


@pytest.mark.slow
def test_free_fall_by_its_own_gravity(step):
    """A batch over parameters; eleven steps, the reset's own included."""
    gravity = jnp.linspace(-12.0, -1.0, NUM)
    axes = jax.tree.map(lambda _: None, params).replace(gravity=0)
    begin = jax.vmap(lunar_lander.start, in_axes=(None, None, None, axes))
    state = begin(FLAT, jnp.zeros(2), WIND_INDEX, params.replace(gravity=gravity))
    for _ in range(10):
        _, state, *_ = step(state, gravity=gravity)
    # the legs swing alike to both sides, which moves the hull, 1/68 heavier, a little
    np.testing.assert_allclose(state.world.hull_velocity.y, 0.22 * gravity, atol=0.03)
    np.testing.assert_allclose(state.world.hull_velocity.x, 0.0, atol=1e-5)
    np.testing.assert_allclose(state.world.hull.a, 0.0, atol=1e-4)


def test_a_batch_is_its_members(flown, step):
    """Whatever is gathered and scattered between lanes, the result is that of each lane alone."""
    state = flown[70]
    near = np.asarray(state.world.pairs.edge).max(axis=(1, 2)) >= 0
    assert 3 <= near.sum() <= 60  # some touch the ground or nearly so, some fly
    together = step(state)
    order = np.random.default_rng(1).permutation(NUM)
    again = step(jax.tree.map(lambda a: a[order], state))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a[order], b, rtol=0, atol=1e-5)


def test_nan_action_stays_where_it_is(flown, step):
    action = np.full((NUM, 2), 0.7)
    action[5] = 0.0
    clean = step(flown[60], action)
    action[5] = np.nan
    dirty = step(flown[60], action)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)  # and of NaN itself nothing fires


def test_crash_and_leaving(flown, step):
    endings, rewards, obs = [], [], []
    state = flown[-1]
    action = np.zeros((NUM, 2))
    action[::4] = [1.0, 1.0]
    for _ in range(150):
        o, state, reward, terminated, info = step(state, action)
        endings.append(info["ending"])
        rewards.append(reward)
        obs.append(o)
        np.testing.assert_array_equal(terminated, info["ending"] != LanderEnding.NONE)
    endings, rewards, obs = (np.asarray(a) for a in (endings, rewards, obs))
    for ending in (LanderEnding.CRASHED, LanderEnding.OUT_OF_VIEW):
        assert (endings == ending).any()
        np.testing.assert_array_equal(rewards[endings == ending], -100.0)
    assert (np.abs(obs[..., 0])[endings == LanderEnding.OUT_OF_VIEW] >= 1).all()


@pytest.mark.parametrize(
    ("environment", "action", "message"),
    [
        (env, jnp.zeros(2), r"action of shape \(2,\) and type float32 must be one integer in 0..3"),
        (env, 1.0, r"action of shape \(\) and type float64 must be one integer"),
        (env, 4, r"action = 4 must lie in 0..3"),
        (continuous_env, 2, r"action of shape \(\) and type int64 must be two real numbers"),
        (continuous_env, jnp.zeros(3), r"action of shape \(3,\) .* must be two real numbers"),
        (continuous_env, jnp.asarray([0.0, jnp.nan]), r"action = \[ ?0. nan\] must be finite"),
    ],
)
def test_bad_actions_are_refused(environment, action, message):
    state = upright()
    with pytest.raises(ValueError, match=message):
        environment.step(KEY, state, action, params)
    if "lie in" not in message and "finite" not in message:
        with pytest.raises(ValueError, match=message[:20]):
            jax.vmap(environment.step_with, in_axes=(None, 0, None, None))(
                state, jnp.stack([jnp.asarray(action)] * 2), NO_NOISE, params
            )


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r'solver = "?.*must be "exact" or "fast"'):
        LunarLander(solver="quick")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"continuous = 1 must be True or False"):
        LunarLander(continuous=1)  # pyright: ignore[reportArgumentType]


def test_ids():
    assert gymnax.make("LunarLander-v3")[0].name == "LunarLander-v3"
    made, _ = gymnax.make("LunarLanderContinuous-v3", solver="fast")
    assert (made.name, made.num_actions) == ("LunarLanderContinuous-v3", 2)
