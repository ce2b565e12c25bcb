"""SAC: its losses by hand, its promises as a pure program, and what it must learn."""

import math

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import off_policy, spaces
from jaxrl.agents import sac
from jaxrl.networks import CriticNet, QNet
from tests import probes
from tests.agents import off_policy_checks as checks

# the losses, by hand ------------------------------------------------------------------------------


def test_soft_value_of_a_drawn_action_by_hand():
    q = jnp.array([[1.0, 5.0], [2.0, 3.0]])  # of two critics for two observations
    # min 1 and 3; minus 0.5 log pi
    assert sac.soft_value(q, jnp.array([-2.0, 4.0]), 0.5) == pytest.approx([2.0, 1.0])


def test_soft_value_of_discrete_actions_by_hand():
    q = jnp.array([[[1.0, 2.0]], [[3.0, 0.0]]])  # min: 1 and 0
    log_probs = jnp.log(jnp.array([[0.25, 0.75]]))
    expected = 0.25 * (1.0 - 0.1 * math.log(0.25)) + 0.75 * (0.0 - 0.1 * math.log(0.75))
    assert sac.soft_value_discrete(q, log_probs, 0.1) == pytest.approx([expected])


def test_soft_value_of_a_certain_policy_is_finite_and_so_is_its_gradient():
    q, logits = jnp.array([[[1.0, 2.0]]] * 2), jnp.array([[0.0, 1e4]])

    def value(logits):
        return sac.soft_value_discrete(q, jax.nn.log_softmax(logits), 0.1).sum()

    assert value(logits) == pytest.approx(2.0)  # log(probability) would be -inf, the product NaN
    assert np.isfinite(jax.grad(value)(logits)).all()


def test_critic_loss_by_hand():
    td_error = jnp.array([[1.0, 2.0], [0.0, 4.0]])
    # half of (1 + 0) * 1 and (4 + 16) * 0.5, mean over the batch
    assert sac.critic_loss(td_error, jnp.array([1.0, 0.5])) == pytest.approx(0.5 * (1 + 10) / 2)


def test_the_temperature_rises_while_the_entropy_is_too_low():
    grad = jax.grad(sac.alpha_loss)(0.0, jnp.array([-3.0, -2.0]), -1.0)
    assert grad == pytest.approx(-1.5)  # mean entropy -2.5, target -1: descent raises log alpha


def test_one_gradient_step_follows_the_equations():
    """Learn once from one stored step; compare the critics' gradient, by Adam's first moment."""
    config = sac.Config(**checks.SMALL).replace(
        train_every=1, num_gradient_steps=1, num_envs=1, num_steps=1, batch_size=1
    )
    config = config.replace(learning_starts=1, total_steps=2, gamma=0.0, max_grad_norm=1e9)
    env, params = gymnax.make("Pendulum-v1")
    train = sac.make_train(config, env, params)
    before = jax.jit(train.init)(jax.random.key(0))
    after, _ = jax.jit(train.update)(before)
    data = after.replay.data
    net = CriticNet(config.hidden, config.activation)

    def loss(critics):
        q = jax.vmap(net.values, (0, None, None))(critics, data.obs[0], data.action[0])
        return 0.5 * ((q - data.reward[0][None]) ** 2).sum()  # gamma 0: the target is the reward

    grads = jax.flatten_util.ravel_pytree(jax.grad(loss)(before.learner.critics))[0]
    np.testing.assert_allclose(after.learner.critic_opt[1].mu, 0.1 * grads, rtol=1e-4, atol=1e-6)
    # the target networks moved by tau, to the new critics
    jax.tree.map(
        lambda old, new, target: np.testing.assert_allclose(
            target, old + config.tau * (new - old), atol=1e-6
        ),
        before.learner.critics,
        after.learner.critics,
        after.learner.target_critics,
    )


@pytest.mark.parametrize("learn_apart", [False, True])
def test_the_policy_learns_from_new_critics_or_apart_from_the_old(learn_apart):
    """One gradient step with critics that move, beside one with critics that stay as they were."""
    once = dict(train_every=1, num_gradient_steps=1, num_envs=1, num_steps=1, batch_size=1)
    once |= dict(learning_starts=1, total_steps=3, learn_apart=learn_apart)
    rate, tiny = 3e-2, 1e-9

    def policy_gradient(**settings):
        """Adam's first moment, and how far the critics moved."""
        train = checks.pendulum(sac, **once, **settings)
        state = jax.jit(train.init)(jax.random.key(0))
        if learn_apart:  # its first batch comes from the round before
            state, metrics = jax.jit(train.update)(state)
            assert metrics["num_gradient_steps"] == 0
        learner = jax.jit(train.update)(state)[0].learner
        moved = jax.tree.map(lambda a, b: a - b, learner.critics, state.learner.critics)
        return learner.policy_opt[1].mu, max(np.abs(x).max() for x in jax.tree.leaves(moved))

    moving, how_far = policy_gradient(learning_rate=rate)
    still, not_far = policy_gradient(learning_rate=tiny, actor_rate_factor=rate / tiny)
    assert how_far > 1e-2
    assert not_far < 1e-6
    assert np.allclose(moving, still, rtol=1e-3, atol=1e-7) == learn_apart


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_apart_the_newest_policy_has_acted_for_the_batch_that_is_next(env):
    """Before learning starts as after: else the first gradient step would learn from zeros."""
    env, params = gymnax.make(env)
    once = dict(num_steps=2, train_every=2, learning_starts=16, total_steps=8 * 6)
    config = sac.Config(**(checks.SMALL | once), learn_apart=True)
    spec, _ = spaces.read(env, params)
    train = sac.make_train(config, env, params)
    state, update = jax.jit(train.init)(jax.random.key(0)), jax.jit(train.update)
    learnt = []
    for _ in range(6):
        state, metrics = update(state)
        learnt.append(int(metrics["num_gradient_steps"]))
        assert state.batches.reward.shape == (3, 16)
        pi = sac.policy_net(config, spec).policy(state.learner.policy, state.batches.next_obs[0])
        *action, log_prob = state.learner.next_act
        # actions are far from the bounds at the start
        expected = pi.log_prob(jnp.arctanh(action[0])) if action else jax.nn.log_softmax(pi.logits)
        assert np.abs(log_prob).max() > 1e-3
        np.testing.assert_allclose(log_prob, expected, rtol=1e-3, atol=1e-4)
    # 8 steps a round: 16 are stored after the second
    assert learnt == [0, 3, 3, 3, 3, 3]


def test_apart_batches_are_of_the_replay_of_the_round_before():
    once = dict(num_envs=1, num_steps=1, train_every=1, learning_starts=0, total_steps=5)
    train = checks.pendulum(sac, **once, learn_apart=True)
    state, update = jax.jit(train.init)(jax.random.key(0)), jax.jit(train.update)
    for _ in range(4):
        state, metrics = update(state)
        stored = np.asarray(state.replay.data.obs)[: int(state.replay.size), 0]
        is_stored = (np.asarray(state.batches.obs)[:, :, None] == stored).all(-1)
        assert is_stored.any(-1).all()
        assert is_stored.any((0, 1)).all(), "none of 48 draws is of one of the few transitions"
    assert metrics["num_gradient_steps"] == 3
    config = sac.Config(**(checks.SMALL | once), learn_apart=True)
    assert off_policy.num_gradient_steps(config, prepares=True) == 4 * 3


# promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_apart", [False, True])
def test_chunks_equal_one_program_bit_for_bit(learn_apart):
    checks.check_chunks(sac, learn_apart=learn_apart)


def test_two_seeds_differ_from_the_start():
    checks.check_seeds_differ(sac, ("policy", "critics"))


def test_the_two_critics_differ_from_the_start():
    critics = jax.jit(checks.pendulum(sac).init)(jax.random.key(0)).learner.critics
    kernel = critics["params"]["MLP_0"]["Dense_0"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.slow
def test_vmap_over_the_real_settings_equals_single_runs():
    checks.check_sweep(sac)


def test_all_real_settings_are_leaves_and_sizes_are_not():
    checks.check_leaves(sac)


def test_a_saved_policy_acts_as_the_trained_one(tmp_path):
    checks.check_saved(sac, tmp_path)


def test_a_saved_discrete_policy_acts_as_the_trained_one(tmp_path):
    checks.check_saved(sac, tmp_path, "CartPole-v1")


def test_actions_are_uniform_before_learning_starts():
    train = checks.pendulum(
        sac, learning_starts=2_000, total_steps=3_200, num_steps=400, buffer_size=1_600
    )
    state, _ = jax.jit(lambda key: train.update(train.init(key)))(jax.random.key(0))
    action = np.asarray(state.replay.data.action)
    assert action.shape == (400, 4, 1)
    assert np.histogram(action, bins=4, range=(-1, 1))[0] == pytest.approx(400, abs=80)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(train_every=3), "train_every = 3 must divide num_steps = 8"),
        (dict(learning_starts=200), "learning_starts = 200 must be below total_steps = 192"),
        (dict(tau=0.0), r"tau = 0.0 must lie in \(0.0, 1.0\]"),
        (dict(learning_rate=float("nan")), "learning_rate = nan must lie in"),
        (dict(actor_rate_factor=0.0), "actor_rate_factor = 0.0 must lie in"),
        (dict(initial_alpha=0.0), "initial_alpha = 0.0 must lie in"),
        (dict(target_entropy=1.0), "target_entropy = 1.0 must lie in"),
        (dict(target_entropy_ratio=1.5), "target_entropy_ratio = 1.5 must lie in"),
        (dict(hidden=(64, 0)), r"hidden = \(64, 0\)"),
        (dict(activation="swishy"), "activation = 'swishy' must be one of 'tanh'"),
    ],
)
def test_bad_settings_are_refused_in_words(change, words):
    checks.check_refused(sac, "Pendulum-v1", change, words)


# what it learns: the probes -----------------------------------------------------------------------

# a fixed small temperature: the values are those without the entropy
PROBE = sac.Config(**checks.PROBE, learn_alpha=False, initial_alpha=1e-3)


@pytest.fixture(scope="module")
def learnt():
    return checks.Learnt(sac, PROBE)


@pytest.fixture(scope="module")
def learnt_discrete():
    config = PROBE.replace(learn_alpha=True, initial_alpha=0.1, target_entropy_ratio=0.6)
    return checks.Learnt(sac, config, continuous=False)


def test_probe_values(learnt):
    net = CriticNet(PROBE.hidden, PROBE.activation)

    def q(learner, obs, action):
        return jax.vmap(lambda p: net.values(p, obs, action))(learner.critics)

    checks.check_values(learnt, q)


def test_probe_real_actions(learnt):
    checks.check_real_actions(learnt)


def test_probe_discrete_actions(learnt_discrete):
    assert (learnt_discrete.action(probes.ActionDecides, 0.0) == 1).all()
    assert (learnt_discrete.action(probes.CopyObs, 1.0) == 1).all()
    assert (learnt_discrete.action(probes.CopyObs, -1.0) == 0).all()


def test_probe_discrete_values(learnt_discrete):
    net = QNet(PROBE.hidden, 2, PROBE.activation)

    def q(learner, obs, action):
        return jax.vmap(lambda p: net.values(p, obs))(learner.critics)

    # episodes of one step: nothing follows, so the entropy adds nothing
    np.testing.assert_allclose(learnt_discrete.value(probes.RewardIsObs, q, -1.0), -1.0, atol=0.05)
    np.testing.assert_allclose(
        learnt_discrete.value(probes.ActionDecides, q, 0.0),
        np.broadcast_to([-1.0, 1.0], (3, 2, 2)),
        atol=0.05,
    )


def test_the_temperature_brings_the_entropy_to_its_target(learnt_discrete):
    metrics = learnt_discrete.of(probes.ActionDecides, learnt_discrete.metrics)
    entropy = metrics["entropy"][:, -3:]
    np.testing.assert_allclose(entropy, 0.6 * math.log(2.0), atol=0.05)
    config = PROBE.replace(learn_alpha=True, initial_alpha=0.1, target_entropy=-0.5)
    env, params = probes.ActionDecides(continuous=True), probes.Params()
    _, metrics = jax.jit(sac.make_train(config, env, params))(jax.random.key(0))
    np.testing.assert_allclose(metrics["entropy"][-3:], -0.5, atol=0.1)


# what it learns: the classics ---------------------------------------------------------------------


def test_learns_pendulum():
    """>= -160 mean return over 8 seeds within 30k steps."""
    score = checks.scores(sac, "Pendulum-v1", sac.Config(**checks.PENDULUM))
    assert score.mean() >= -160.0, score
