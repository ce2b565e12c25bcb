"""TD3: its losses by hand, its promises as a pure program, and what it must learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.agents import td3
from jaxrl.networks import CriticNet
from jaxrl.replay import Batch
from tests.agents import off_policy_checks as checks

# the losses, by hand ------------------------------------------------------------------------------


def test_target_takes_the_smaller_critic_and_stops_at_an_end():
    obs = jnp.zeros((2, 1))
    batch = Batch(obs, obs, jnp.array([1.0, 2.0]), jnp.array([0.9, 0.0]), obs)
    next_q = jnp.array([[10.0, 7.0], [20.0, 5.0]])
    assert td3.td_target(batch, next_q) == pytest.approx([1.0 + 0.9 * 10.0, 2.0])


def test_critic_loss_by_hand():
    td_error = jnp.array([[1.0, 2.0], [0.0, 4.0]])
    # half of (1 + 0) * 1 and (4 + 16) * 0.5, mean over the batch
    assert td3.critic_loss(td_error, jnp.array([1.0, 0.5])) == pytest.approx(0.5 * (1 + 10) / 2)


def test_smoothing_noise_is_cut_and_so_is_the_action():
    action = jnp.zeros((10_000, 1))
    normals = jax.random.normal(jax.random.key(0), action.shape)
    noise = np.asarray(td3.smoothed(action, normals, 0.2, 0.5))
    assert np.abs(noise).max() == pytest.approx(0.5)  # 2.5 deviations are often passed
    assert noise.std() == pytest.approx(0.2, rel=0.05)
    at_bound = td3.smoothed(action + 1.0, normals, 0.2, 0.5)
    assert at_bound.max() == 1.0
    assert at_bound.min() == pytest.approx(0.5)


def test_policy_and_targets_move_every_second_gradient_step():
    train = checks.pendulum(
        td3, train_every=1, num_gradient_steps=1, num_steps=1, learning_starts=0
    )
    state, update = jax.jit(train.init)(jax.random.key(0)), jax.jit(train.update)

    def same(a, b):
        return jax.tree.all(jax.tree.map(np.array_equal, a, b))

    for moved in (False, True, False, True):
        before, state = state.learner, update(state)[0]
        after = state.learner
        assert not same(after.critics, before.critics)
        assert same(after.policy, before.policy) != moved
        assert same(after.target_policy, before.target_policy) != moved
        assert same(after.target_critics, before.target_critics) != moved


# promises -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chunks_equal_one_program_bit_for_bit():
    checks.check_chunks(td3)


def test_two_seeds_differ_from_the_start():
    checks.check_seeds_differ(td3, ("policy", "critics"))


@pytest.mark.slow
def test_vmap_over_the_real_settings_equals_single_runs():
    checks.check_sweep(td3)


def test_all_real_settings_are_leaves_and_sizes_are_not():
    checks.check_leaves(td3)


def test_a_saved_policy_acts_as_the_trained_one(tmp_path):
    checks.check_saved(td3, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(policy_delay=0), "policy_delay = 0 must be an integer >= 1"),
        (dict(tau=0.0), r"tau = 0.0 must lie in \(0.0, 1.0\]"),
        (dict(learning_rate=0.0), "learning_rate = 0.0 must lie in"),
        (dict(exploration_noise=-0.1), "exploration_noise = -0.1 must lie in"),
        (dict(target_noise=-0.1), "target_noise = -0.1 must lie in"),
        (dict(target_noise_clip=float("nan")), "target_noise_clip = nan must lie in"),
        (dict(hidden=(64, 0)), r"hidden = \(64, 0\)"),
    ],
)
def test_bad_settings_are_refused_in_words(change, words):
    checks.check_refused(td3, "Pendulum-v1", change, words)


def test_discrete_actions_are_refused():
    checks.check_refused(td3, "CartPole-v1", {}, "TD3 needs real actions, .* 2 discrete ones")


# what it learns -----------------------------------------------------------------------------------

PROBE = td3.Config(**checks.PROBE, exploration_noise=0.3)


@pytest.fixture(scope="module")
def learnt():
    return checks.Learnt(td3, PROBE)


def test_probe_values(learnt):
    net = CriticNet(PROBE.hidden, PROBE.activation)

    def q(learner, obs, action):
        return jax.vmap(lambda p: net.values(p, obs, action))(learner.critics)

    checks.check_values(learnt, q)


def test_probe_real_actions(learnt):
    checks.check_real_actions(learnt)


@pytest.mark.slow
def test_learns_pendulum():
    """>= -160 mean return over 8 seeds within 30k steps."""
    score = checks.scores(td3, "Pendulum-v1", td3.Config(**checks.PENDULUM))
    assert score.mean() >= -160.0, score
