"""Flat draws are the samplers' own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import draws

KEY = jax.random.key(3)
SAMPLERS = {
    "bits": (jax.random.bits, ()),
    "uniform": (jax.random.uniform, (jnp.float32, -1.0, 1.0)),
    "normal": (jax.random.normal, ()),
    "gumbel": (jax.random.gumbel, ()),
    "randint": (jax.random.randint, (0, 7)),
}


@pytest.mark.parametrize("shape", [(), (5,), (3, 1, 5), (2, 0)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_numbers_as_drawn_in_that_shape(name, shape):
    sampler, args = SAMPLERS[name]
    drawn = draws.draw(sampler, KEY, shape, *args)
    np.testing.assert_array_equal(drawn, sampler(KEY, shape, *args))


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(3)], ids=["typed", "raw"])
def test_the_same_keys(key):
    drawn, split = draws.draw(jax.random.split, key, (3, 2)), jax.random.split(key, (3, 2))
    assert drawn.shape == split.shape
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        drawn, split = jax.random.key_data(drawn), jax.random.key_data(split)
    np.testing.assert_array_equal(drawn, split)


@pytest.mark.parametrize("num", [1, 2, 5, 16, 17, 300])
def test_split_gives_the_same_keys(num):
    drawn, split = draws.split(KEY, num), jax.random.split(KEY, num)
    np.testing.assert_array_equal(jax.random.key_data(drawn), jax.random.key_data(split))


def test_arrays_of_many_sizes_are_drawn_in_few_lengths():
    """XLA compiles alike draws once: one length for all short ones, eight to a doubling."""
    lengths = {draws.length(size) for size in range(1, 1025)}
    assert sorted(lengths)[:17] == [*range(16, 33, 2), *range(36, 65, 4)]
    assert len(lengths) == 1 + 6 * 8  # six doublings
    assert all(size <= draws.length(size) <= max(16, 1.125 * size) for size in range(1, 5000))

    drawn = jax.make_jaxpr(lambda key: [draws.draw(jax.random.bits, key, (n,)) for n in (2, 9, 16)])
    shapes = [e.outvars[0].aval.shape for e in drawn(KEY).eqns if e.primitive.name == "random_bits"]
    assert shapes == [(16,)] * 3
