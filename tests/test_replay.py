"""The replay buffer: what is kept and drawn, n-step reading, and that it is written in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import replay
from jaxrl.types import Transition


def steps(first, count, num_envs=2, terminated=(), truncated=(), dtype=jnp.float32):
    """Transitions (count, num_envs): env e at time t has obs 10 t + e, reward t, next_obs + 100."""
    t = first + jnp.arange(count)
    label = (10 * t[:, None] + jnp.arange(num_envs)[None, :]).astype(dtype)

    def flags(times):
        return jnp.broadcast_to(jnp.isin(t, jnp.array(times, int))[:, None], label.shape)

    return Transition(
        obs=label[..., None],
        action=label.astype(jnp.int32),
        reward=jnp.broadcast_to(t[:, None].astype(jnp.float32), label.shape),
        terminated=flags(terminated),
        truncated=flags(truncated),
        next_obs=label[..., None] + jnp.asarray(100, dtype),
    )


def empty(capacity, num_envs=2, **kwargs):
    example = jax.tree.map(lambda x: x[0], steps(0, 1, num_envs, **kwargs))
    return replay.init(example, capacity * num_envs)


def test_the_most_recent_steps_are_kept():
    buffer = empty(3)
    for t in range(5):
        buffer = replay.add(buffer, steps(t, 1))
    # times 3 and 4 lie over 0 and 1
    np.testing.assert_array_equal(buffer.data.obs[:, 0, 0], [30, 40, 20])
    np.testing.assert_array_equal(buffer.data.obs[:, 1, 0], [31, 41, 21])
    assert (buffer.position, buffer.size) == (2, 3)


def test_several_steps_at_once_wrap_around():
    buffer = replay.add(empty(5), steps(0, 2))  # 2 does not divide 5: the third add wraps
    buffer = replay.add(replay.add(buffer, steps(2, 2)), steps(4, 2))
    np.testing.assert_array_equal(buffer.data.reward[:, 0], [5, 1, 2, 3, 4])
    assert (buffer.position, buffer.size) == (1, 5)


def test_adding_different_numbers_of_steps_keeps_their_order():
    buffer = empty(4)
    for first, count in ((0, 1), (1, 1), (2, 1), (3, 2)):
        buffer = replay.add(buffer, steps(first, count))
    np.testing.assert_array_equal(buffer.data.reward[:, 0], [4, 1, 2, 3])
    assert (buffer.position, buffer.size) == (1, 4)


def test_size_is_rounded_up_to_whole_steps_of_all_environments():
    example = jax.tree.map(lambda x: x[0], steps(0, 1, 4))
    assert replay.init(example, 10).capacity == 3


def test_dtypes_of_the_environment_are_kept():
    buffer = replay.add(empty(4, dtype=jnp.uint8), steps(0, 2, dtype=jnp.uint8))
    assert buffer.data.obs.dtype == jnp.uint8
    assert buffer.data.terminated.dtype == bool
    assert replay.take(buffer, jnp.array([1]), 0.9).obs.dtype == jnp.uint8


def test_draws_are_uniform_over_what_was_written_and_touch_nothing_else():
    buffer = replay.add(empty(1000), steps(0, 3))
    place = np.asarray(replay.draw(buffer, jax.random.key(0), (6000,)))
    assert set(place) == set(range(6))
    count = np.bincount(place)
    # 1000 each; the deviation of a count is sqrt(6000 * 1/6 * 5/6) = 28.9
    assert np.abs(count - 1000).max() < 5 * 28.9


def test_one_step_targets_know_both_endings():
    buffer = replay.add(empty(4), steps(0, 3, terminated=[1], truncated=[2]))
    batch = replay.take(buffer, jnp.array([0, 2, 5]), 0.9)  # times 0, 1, 2
    np.testing.assert_array_equal(batch.action, [0, 10, 21])
    np.testing.assert_array_equal(batch.reward, [0, 1, 2])
    np.testing.assert_allclose(batch.discount, [0.9, 0.0, 0.9])  # cut is not the end
    np.testing.assert_array_equal(batch.next_obs[:, 0], [100, 110, 121])


def test_n_step_targets_by_hand():
    buffer = replay.add(empty(8), steps(1, 6, terminated=[3]))
    batch = replay.take(buffer, jnp.array([0, 2, 4, 6, 9]), 0.5, 3)
    # from time 1: 1 + 2/2 + 3/4, then the end; from 2: 2 + 3/2; from 3: 3; from 4: 4 + 5/2 + 6/4
    # from 5 (environment 1): 5 + 6/2, then the newest step
    np.testing.assert_allclose(batch.reward, [2.75, 3.5, 3.0, 8.0, 8.0])
    np.testing.assert_allclose(batch.discount, [0.0, 0.0, 0.0, 0.125, 0.25])
    np.testing.assert_array_equal(batch.obs[:, 0], [10, 20, 30, 40, 51])
    np.testing.assert_array_equal(batch.next_obs[:, 0], [130, 130, 130, 160, 161])


def test_n_step_stops_at_a_time_limit_and_bootstraps_there():
    buffer = replay.add(empty(8), steps(1, 4, truncated=[2]))
    batch = replay.take(buffer, jnp.array([0]), 0.5, 3)
    np.testing.assert_allclose(batch.reward, [2.0])  # 1 + 2/2
    np.testing.assert_allclose(batch.discount, [0.25])
    np.testing.assert_array_equal(batch.next_obs[:, 0], [120])


def test_n_step_goes_around_the_end_of_the_ring_but_not_past_the_newest():
    buffer = empty(4)
    for t in range(6):
        buffer = replay.add(buffer, steps(t, 1))  # rows hold times 4, 5, 2, 3
    batch = replay.take(buffer, jnp.array([6, 2]), 0.5, 3)
    # from time 3: 3 + 4/2 + 5/4; from time 5, the newest: 5 alone, never the old time 2
    np.testing.assert_allclose(batch.reward, [6.25, 5.0])
    np.testing.assert_array_equal(batch.next_obs[:, 0], [150, 150])


def test_a_buffer_that_cannot_fit_is_refused_with_its_bytes():
    example = jax.tree.map(lambda x: x[0], steps(0, 1, 10))
    # obs 4 + action 4 + reward 4 + two flags + next_obs 4 = 18 bytes
    with pytest.raises(ValueError, match=r"buffer_size = 10{14} transitions of 18 bytes each ask"):
        replay.init(example, 10**14)
    with pytest.raises(ValueError, match=r"buffer_size = 3 must be at least num_envs = 10"):
        replay.init(example, 3)


def test_more_steps_than_the_buffer_holds_are_refused():
    with pytest.raises(ValueError, match="5 steps cannot be added to a buffer of 4"):
        replay.add(empty(4), steps(0, 5))


@pytest.mark.parametrize("num_steps", [1, 3])  # a slice; a scatter (3 does not divide the rows)
def test_adding_inside_a_scan_is_in_place(num_steps):
    buffer = jax.eval_shape(lambda: empty(100_000, num_envs=4))

    def run(buffer):
        def body(buffer, t):
            buffer = replay.add(buffer, steps(t, num_steps, num_envs=4))
            place = replay.draw(buffer, jax.random.key(0), (32,))
            return buffer, replay.take(buffer, place, 0.9, 2).reward.sum()

        return jax.lax.scan(body, buffer, jnp.arange(10))

    memory = jax.jit(run, donate_argnums=0).lower(buffer).compile().memory_analysis()
    size = 100_000 * 4 * 18  # obs, action, reward, two flags, next_obs: 4 + 4 + 4 + 2 + 4 bytes
    assert memory.alias_size_in_bytes >= size  # what goes in comes out
    assert memory.temp_size_in_bytes < 0.01 * size  # and is never copied
