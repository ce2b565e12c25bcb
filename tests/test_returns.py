"""Advantage estimates against numbers by hand and a plain NumPy loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.returns import gae, n_step

NO = jnp.zeros(3, bool)


def test_gae_by_hand():
    reward = jnp.array([1.0, 2.0, 3.0])
    value = jnp.array([0.5, 0.5, 0.5])
    next_value = jnp.array([0.5, 0.5, 4.0])
    advantage, target = gae(reward, value, next_value, NO, NO, gamma=0.5, gae_lambda=0.5)
    # deltas: 1 + .25 - .5 = .75; 2 + .25 - .5 = 1.75; 3 + 2 - .5 = 4.5; decay .25
    # A_2 = 4.5; A_1 = 1.75 + 1.125 = 2.875; A_0 = .75 + .71875 = 1.46875
    np.testing.assert_allclose(advantage, [1.46875, 2.875, 4.5])
    np.testing.assert_allclose(target, [1.96875, 3.375, 5.0])


def test_lambda_one_is_monte_carlo_and_lambda_zero_is_one_step():
    reward, value = jnp.array([1.0, 1.0, 1.0]), jnp.array([3.0, 4.0, 5.0])
    next_value = jnp.array([4.0, 5.0, 6.0])
    end = jnp.array([False, False, True])
    _, target = gae(reward, value, next_value, end, NO, gamma=0.9, gae_lambda=1.0)
    np.testing.assert_allclose(target, [1 + 0.9 + 0.81, 1.9, 1.0], rtol=1e-6)
    _, target = gae(reward, value, next_value, end, NO, gamma=0.9, gae_lambda=0.0)
    np.testing.assert_allclose(target, [1 + 0.9 * 4, 1 + 0.9 * 5, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("terminated", "truncated", "first_target"),
    [
        (True, False, 1.0),  # nothing after it
        (False, True, 1.0 + 0.9 * 7.0),  # the value of the observation before the reset
        (True, True, 1.0),  # terminated wins
    ],
)
def test_either_ending_cuts_the_trace(terminated, truncated, first_target):
    """Step 0 ends its episode; the huge reward of the next episode must not leak into it."""
    reward, value = jnp.array([1.0, 1e6]), jnp.array([0.0, 0.0])
    next_value = jnp.array([7.0, 0.0])
    end = jnp.array([terminated, False])
    cut = jnp.array([truncated, False])
    _, target = gae(reward, value, next_value, end, cut, gamma=0.9, gae_lambda=0.95)
    assert target[0] == pytest.approx(first_target)


def test_gae_equals_a_loop_on_random_data():
    rng = np.random.default_rng(0)
    shape, gamma, lam = (50, 4), 0.97, 0.9
    reward, value, next_value = rng.normal(size=(3, *shape)).astype(np.float32)
    terminated, truncated = rng.random((2, *shape)) < 0.1
    expected = np.zeros(shape)
    last = np.zeros(4)
    for t in reversed(range(50)):
        delta = reward[t] + gamma * next_value[t] * (1 - terminated[t]) - value[t]
        last = delta + gamma * lam * last * (1 - (terminated[t] | truncated[t]))
        expected[t] = last
    advantage, _ = gae(
        *map(jnp.asarray, (reward, value, next_value, terminated, truncated)), gamma, lam
    )
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)


def test_n_step_by_hand():
    reward = jnp.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    terminated = jnp.array([[False] * 3, [False, True, False], [False, False, True]])
    truncated = jnp.array([[False, False, True], [False, True, False], [False] * 3])
    total, discount, count = n_step(reward, terminated, truncated, 0.5)
    # nothing ends: 1 + 1 + 1; both flags at step 1: 1 + 1, terminated wins; cut at step 0: 1
    np.testing.assert_allclose(total, [3.0, 2.0, 1.0])
    np.testing.assert_allclose(discount, [0.125, 0.0, 0.5])
    np.testing.assert_array_equal(count, [3, 2, 1])
