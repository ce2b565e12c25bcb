"""Running statistics against NumPy's over all samples at once."""

import jax.numpy as jnp
import numpy as np

from jaxrl import normalize


def test_merging_batches_equals_all_samples_at_once():
    rng = np.random.default_rng(0)
    samples = rng.normal(5.0, [1.0, 10.0, 0.1], size=(600, 3)).astype(np.float32)
    stats = normalize.init((3,))
    for part in (samples[:8], samples[8:200], samples[200:]):
        stats = normalize.update(stats, jnp.asarray(part).reshape(2, -1, 3))
    assert stats.count == 600
    np.testing.assert_allclose(stats.mean, samples.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, samples.var(0), rtol=1e-3)
    scaled = normalize.normalize(stats, jnp.asarray(samples))
    np.testing.assert_allclose(scaled.mean(0), 0.0, atol=1e-2)
    np.testing.assert_allclose(scaled.std(0), 1.0, atol=1e-2)


def test_without_samples_it_is_the_identity():
    x = jnp.array([[1.0, -2.0]])
    np.testing.assert_allclose(normalize.normalize(normalize.init((2,)), x), x, rtol=1e-6)


def test_outliers_are_cut():
    assert normalize.normalize(normalize.init(()), jnp.array(1e9)) == 10.0


def test_a_constant_does_not_become_nan():
    stats = normalize.update(normalize.init(()), jnp.full(10, 3.0))
    assert normalize.normalize(stats, jnp.array(3.0)) == 0.0
