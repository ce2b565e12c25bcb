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
