"""Random arrays, drawn flat and in few lengths, shaped afterwards: same numbers, sooner compiled.

`jax.random.split(key, (2, 500, 10))` takes XLA's CPU compiler 2.6 s and `split(key, 10_000)` 0.2 s
(jax 0.10): where threefry's counters have several axes, each of its kernels finds its place by
divisions. Twelve draws of different lengths take it 1.9 s, of one length 0.5 s: it compiles alike
kernels once. On GPU and TPU it makes no difference.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

SHORTEST = 16  # length in which all short arrays are drawn


def draw(
    sampler: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...], *args: Any
) -> jax.Array:
    """Return `sampler(key, shape, *args)`, bit for bit, of a sampler of `jax.random`.

    One whose numbers are independent and in the order of the shape: split, bits, uniform, normal,
    gumbel, randint. (Bit for bit where JAX's threefry numbers are "partitionable", as by default:
    a number then depends on its place alone. Otherwise they are others, as good.)
    """
    size = math.prod(shape)
    numbers = sampler(key, (length(size),), *args)[:size]
    return numbers.reshape(*shape, *numbers.shape[1:])  # a raw key has an axis of its own


def split(key: jax.Array, num: int = 2) -> jax.Array:
    """Return `jax.random.split(key, num)`, bit for bit; see `draw`."""
    return draw(jax.random.split, key, (num,))


def length(size: int) -> int:
    """Round up to one of the lengths that are drawn: SHORTEST, then eight to the next doubling."""
    if size <= SHORTEST:
        return SHORTEST
    step = 1 << ((size - 1).bit_length() - 4)
    return -(-size // step) * step
