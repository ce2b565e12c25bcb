"""Stepping and evaluating: what is counted, where an episode ends."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import rollout
from tests import probes


def test_step_keeps_the_observation_before_the_reset_and_counts_episodes():
    env = probes.ResetIsWorthless()  # starts at -1, then 0; reward 0, 1, 1, 1; cut after 4
    params = env.default_params
    actors = rollout.reset(env, params, jax.random.key(0), 3)
    rows = []
    for i in range(4):
        actors, transition, ended = rollout.step(
            env, params, actors, jnp.zeros(3, jnp.int32), jax.random.key(i)
        )
        rows.append((transition, ended))
    first, last = rows[0][0], rows[-1][0]
    np.testing.assert_array_equal(first.obs, -1.0)
    np.testing.assert_array_equal(first.next_obs, 0.0)
    assert not rows[0][1].count
    assert last.truncated.all()
    assert not last.terminated.any()
    np.testing.assert_array_equal(last.next_obs, 0.0)  # before the reset ...
    np.testing.assert_array_equal(actors.obs, -1.0)  # ... after it
    metrics = rows[-1][1].metrics()
    assert metrics["num_episodes"] == 3
    assert metrics["episode_return"] == 3.0
    assert metrics["episode_length"] == 4.0
    assert "success_rate" not in metrics
    np.testing.assert_array_equal(actors.episode_return, 0.0)


def test_nothing_ended_is_nan_and_not_zero():
    nothing = rollout.EndedEpisodes(*jnp.zeros(4)).metrics()
    assert nothing["num_episodes"] == 0
    assert np.isnan(nothing["episode_return"])
    assert np.isnan(nothing["success_rate"])


def test_evaluate_runs_each_episode_once_to_its_end():
    env, params = gymnax.make("Pendulum-v1")

    def act(obs, key):
        return jnp.zeros(1)

    episodes = jax.jit(lambda k: rollout.evaluate(env, params, act, k, 5, gamma=0.9))(
        jax.random.key(0)
    )
    np.testing.assert_array_equal(episodes.lengths, 200)
    assert episodes.truncated.all()
    assert not episodes.terminated.any()
    # the same by hand: only the starts are random in this environment
    _, key_reset = jax.random.split(jax.random.key(0))
    _, state = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key_reset, 5), params)
    total, discounted = np.zeros(5), np.zeros(5)
    step = jax.jit(jax.vmap(env.step_env, in_axes=(None, 0, None, None)))
    for t in range(200):
        _, state, reward, *_ = step(jax.random.key(0), state, jnp.zeros(1), params)
        total += reward
        discounted += 0.9**t * np.asarray(reward)
    np.testing.assert_allclose(episodes.returns, total, rtol=1e-3)
    np.testing.assert_allclose(episodes.discounted_returns, discounted, rtol=1e-3)


def test_evaluate_freezes_what_has_ended():
    """CartPole pushed one way falls after 8 to 10 steps; reward 1 a step, so return = length."""
    env, params = gymnax.make("CartPole-v1")
    episodes = jax.jit(lambda k: rollout.evaluate(env, params, lambda o, k: jnp.int32(1), k, 64))(
        jax.random.key(0)
    )
    assert episodes.terminated.all()
    assert 8 <= episodes.lengths.min() < episodes.lengths.max() <= 11
    np.testing.assert_array_equal(episodes.returns, episodes.lengths)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_reset_starts_different_episodes(num_envs):
    env, params = gymnax.make("CartPole-v1")
    actors = rollout.reset(env, params, jax.random.key(0), num_envs)
    assert len(np.unique(np.asarray(actors.obs), axis=0)) == num_envs
