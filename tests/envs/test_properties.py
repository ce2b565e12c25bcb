"""Whatever comes in: no NaN leaves an environment, nothing leaves its space, no member disturbs
another.

The parameters are drawn from `PARAMS`, for each member of a batch its own; actions are anything.
Each environment is compiled once.
"""

from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

import jaxrl.envs  # noqa: F401  (registers)

NUM_ENVS = 32  # enough for MicroRacer's lidar to gather rays across cars
NUM_STEPS = 24
REPEAT = 4  # of each action: so far a lander can get


def real(low: float, high: float):
    """Half of what hypothesis chooses is an end."""
    return st.one_of(st.floats(low, high), st.sampled_from([low, high]))


LANDER = {
    "max_steps_in_episode": st.integers(1, 100),
    "gravity": real(-12.0, 0.0),
    "main_engine_power": real(0.0, 26.0),
    "side_engine_power": real(0.0, 1.25),
    "dispersion": real(0.0, 2.0),
    "enable_wind": st.booleans(),
    "wind_power": real(0.0, 20.0),
    "turbulence_power": real(0.0, 2.0),
    "terrain_roughness": real(0.0, 1.0),
    "initial_force": real(0.0, 1100.0),
}
PARAMS = {
    "MicroRacer-v0": {
        "max_steps_in_episode": st.integers(1, 100),
        "dt": real(0.0, 1.0),
        "max_acceleration": real(0.0, 10.0),
        "max_turn": real(0.0, 4.0),
        "grip": real(0.0, 100.0),
        "turn_limit": st.booleans(),
        "min_speed": real(0.0, 1.0),
        "low_speed_termination": st.booleans(),
        "failure_reward": real(-100.0, 100.0),
        "time_cost": real(0.0, 1.0),
        "initial_speed_min": real(0.0, 1.0),
        "initial_speed_max": real(0.0, 1.0),
        "action_limit": real(0.0, 2.0) | st.just(np.inf),
    },
    "MarsRover-v0": {
        "max_steps_in_episode": st.integers(1, 20),
        "misstep_prob": real(0.0, 1.0),
        "rewards": st.lists(real(-1e30, 1e30), min_size=7, max_size=7),
    },
    "LunarLander-v3": LANDER,
    "LunarLanderContinuous-v3": LANDER,
}
ROVER = {"length": 7, "start": "uniform", "terminal": (0,)}
CASES = [
    ("MicroRacer-v0", {"num_tracks": 3}),
    pytest.param(
        ("MicroRacer-v0", {"num_tracks": 2, "observation": "lidar", "obstacles": False}),
        marks=pytest.mark.slow,
    ),
    ("MarsRover-v0", ROVER),
    ("MarsRover-v0", ROVER | {"observation": "index"}),
    # twenty seconds to compile
    pytest.param(("LunarLander-v3", {}), marks=pytest.mark.slow),
    pytest.param(("LunarLanderContinuous-v3", {"solver": "fast"}), marks=pytest.mark.slow),
]
NUMBERS = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0]
STEERING = st.floats(-1.0, 1.0) | st.floats(width=32) | st.sampled_from(NUMBERS)
INT = st.integers(-(2**31), 2**31 - 1)
BUTTON = st.integers(0, 3) | INT | st.sampled_from([-(2**31), 2**31 - 1])


class Steps(NamedTuple):
    """What left the environment: (REPEAT * NUM_STEPS, NUM_ENVS, ...)."""

    obs: Any
    state: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: Any


class Made(NamedTuple):
    env: Any
    params: Any
    run: Any
    """run(seed, changes of params, actions, which are poisoned, with what) -> Steps, low, high"""


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request):
    env_id, arguments = request.param
    env, params = gymnax.make(env_id, **arguments)
    axes = jax.tree.map(lambda _: None, params).replace(**dict.fromkeys(PARAMS[env_id], 0))

    def bounds(params):
        space = env.observation_space(params)
        low, high = (space.low, space.high) if hasattr(space, "low") else (0, space.n - 1)
        return jnp.broadcast_to(low, space.shape), jnp.broadcast_to(high, space.shape)

    @jax.jit
    def run(seed, changes, actions, poisoned, poison):
        own = params.replace(**changes)
        key_reset, key_steps = jax.random.split(jax.random.key(seed))
        keys = jax.random.split(key_reset, NUM_ENVS)
        _, state = jax.vmap(env.reset, in_axes=(0, axes))(keys, own)

        def spoil(x):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return jnp.where(poisoned.reshape((-1,) + (1,) * (x.ndim - 1)), poison, x)

        def step(state, inputs):
            key, action = inputs
            keys = jax.random.split(key, NUM_ENVS)
            obs, state, *rest = jax.vmap(env.step, in_axes=(0, 0, 0, axes))(
                keys, state, action, own
            )
            return state, Steps(obs, state, *rest)

        keys = jax.random.split(key_steps, REPEAT * NUM_STEPS)
        inputs = (keys, jnp.repeat(actions, REPEAT, axis=0))
        _, steps = jax.lax.scan(step, jax.tree.map(spoil, state), inputs)
        return steps, *jax.vmap(bounds, in_axes=(axes,), axis_size=NUM_ENVS)(own)

    return Made(env, params, run)


def spread(values, shape, seed, dtype):
    """An array of some of few values: quick to draw and to shrink."""
    values = np.asarray(values, dtype)
    return values[np.random.default_rng(seed).integers(len(values), size=shape)]


def first(where, *arrays):
    """The first place, and what stands there."""
    place = tuple(np.argwhere(where)[0].tolist())
    return place, *(a[place] for a in arrays)


def drawn(made, data, seed):
    """Parameters of every member and actions, anything."""
    changes = {}
    for i, (name, strategy) in enumerate(PARAMS[made.env.name].items()):
        values = data.draw(st.lists(strategy, min_size=1, max_size=4), label=name)
        leaf = np.asarray(getattr(made.params, name))
        dtype = np.float32 if np.issubdtype(leaf.dtype, np.floating) else leaf.dtype
        changes[name] = spread(values, NUM_ENVS, [seed, i], dtype)
    space = made.env.action_space(made.params)
    strategy, dtype = (BUTTON, np.int32) if hasattr(space, "n") else (STEERING, np.float32)
    values = data.draw(st.lists(strategy, min_size=1, max_size=12), label="actions")
    shape = (NUM_STEPS, NUM_ENVS, *space.shape)
    return changes, spread(values, shape, [seed, 100], dtype)


SEEDS = st.integers(0, 2**32 - 1)
NOBODY = np.zeros(NUM_ENVS, bool)


@given(data=st.data(), seed=SEEDS)
def test_nothing_but_numbers_in_bounds_leaves(made, data, seed):
    changes, actions = drawn(made, data, seed)
    steps, low, high = jax.device_get(
        made.run(np.uint32(seed), changes, actions, NOBODY, np.float32(0.0))
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(steps):
        if np.issubdtype(leaf.dtype, np.floating):
            wrong = ~np.isfinite(leaf)
            assert not wrong.any(), (jax.tree_util.keystr(path), first(wrong, leaf))
    for obs in (steps.obs, steps.info["final_observation"]):
        outside = ~((obs >= low) & (obs <= high))
        assert not outside.any(), first(outside, obs, low + 0 * obs, high + 0 * obs)
    limit = changes["max_steps_in_episode"]
    done = steps.terminated | steps.truncated
    assert (steps.state.time < limit).all()
    np.testing.assert_array_equal(steps.state.time == 0, done)


@given(data=st.data(), seed=SEEDS)
def test_no_member_of_a_batch_disturbs_another(made, data, seed):
    """One has other actions, other parameters, or a state of NaN, infinity, anything."""
    changes, actions = drawn(made, data, seed)
    member = data.draw(st.integers(0, NUM_ENVS - 1), label="member")
    value = np.float32(data.draw(st.sampled_from([*NUMBERS, 0.0, 1e6]), label="poison"))
    poisoned = np.zeros(NUM_ENVS, bool)
    where = data.draw(st.sampled_from(["state", "params", "actions"]), label="where")
    other_changes, other_actions = dict(changes), actions.copy()
    if where == "state":
        poisoned[member] = True
    elif where == "actions":
        other_actions[:, member] = drawn(made, data, seed + 1)[1][:, member]
    else:
        for name, values in changes.items():
            if np.issubdtype(values.dtype, np.floating):
                other_changes[name] = values.copy()
                other_changes[name][member] = value
    inputs = [(changes, actions, NOBODY), (other_changes, other_actions, poisoned)]
    clean, spoilt = (jax.device_get(made.run(np.uint32(seed), *x, value)[0]) for x in inputs)
    others = np.arange(NUM_ENVS) != member

    def same(path, a, b):
        assert a[:, others].tobytes() == b[:, others].tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(same, clean, spoilt)


TYPES = ["bool", "int8", "uint8", "int32", "uint32", "float16", "float32", "complex64"]


@given(
    data=st.data(),
    dtype=st.sampled_from(TYPES),
    shape=array_shapes(min_dims=0, max_dims=3, max_side=3),
)
def test_actions_of_another_shape_or_type_are_refused(made, data, dtype, shape):
    env, params, _ = made
    space = env.action_space(params)
    fits = np.issubdtype(dtype, np.integer)
    if not hasattr(space, "n"):
        fits = fits or np.issubdtype(dtype, np.floating)
    action = jnp.zeros(shape, dtype)
    key = jax.random.key(0)
    _, state = jax.eval_shape(env.reset, key, params)
    if shape == space.shape and fits:
        jax.eval_shape(env.step_env, key, state, action, params)
        return
    with pytest.raises(
        ValueError, match=rf"action of shape .* and type {dtype} must be .*{env.name}"
    ) as e:
        jax.eval_shape(env.step, key, state, action, params)
    assert str(shape) in str(e.value)
