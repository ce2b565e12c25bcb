"""Distributions against numbers by hand, scipy and their own definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl.distributions import Categorical, Normal, TanhNormal

KEY = jax.random.key(0)


def test_categorical_by_hand():
    pi = Categorical(jnp.log(jnp.array([0.5, 0.25, 0.25])) + 7.0)  # logits may be shifted
    assert pi.log_prob(jnp.array(1)) == pytest.approx(math.log(0.25))
    assert pi.entropy(KEY) == pytest.approx(1.5 * math.log(2))
    assert pi.mode() == 0
    draws = jax.vmap(pi.sample)(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 4000, [0.5, 0.25, 0.25], atol=0.03)


def test_categorical_with_an_impossible_action_has_finite_entropy_and_gradient():
    logits = jnp.array([0.0, -jnp.inf])
    assert Categorical(logits).entropy(KEY) == 0.0
    grad = jax.grad(lambda z: Categorical(z).entropy(KEY))(jnp.array([0.0, -200.0]))
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize(
    "pi",
    [Categorical(jnp.zeros((4, 3))), Normal(jnp.zeros((4, 2)), jnp.zeros((4, 2)))],
    ids=["categorical", "normal"],
)
def test_noise_drawn_ahead_is_of_as_many_independent_draws(pi):
    noise = pi.noise(KEY, (500,))
    draws = np.asarray(jax.vmap(pi.place)(noise), np.float64)
    assert draws.shape == (500, *pi.mode().shape)
    expected = 1.0 if isinstance(pi, Categorical) else 0.0
    np.testing.assert_allclose(draws.mean(0), expected, atol=0.2)
    assert np.abs(np.corrcoef(draws.reshape(500, -1).T) - np.eye(draws[0].size)).max() < 0.2
    np.testing.assert_array_equal(pi.place(pi.noise(KEY)), pi.sample(KEY))


def test_normal_equals_scipy():
    mean, log_std = jnp.array([0.3, -1.0]), jnp.array([-0.5, 0.7])
    pi = Normal(mean, log_std)
    x = jnp.array([0.1, 2.0])
    scipy_pi = [scipy.stats.norm(m, math.exp(s)) for m, s in zip(mean, log_std, strict=True)]
    assert pi.log_prob(x) == pytest.approx(
        sum(p.logpdf(v) for p, v in zip(scipy_pi, x, strict=True))
    )
    assert pi.entropy(KEY) == pytest.approx(sum(p.entropy() for p in scipy_pi), rel=1e-5)
    draws = jax.vmap(pi.sample)(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(draws.std(0), jnp.exp(log_std), rtol=0.05)


def test_tanh_normal_density_integrates_to_one_over_the_squashed_values():
    pi = TanhNormal(jnp.array([0.4]), jnp.array([-0.2]))
    action = jnp.linspace(-0.99999, 0.99999, 20001)
    density = jnp.exp(jax.vmap(pi.log_prob)(jnp.arctanh(action)[:, None]))
    assert jnp.trapezoid(density, action) == pytest.approx(1.0, abs=2e-3)


def test_tanh_normal_is_finite_far_out():
    pi = TanhNormal(jnp.array([30.0]), jnp.array([0.0]))
    value, grad = jax.value_and_grad(lambda u: pi.log_prob(u))(jnp.array([30.0]))
    # log N(30; 30, 1) - log(1 - tanh(30)^2), and log(1 - tanh(u)^2) -> log 4 - 2 u
    assert value == pytest.approx(-0.5 * math.log(2 * math.pi) - (math.log(4.0) - 60.0), rel=1e-5)
    assert jnp.isfinite(grad).all()


def test_tanh_normal_entropy_estimate_is_unbiased():
    pi = TanhNormal(jnp.array([0.4]), jnp.array([-0.2]))
    action = jnp.linspace(-0.99999, 0.99999, 20001)
    log_density = jax.vmap(pi.log_prob)(jnp.arctanh(action)[:, None])
    exact = -jnp.trapezoid(jnp.exp(log_density) * log_density, action)
    estimates = jax.vmap(pi.entropy)(jax.random.split(KEY, 4000))
    standard_error = float(estimates.std()) / 4000**0.5
    assert estimates.mean() == pytest.approx(float(exact), abs=4 * standard_error)
    assert pi.entropy(KEY) != pi.entropy(jax.random.key(1))


def test_squash_stays_within_the_bounds():
    wild = jnp.array([-50.0, 0.0, 50.0])
    for kind in (Normal, TanhNormal):
        np.testing.assert_allclose(kind(wild, wild).squash(wild), [-1.0, 0.0, 1.0])
