"""Parts of an agent that do not wait for each other, each on a device of its own.

Two networks that learn at once, as PPO's and SAC's do with `learn_apart`: within `jax.shard_map`
over the mesh axis `NETS` all devices run the same program, but each calls its own part, and then
all have what all parts returned.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

NETS = "nets"


def call(parts: Sequence[Callable[[], tuple[Any, ...]]], axis: str | None) -> list[tuple[Any, ...]]:
    """Call functions of no arguments that do not wait for each other; return what each returns.

    Args:
        parts: they return tuples of trees of arrays (no keys), all of the same length.
        axis: a mesh axis of as many devices as there are parts, inside of `jax.shard_map`: each
            device calls its own, and all get the results of all, bit for bit. Each element of the
            tuples is an exchange, which takes some 50 us between CPU devices; what is not used
            afterwards is neither exchanged nor computed. None: one after the other.

    Raises:
        ValueError: the axis has another number of devices.
    """
    if axis is None:
        return [part() for part in parts]
    if (size := jax.lax.axis_size(axis)) != len(parts):
        raise ValueError(f"axis = {axis!r} has {size} device(s), but there are {len(parts)} parts")
    shapes = [jax.eval_shape(part) for part in parts]

    def mine(i: int) -> Callable[[], list[list[jax.Array]]]:
        def call() -> list[list[jax.Array]]:
            found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            found[i] = parts[i]()
            return [_words(element) for element in zip(*found, strict=True)]

        return call

    words = jax.lax.switch(jax.lax.axis_index(axis), [mine(i) for i in range(len(parts))])
    # all devices but one have zeros, and the sums are of integers: nothing is rounded
    elements = [
        _from_words([jax.lax.psum(x, axis) for x in of_element], shape)
        for of_element, shape in zip(words, zip(*shapes, strict=True), strict=True)
    ]
    return list(zip(*elements, strict=True))


def check(learn_apart: bool, net_axis: str | None) -> None:
    """Raise ValueError if networks that wait for each other are to learn along `net_axis`."""
    if net_axis is not None and not learn_apart:
        raise ValueError(
            f"net_axis = {net_axis!r} needs learn_apart = True: else the networks wait for each "
            "other after every gradient"
        )


def _widths(leaves: Sequence[Any]) -> list[int]:
    return sorted({x.dtype.itemsize for x in leaves})


def _words(tree: Any) -> list[jax.Array]:
    """Return the bits of all arrays: one flat unsigned array for each width of types."""
    leaves = [x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x for x in jax.tree.leaves(tree)]
    return [
        jnp.concatenate(
            [
                jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).reshape(-1)
                for x in leaves
                if x.dtype.itemsize == width
            ]
        )
        for width in _widths(leaves)
    ]


def _from_words(words: Sequence[jax.Array], shapes: Any) -> Any:
    """Make the arrays of `shapes` of what `_words` returned."""
    leaves, structure = jax.tree.flatten(shapes)
    found: list[Any] = list(leaves)
    for width, flat in zip(_widths(leaves), words, strict=True):
        which = [i for i, x in enumerate(leaves) if x.dtype.itemsize == width]
        ends = list(itertools.accumulate(leaves[i].size for i in which))
        for i, part in zip(which, jnp.split(flat, ends[:-1]), strict=True):
            part, dtype = part.reshape(leaves[i].shape), leaves[i].dtype
            is_bool = dtype == jnp.bool_
            found[i] = part != 0 if is_bool else jax.lax.bitcast_convert_type(part, dtype)
    return jax.tree.unflatten(structure, found)
