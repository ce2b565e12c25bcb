"""Replay of the most recent transitions: a ring of preallocated arrays, written in place.

Lin (1992, https://doi.org/10.1007/BF00992699); uniform sampling as in Mnih et al. (2015,
https://doi.org/10.1038/nature14236). The buffer is a value: under `jit` with a donated state, and
in the carry of `lax.scan`, XLA writes the new rows into the old arrays. Two things keep it so:
write first and read after, and let nothing hold the buffer from before the write.
"""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl.returns import n_step
from jaxrl.types import Transition


@struct.dataclass
class Replay:
    """The last transitions of `num_envs` environments, time along axis 0 as it passed."""

    data: Transition  # each leaf (capacity, num_envs, ...), in the environment's own dtype
    position: jax.Array  # () int32 row of time that is written next
    size: jax.Array  # () int32 rows of time written so far, at most capacity

    @property
    def capacity(self) -> int:
        """Rows of time."""
        return self.data.reward.shape[0]

    @property
    def num_envs(self) -> int:
        """Transitions in a row of time."""
        return self.data.reward.shape[1]


@struct.dataclass
class Batch:
    """Sampled transitions for a bootstrapped target `reward + discount * value(next_obs)`.

    With n-step returns, `reward` is the discounted sum of up to n rewards and `next_obs` the
    observation after them, before auto-reset; `discount` is gamma^k, or 0 where the episode
    terminated.
    """

    obs: Any  # (batch, *obs_shape)
    action: jax.Array  # (batch, *action_shape)
    reward: jax.Array  # (batch,)
    discount: jax.Array  # (batch,)
    next_obs: Any  # (batch, *obs_shape)


def init(example: Transition, buffer_size: int) -> Replay:
    """Return an empty buffer for at least `buffer_size` transitions.

    Args:
        example: one step of all environments, leaves (num_envs, ...): shapes and dtypes are taken,
            so `jax.eval_shape` of a step will do.
        buffer_size: transitions to keep; rounded up to a whole number of steps of all environments.

    Raises:
        ValueError: `buffer_size` is smaller than one step of all environments, or the buffer does
            not fit into the memory of the device.
    """
    num_envs = example.reward.shape[0]
    if buffer_size < num_envs:
        raise ValueError(
            f"buffer_size = {buffer_size} must be at least num_envs = {num_envs}: one step of all "
            "environments"
        )
    capacity = -(-buffer_size // num_envs)
    if capacity * num_envs >= 2**31:
        check_memory(example, capacity)  # says more, where it cannot fit anyway
        raise ValueError(f"buffer_size = {buffer_size} must be below 2**31 = {2**31}")
    check_memory(example, capacity)
    data = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example)
    return Replay(data, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def num_bytes(example: Transition, capacity: int) -> int:
    """Bytes that `capacity` rows of time take."""
    return capacity * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(example))


def check_memory(example: Transition, capacity: int) -> None:
    """Raise ValueError, with the bytes asked for, if a buffer cannot fit into the device's memory.

    Only what can never fit is refused: how much of the memory is free is not looked at.
    """
    asked, available = num_bytes(example, capacity), device_memory()
    if available is None or asked <= available:
        return
    rows = capacity * example.reward.shape[0]
    raise ValueError(
        f"buffer_size = {rows} transitions of {asked // rows} bytes each ask for {asked:,} bytes, "
        f"but the device has {available:,}: lower buffer_size"
    )


def device_memory() -> int | None:
    """Bytes of memory of the first device of this process; None where it cannot be known."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not every system has them
        return None


def next_places(replay: Replay, num_steps: int) -> jax.Array:
    """Places (num_steps, num_envs) int32 that the next `add` of so many steps will write."""
    rows = (replay.position + jnp.arange(num_steps)) % replay.capacity
    return rows[:, None] * replay.num_envs + jnp.arange(replay.num_envs)[None, :]


def add(replay: Replay, transitions: Transition) -> Replay:
    """Write steps of all environments over the oldest ones; leaves (num_steps, num_envs, ...).

    Raises:
        ValueError: more steps than the buffer holds.
    """
    num_steps = transitions.reward.shape[0]
    if num_steps > replay.capacity:
        raise ValueError(
            f"{num_steps} steps cannot be added to a buffer of {replay.capacity} steps: "
            "raise buffer_size"
        )
    rows = (replay.position + jnp.arange(num_steps)) % replay.capacity

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        if num_steps == 1:  # one row never wraps: a slice is the fastest write
            start = (replay.position, *(jnp.int32(0),) * (old.ndim - 1))
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)
        return old.at[rows].set(new.astype(old.dtype), unique_indices=True)

    return Replay(
        data=jax.tree.map(write, replay.data, transitions),
        position=(replay.position + num_steps) % replay.capacity,
        size=jnp.minimum(replay.size + num_steps, replay.capacity),
    )


def draw(replay: Replay, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw places of written transitions, uniformly and with replacement: int32 `shape`.

    A place counts row by row of time, `row * num_envs + env`. Drawing indices costs the same at any
    size of the buffer; sampling without replacement would cost a pass over all of it. Some places
    are likelier than others by a part in 2^32 / (number of transitions), far below what matters.
    """
    return places(replay, jax.random.bits(key, shape, jnp.uint32))


def places(replay: Replay, bits: jax.Array) -> jax.Array:
    """Make of random uint32 `bits` places of written transitions, int32; see `draw`."""
    count = (replay.size * replay.num_envs).astype(jnp.uint32)
    return (bits % count).astype(jnp.int32)


def take(replay: Replay, place: jax.Array, gamma: float | jax.Array, num_steps: int = 1) -> Batch:
    """Read the transitions at `place` (*batch,), with n-step returns for `num_steps` > 1.

    The sum stops after a step that ended its episode, either way, and after the newest step in the
    buffer: what follows belongs to another episode, or is not known yet. So every written
    transition can be sampled, some with fewer than n steps.
    """

    def row(leaf: jax.Array, place: jax.Array) -> jax.Array:
        return leaf.reshape(-1, *leaf.shape[2:])[place]

    data = replay.data
    if num_steps == 1:
        last, reward = place, row(data.reward, place)
        discount = jnp.where(row(data.terminated, place), 0.0, jnp.float32(gamma))
    else:
        total = replay.capacity * replay.num_envs
        newest = (replay.position - 1) % replay.capacity
        places = [(place + i * replay.num_envs) % total for i in range(num_steps)]
        window = jnp.stack(places)  # (n, *batch): the same environment at the next times
        at_newest = window // replay.num_envs == newest
        reward, discount, count = n_step(
            row(data.reward, window),
            row(data.terminated, window),
            row(data.truncated, window) | at_newest,
            gamma,
        )
        last = (place + (count - 1) * replay.num_envs) % total
    return Batch(
        obs=jax.tree.map(lambda x: row(x, place), data.obs),
        action=row(data.action, place),
        reward=reward,
        discount=discount,
        next_obs=jax.tree.map(lambda x: row(x, last), data.next_obs),
    )
