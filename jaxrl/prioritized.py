"""Priorities for a replay buffer, proportional variant: Schaul et al. (2016, arXiv 1511.05952).

P(i) = p_i^alpha / sum_k p_k^alpha with p_i = |TD error| + epsilon (eq. 1 there), corrected by the
importance weights w_i = (N P(i))^-beta / max_j w_j (sec. 3.4). The sums live in a binary tree of
arrays (appendix B.2.1): drawing and changing a batch takes log2(size) small steps. They are kept
apart from the buffer, so that gradient steps carry only them: XLA copies the tree once or twice a
round (8 bytes a transition), which shows in buffers beyond 100,000 or so.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl.replay import Replay, next_places

EPSILON = 1e-6  # added to the error: nothing that was written is out of reach


@struct.dataclass
class Priorities:
    """A priority for each place of a `Replay`."""

    tree: jax.Array  # (2 * leaves,) p^alpha at leaves + place; node i sums nodes 2 i and 2 i + 1
    total: jax.Array  # () the sum of all: tree[1]
    maximum: jax.Array  # () the largest p^alpha so far: what a new transition gets


def init(buffer: Replay) -> Priorities:
    """Return the priorities of an empty buffer: all 0."""
    leaves = 2 ** math.ceil(math.log2(max(2, buffer.capacity * buffer.num_envs)))
    return Priorities(jnp.zeros(2 * leaves), jnp.zeros(()), jnp.ones(()))


def add(priorities: Priorities, buffer: Replay, num_steps: int) -> Priorities:
    """Give what is about to be added the largest priority so far; `buffer` before `replay.add`."""
    place = next_places(buffer, num_steps).reshape(-1)
    value = jnp.broadcast_to(priorities.maximum, place.shape)
    return Priorities(*_set(priorities.tree, place, value), priorities.maximum)


def draw(
    priorities: Priorities,
    count: jax.Array,
    key: jax.Array,
    batch_size: int,
    beta: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Draw places by priority, one from each of `batch_size` equal slices of the sum.

    Args:
        priorities: of a buffer that is not empty.
        count: () transitions in that buffer.
        key: for the draw.
        batch_size: how many.
        beta: how much of the bias the weights correct, in [0, 1].

    Returns:
        place (batch_size,) int32 and weight (batch_size,) in (0, 1], the importance weights.
    """
    tree, leaves = priorities.tree, priorities.tree.shape[0] // 2
    slices = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size
    left = slices * priorities.total  # of the sum: what is still to be passed over
    node = jnp.ones(batch_size, jnp.int32)
    for _ in range(leaves.bit_length() - 1):
        below, beside = tree[2 * node], tree[2 * node + 1]
        # rounding may carry a draw past the end: never into a part whose sum is 0
        right = (left >= below) & (beside > 0.0)
        left = jnp.where(right, left - below, left)
        node = 2 * node + right
    probability = tree[node] / priorities.total
    weight = (count.astype(jnp.float32) * probability) ** -jnp.float32(beta)
    return node - leaves, weight / weight.max()


def update(
    priorities: Priorities, place: jax.Array, td_error: jax.Array, alpha: float | jax.Array
) -> Priorities:
    """Set the priorities of a sampled batch from its TD errors (batch,)."""
    value = (jnp.abs(td_error) + EPSILON) ** alpha
    maximum = jnp.maximum(priorities.maximum, value.max())
    return Priorities(*_set(priorities.tree, place, value), maximum)


def _set(tree: jax.Array, place: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Set leaves, then the sums above them: tree, total.

    Of equal places one value wins, and the sums fit it.
    """
    node = tree.shape[0] // 2 + place
    tree = tree.at[node].set(value)
    for _ in range((tree.shape[0] // 2).bit_length() - 1):
        node = node // 2
        value = tree[2 * node] + tree[2 * node + 1]
        tree = tree.at[node].set(value)
    return tree, value[0]
