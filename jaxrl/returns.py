"""Estimators of return and advantage: pure functions of arrays whose axis 0 is time."""

import chex
import jax
import jax.numpy as jnp


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    gae_lambda: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimate, Schulman et al. (2016, arXiv 1506.02438) eq. 16.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t),  A_t = sum_k (gamma lambda)^k delta_{t+k}.

    A terminated step has no value after it; a truncated one has, so `next_value` must be the value
    of the observation *before* auto-reset. Either ending cuts the sum: the next row belongs to
    another episode. Where both are raised, terminated wins.

    Args:
        reward, value, next_value: (T, ...) r_t, V(s_t), V(s_{t+1}).
        terminated, truncated: (T, ...) bool, how step t ended its episode.
        gamma: discount, () or broadcastable to (...).
        gae_lambda: lambda, () likewise.

    Returns:
        advantage (T, ...) and the value target advantage + value (T, ...).
    """
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    decay = jnp.where(terminated | truncated, 0.0, gamma * gae_lambda)

    def backward(advantage, step):
        delta_t, decay_t = step
        advantage = delta_t + decay_t * advantage
        return advantage, advantage

    _, advantage = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantage, advantage + value


def n_step(
    reward: jax.Array, terminated: jax.Array, truncated: jax.Array, gamma: float | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """n-step return without its bootstrap, Sutton and Barto (2018) eq. 7.1, cut at either ending.

    With k <= n the number of steps up to and including the first that ended the episode,

        reward = r_0 + gamma r_1 + ... + gamma^(k-1) r_(k-1),

    and the target is `reward + discount * V(s_k)`: discount is gamma^k, or 0 where step k - 1
    terminated (terminated wins where both are raised). After a truncated step the value of the
    observation *before* auto-reset is the bootstrap.

    Args:
        reward: (n, ...) r_0 .. r_(n-1).
        terminated, truncated: (n, ...) bool, how each step ended its episode.
        gamma: discount, ().

    Returns:
        reward (...), discount (...) and k (...) int32.
    """
    chex.assert_equal_shape([reward, terminated, truncated])
    total, power = jnp.zeros_like(reward[0]), jnp.ones_like(reward[0])
    count = jnp.zeros(reward.shape[1:], jnp.int32)
    running, alive = jnp.ones(reward.shape[1:], bool), jnp.ones(reward.shape[1:], bool)
    for r_t, terminated_t, truncated_t in zip(reward, terminated, truncated, strict=True):
        total = total + jnp.where(running, power * r_t, 0.0)
        power = jnp.where(running, gamma * power, power)
        count = count + running
        alive = alive & ~(running & terminated_t)
        running = running & ~(terminated_t | truncated_t)
    return total, jnp.where(alive, power, 0.0), count
