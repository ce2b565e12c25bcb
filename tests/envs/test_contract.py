"""What every environment of jaxrl keeps: shapes, types, bounds, jit, vmap, both ends, one trace."""

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl.envs

CASES = [
    pytest.param(("LunarLander-v3", {}), marks=pytest.mark.slow),  # three minutes of compiling
    pytest.param(("LunarLanderContinuous-v3", {"solver": "fast"}), marks=pytest.mark.slow),
    ("MicroRacer-v0", {"num_tracks": 4}),
    ("MicroRacer-v0", {"num_tracks": 2, "observation": "lidar", "obstacles": False}),
    ("MarsRover-v0", {"length": 30, "start": "uniform", "misstep_prob": 0.2}),
    ("MarsRover-v0", {"length": 30, "start": "uniform", "observation": "index"}),
]
KEY = jax.random.key(0)
NUM_ENVS = 32
# (time limit, steps of the rollout): a lander needs some time to come down
STEPS = {"MicroRacer-v0": (20, 64)}
DEFAULT_STEPS = (90, 128)


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request):
    env_id, arguments = request.param
    return gymnax.make(env_id, **arguments)


@pytest.fixture(scope="module")
def rollout(made):
    """Random actions under a short time limit: (number of steps, NUM_ENVS)."""
    env, params = made
    limit, num_steps = STEPS.get(env.name, DEFAULT_STEPS)
    params = params.replace(max_steps_in_episode=limit)
    space = env.action_space(params)

    def step(state, key):
        key_act, key_env = jax.random.split(key)
        actions = jax.vmap(space.sample)(jax.random.split(key_act, NUM_ENVS))
        keys = jax.random.split(key_env, NUM_ENVS)
        obs, state, *rest = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            keys, state, actions, params
        )
        return state, (obs, state, *rest)

    def run(key):
        keys = jax.random.split(key, NUM_ENVS)
        _, state = jax.vmap(env.reset, in_axes=(0, None))(keys, params)
        return jax.lax.scan(step, state, jax.random.split(key, num_steps))[1]

    return params, jax.jit(run)(KEY)


def test_every_environment_is_covered():
    cases = [getattr(case, "values", (case,))[0] for case in CASES]
    assert {env_id for env_id, _ in cases} == set(jaxrl.envs.ENVIRONMENTS)


def test_reset_and_step_have_equal_types(made):
    env, params = made
    obs, state = jax.eval_shape(env.reset, KEY, params)
    action = env.action_space(params).sample(KEY)
    next_obs, next_state, reward, terminated, truncated, info = jax.eval_shape(
        env.step, KEY, state, action, params
    )
    chex.assert_trees_all_equal_shapes_and_dtypes((obs, state), (next_obs, next_state))
    space = env.observation_space(params)
    assert (obs.shape, obs.dtype) == (space.shape, space.dtype)
    assert (info["final_observation"].shape, reward.shape) == (obs.shape, ())
    assert reward.dtype == jnp.float32
    assert terminated.dtype == truncated.dtype == jnp.bool_
    if "success" in info:  # only where an episode can succeed
        assert (info["success"].shape, info["success"].dtype) == ((), jnp.bool_)


def test_observations_are_finite_and_in_bounds(made, rollout):
    env, _ = made
    params, (obs, _, reward, *_, info) = rollout
    space = env.observation_space(params)
    chex.assert_tree_all_finite((obs, reward, info))
    if hasattr(space, "low"):  # not Discrete
        assert np.isfinite(space.low).all()
        assert np.isfinite(space.high).all()
    assert jax.vmap(jax.vmap(space.contains))(obs).all()
    assert jax.vmap(jax.vmap(space.contains))(info["final_observation"]).all()


def test_both_ends_happen_and_reset_the_clock(rollout):
    params, (_, state, _, terminated, truncated, _) = rollout
    assert terminated.any()
    assert (truncated & ~terminated).any()
    done = terminated | truncated
    np.testing.assert_array_equal(state.time == 0, done)
    assert state.time.max() < params.max_steps_in_episode


def test_jit_equals_eager(made):
    env, params = made
    if env.name.startswith("LunarLander"):
        pytest.skip("minutes without jit: test_the_lander_without_jit")
    assert_jit_equals_eager(env, params, 1e-6)


@pytest.mark.slow
def test_the_lander_without_jit():
    # its legs are 68 times lighter than its hull
    assert_jit_equals_eager(*gymnax.make("LunarLander-v3"), 2e-5)


def assert_jit_equals_eager(env, params, tolerance):
    action = jnp.asarray(env.action_space(params).sample(KEY))
    _, state = env.reset(KEY, params)
    compiled = env.step(KEY, state, action, params)
    with jax.disable_jit():
        eager = env.step(KEY, state, action, params)
    chex.assert_trees_all_close(compiled, eager, atol=tolerance)


def test_same_key_same_episode(made, rollout):
    env, _ = made
    params, _ = rollout
    reset = jax.vmap(env.reset, in_axes=(0, None))
    keys = jax.random.split(KEY, 8)
    chex.assert_trees_all_equal(reset(keys, params), reset(keys, params))
    obs, _ = reset(keys, params)
    assert len(np.unique(obs, axis=0)) > 1  # and others with other keys


def test_one_trace_over_parameters_and_steps(made):
    env, params = made
    chex.clear_trace_counter()  # it counts by name
    step = jax.jit(chex.assert_max_traces(env.step_env, n=1))
    _, state = env.reset(KEY, params)
    for limit in (10, 20):
        changed = params.replace(max_steps_in_episode=limit)
        _, state, *_ = step(KEY, state, env.action_space(params).sample(KEY), changed)


def test_observation_comes_from_the_state(made):
    env, params = made
    _, state = env.reset(KEY, params)
    action = env.action_space(params).sample(KEY)
    obs, state, *_ = env.step_env(KEY, state, action, params)
    np.testing.assert_array_equal(obs, env.observe(KEY, state, action, params))
