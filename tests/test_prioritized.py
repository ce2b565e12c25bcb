"""Priorities: the tree of sums, what is drawn, and the weights that correct for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import prioritized, replay
from tests.test_replay import empty, steps


def filled(num_steps=3, capacity=5):
    """A buffer of two environments with `num_steps` steps, and its priorities."""
    buffer = empty(capacity)
    priorities = prioritized.add(prioritized.init(buffer), buffer, num_steps)
    return replay.add(buffer, steps(0, num_steps)), priorities


def leaves(priorities):
    return np.asarray(priorities.tree[priorities.tree.shape[0] // 2 :])


def test_new_transitions_get_the_largest_priority_so_far():
    buffer, priorities = filled()
    np.testing.assert_array_equal(leaves(priorities)[:10], [1] * 6 + [0] * 4)
    place, error = jnp.array([1, 4]), jnp.array([3.0, -0.5])
    priorities = prioritized.update(priorities, place, error, 1.0)
    priorities = prioritized.add(priorities, buffer, 1)
    np.testing.assert_allclose(leaves(priorities)[:10], [1, 3, 1, 1, 0.5, 1, 3, 3, 0, 0], rtol=1e-5)


def test_every_node_is_the_sum_of_its_two():
    _, priorities = filled()
    place = jnp.array([0, 3, 3, 5])  # one place twice: one of its values stays
    tree = np.asarray(
        prioritized.update(priorities, place, jnp.array([5.0, 2.0, 7.0, 0.1]), 0.7).tree
    )
    for node in range(1, tree.size // 2):
        assert tree[node] == pytest.approx(tree[2 * node] + tree[2 * node + 1], rel=1e-6)
    assert tree[tree.size // 2 + 3] == pytest.approx(2.0**0.7) or tree[
        tree.size // 2 + 3
    ] == pytest.approx(7.0**0.7)


def test_draws_follow_the_priorities_to_alpha():
    _, priorities = filled()
    error = jnp.array([1.0, 2.0, 3.0, 4.0, 0.0, 6.0])
    priorities = prioritized.update(priorities, jnp.arange(6), error, 0.5)
    place, _ = prioritized.draw(priorities, jnp.int32(6), jax.random.key(0), 20_000, 1.0)
    expected = np.sqrt(np.asarray(error) + 1e-6)
    expected /= expected.sum()
    # stratified: each count is within one of its expectation on either side
    np.testing.assert_allclose(np.bincount(place, minlength=6) / 20_000, expected, atol=2e-4)


def test_nothing_unwritten_is_ever_drawn():
    _, priorities = filled(num_steps=1, capacity=500)  # 2 of 1000 places, in a tree of 1024
    priorities = prioritized.update(priorities, jnp.arange(2), jnp.array([1e-3, 1e3]), 1.0)
    for seed in range(20):
        place, weight = prioritized.draw(priorities, jnp.int32(2), jax.random.key(seed), 256, 0.5)
        assert place.max() < 2
        assert np.isfinite(weight).all()


def test_weights_by_hand():
    _, priorities = filled(num_steps=1)
    priorities = prioritized.update(priorities, jnp.arange(2), jnp.array([1.0, 3.0]), 1.0)
    place, weight = prioritized.draw(priorities, jnp.int32(2), jax.random.key(0), 8, 0.5)
    # P = 1/4, 3/4: (2/4)^-1/2 = 1.414 and (6/4)^-1/2 = 0.816, over the largest: 1 and 0.577
    np.testing.assert_allclose(weight, np.where(np.asarray(place) == 0, 1.0, 3.0**-0.5), rtol=1e-4)
    assert (np.bincount(place) == [2, 6]).all()
    _, weight = prioritized.draw(priorities, jnp.int32(2), jax.random.key(0), 8, 0.0)
    np.testing.assert_array_equal(weight, 1.0)
