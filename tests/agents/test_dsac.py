"""DSAC: its losses by hand, its promises as a pure program, and what it must learn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.agents import dsac
from jaxrl.networks import CriticNet
from tests.agents import off_policy_checks as checks

# the losses, by hand ------------------------------------------------------------------------------


def test_the_deviation_is_positive_and_bounded_below():
    mean, std = dsac.return_distribution(jnp.array([[3.0, -50.0], [4.0, 2.0]]), 0.5)
    assert mean == pytest.approx([3.0, 4.0])
    assert std == pytest.approx([0.5, math.log1p(math.exp(2.0))])


def test_critic_loss_is_the_negative_log_likelihood_within_the_bound():
    mean, std, target = jnp.array([1.0, 2.0]), jnp.array([2.0, 3.0]), jnp.array([2.0, 0.0])
    loss = dsac.critic_loss(mean, std, target, 10.0, jnp.ones(2))
    grad = jax.grad(dsac.critic_loss, argnums=(0, 1))(mean, std, target, 10.0, jnp.ones(2))

    def negative_log_likelihood(mean, std):
        return -jax.scipy.stats.norm.logpdf(target, mean, std).mean()

    expected = jax.grad(negative_log_likelihood, argnums=(0, 1))(mean, std)
    np.testing.assert_allclose(grad[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad[1], expected[1], rtol=1e-6)
    # the error counts twice, once for either gradient: 2 * (1 / 8 + 4 / 18) / 2, plus log sigma
    assert loss == pytest.approx(1 / 8 + 4 / 18 + (math.log(2) + math.log(3)) / 2)


def test_beyond_the_bound_only_the_gradient_of_the_deviation_is_cut():
    mean, std, target = jnp.array([0.0]), jnp.array([2.0]), jnp.array([100.0])
    grad = jax.grad(dsac.critic_loss, argnums=(0, 1))(mean, std, target, 10.0, jnp.ones(1))
    assert grad[0] == pytest.approx(-100.0 / 4.0)  # -(y - Q) / sigma^2
    assert grad[1] == pytest.approx(-(10.0**2 - 4.0) / 8.0)  # -(bound^2 - sigma^2) / sigma^3


def test_the_temperature_rises_while_the_entropy_is_too_low():
    grad = jax.grad(dsac.alpha_loss)(0.0, jnp.array([-3.0, -2.0]), -1.0)
    assert grad == pytest.approx(-1.5)


# promises -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chunks_equal_one_program_bit_for_bit():
    checks.check_chunks(dsac)


def test_two_seeds_differ_from_the_start():
    checks.check_seeds_differ(dsac, ("policy", "critic"))


@pytest.mark.slow
def test_vmap_over_the_real_settings_equals_single_runs():
    checks.check_sweep(dsac)


def test_all_real_settings_are_leaves_and_sizes_are_not():
    checks.check_leaves(dsac)


def test_a_saved_policy_acts_as_the_trained_one(tmp_path):
    checks.check_saved(dsac, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(policy_delay=0), "policy_delay = 0 must be an integer >= 1"),
        (dict(tau=0.0), r"tau = 0.0 must lie in \(0.0, 1.0\]"),
        (dict(learning_rate=0.0), "learning_rate = 0.0 must lie in"),
        (dict(min_std=0.0), "min_std = 0.0 must lie in"),
        (dict(td_bound=0.0), "td_bound = 0.0 must lie in"),
        (dict(initial_alpha=0.0), "initial_alpha = 0.0 must lie in"),
        (dict(hidden=(64, 0)), r"hidden = \(64, 0\)"),
    ],
)
def test_bad_settings_are_refused_in_words(change, words):
    checks.check_refused(dsac, "Pendulum-v1", change, words)


def test_discrete_actions_are_refused():
    checks.check_refused(dsac, "CartPole-v1", {}, "DSAC needs real actions, .* 2 discrete ones")


# what it learns -----------------------------------------------------------------------------------

# small deviations, as the probes' returns are certain, and a fixed small temperature
PROBE = dsac.Config(**checks.PROBE, learn_alpha=False, initial_alpha=1e-3, min_std=0.1)


@pytest.fixture(scope="module")
def learnt():
    return checks.Learnt(dsac, PROBE)


def test_probe_values(learnt):
    net = CriticNet(PROBE.hidden, PROBE.activation, num_outputs=2)

    def q(learner, obs, action):
        return net.values(learner.critic, obs, action)

    checks.check_values(learnt, q)


def test_probe_real_actions(learnt):
    checks.check_real_actions(learnt)


@pytest.mark.slow
def test_learns_pendulum():
    """>= -160 mean return over 8 seeds within 30k steps."""
    score = checks.scores(dsac, "Pendulum-v1", dsac.Config(**checks.PENDULUM))
    assert score.mean() >= -160.0, score
