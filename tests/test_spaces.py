"""Reading gymnax spaces, and refusing those that a learner cannot use."""

import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces as gymnax_spaces

from jaxrl import spaces


def test_reads_discrete_and_box():
    assert spaces.action_spec(gymnax_spaces.Discrete(4)) == spaces.Discrete(4)
    box = spaces.action_spec(gymnax_spaces.Box(-2.0, 2.0, (3,)))
    assert box == spaces.Box((3,), (-2.0,) * 3, (2.0,) * 3)
    scalar = spaces.action_spec(gymnax_spaces.Box(0.0, 1.0, ()))
    assert scalar.size == 1
    assert scalar.scale(jnp.zeros((5, 1))).shape == (5,)


def test_scales_to_uneven_bounds():
    low, high = jnp.array([-1.0, 0.0]), jnp.array([3.0, 0.5])
    box = spaces.action_spec(gymnax_spaces.Box(low, high, (2,)))
    np.testing.assert_allclose(
        box.scale(jnp.array([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])),
        [[-1.0, 0.0], [1.0, 0.25], [3.0, 0.5]],
    )


@pytest.mark.parametrize(("low", "high"), [(-np.inf, 1.0), (0.0, np.nan), (1.0, 1.0)])
def test_refuses_bounds_that_cannot_be_scaled_to(low, high):
    with pytest.raises(ValueError, match="bounds must be finite and low < high"):
        spaces.action_spec(gymnax_spaces.Box(low, high, (1,)))


def test_refuses_composite_spaces():
    both = gymnax_spaces.Tuple([gymnax_spaces.Discrete(2), gymnax_spaces.Discrete(2)])
    with pytest.raises(ValueError, match="must be Discrete or Box"):
        spaces.action_spec(both)
    with pytest.raises(ValueError, match="must be one array"):
        spaces.obs_shape(gymnax_spaces.Dict({"a": gymnax_spaces.Discrete(2)}))


def test_flattens_images_and_keeps_the_batch():
    images = jnp.arange(2 * 3 * 4 * 5, dtype=jnp.uint8).reshape(2, 3, 4, 5)
    flat = spaces.flat(images, (4, 5))
    assert flat.shape == (2, 3, 20)
    assert flat.dtype == jnp.float32
