"""PPO: its losses by hand, its promises as a pure program, and what it must learn."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import rollout, spaces
from jaxrl.agents import ppo
from tests import probes

SMALL = ppo.Config(total_steps=4 * 8 * 6, num_envs=4, num_steps=8, num_epochs=2, num_minibatches=2)


def cartpole(config=SMALL):
    env, params = gymnax.make("CartPole-v1")
    return ppo.make_train(config, env, params)


def batch(**kwargs):
    zero = jnp.zeros(2)
    fields = dict(
        obs=zero[:, None], action=zero, log_prob=zero, value=zero, advantage=zero, target=zero
    )
    return ppo.Batch(**(fields | {k: jnp.asarray(v) for k, v in kwargs.items()}))


def assert_same(a, b):
    """Bit for bit: NaN equals NaN, keys are compared by their data."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


# the losses, by hand ------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # ratios 2 and 1/2. Advantage 1: min(2, 1.2) = 1.2; advantage -1: min(-0.5, -0.8) = -0.8
    log_prob = jnp.log(jnp.array([2.0, 0.5]))
    loss = ppo.policy_loss(log_prob, batch(advantage=[1.0, -1.0]), 0.2)
    assert loss == pytest.approx(-(1.2 - 0.8) / 2)


def test_clipped_policy_loss_has_no_gradient_where_the_ratio_left_the_interval():
    grad = jax.grad(ppo.policy_loss)(
        jnp.log(jnp.array([2.0, 1.1])), batch(advantage=[1.0, 1.0]), 0.2
    )
    assert grad == pytest.approx([0.0, -1.1 / 2])  # d ratio / d log_prob = ratio


def test_value_loss_by_hand():
    b = batch(value=[0.0, 0.0], target=[1.0, 1.0])
    value = jnp.array([0.5, 2.0])
    assert ppo.value_loss(value, b, 0.2, False) == pytest.approx(0.5 * (0.25 + 1.0) / 2)
    # clipped: both move by at most 0.2, to 0.2, where the error is 0.64: the worse counts
    assert ppo.value_loss(value, b, 0.2, True) == pytest.approx(0.5 * (0.64 + 1.0) / 2)


def test_gradient_is_clipped_by_its_global_norm():
    # one minibatch, one epoch, SGD-like: compare Adam's first moment with the clipped gradient
    config = SMALL.replace(num_epochs=1, num_minibatches=1, max_grad_norm=1e-3)
    state, metrics = cartpole(config).run(cartpole(config).init(jax.random.key(0)), 1)
    assert metrics["grad_norm"][0] > 1e-2  # as it was before clipping
    mu = state.opt_state[1].mu
    norm = jnp.sqrt(sum(jnp.sum(m**2) for m in jax.tree.leaves(mu)))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)  # mu = (1 - 0.9) * gradient


def test_networks_that_learn_apart_are_clipped_each_for_itself():
    config = SMALL.replace(num_epochs=1, num_minibatches=1, max_grad_norm=1e-3, learn_apart=True)
    state, metrics = cartpole(config).run(cartpole(config).init(jax.random.key(0)), 1)
    for name in ("policy", "value"):
        assert metrics[f"{name}_grad_norm"][0] > 1e-2  # as it was before clipping
        mu = state.opt_state[name][1].mu
        assert jnp.linalg.norm(mu) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_learning_apart_is_learning_together_where_nothing_is_clipped():
    config = SMALL.replace(max_grad_norm=1e6)
    together, found = jax.jit(cartpole(config))(jax.random.key(3))
    apart, others = jax.jit(cartpole(config.replace(learn_apart=True)))(jax.random.key(3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        together.params,
        apart.params,
    )
    for name in found.keys() - {"grad_norm"}:
        np.testing.assert_allclose(found[name], others[name], rtol=1e-3, atol=1e-5, err_msg=name)


# promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 5, 512, 8192, 10_000])
def test_shuffle_holds_every_row_once(num_rows):
    order = ppo.shuffle(jax.random.key(0), num_rows)
    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))


def test_shuffle_puts_any_row_anywhere():
    """Of four rows all 24 orders come equally often: 100 each of 2,400, within 4.5 deviations."""
    keys = jax.random.split(jax.random.key(0), 2400)
    orders = jax.vmap(lambda key: ppo.shuffle(key, 4))(keys)
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts - 100).max() < 45


def test_chunks_equal_one_program_bit_for_bit():
    train = cartpole()
    whole_state, whole = jax.jit(train)(jax.random.key(3))
    chunk = jax.jit(train.run, static_argnums=1)
    state, parts = jax.jit(train.init)(jax.random.key(3)), []
    for length in (1, 2, 3):
        state, metrics = chunk(state, length)
        parts.append(metrics)
    assert_same(state, whole_state)
    assert_same(jax.tree.map(lambda *m: jnp.concatenate(m), *parts), whole)


def test_two_seeds_differ_from_the_start():
    """A shared key would show here: networks, starts and the loop's key must all differ."""
    a, b = (cartpole().init(jax.random.key(i)) for i in (0, 1))

    def kernel(state, net):
        return state.params[net]["params"]["MLP_0"]["Dense_0"]["kernel"]

    assert not np.allclose(kernel(a, "policy"), kernel(b, "policy"))
    assert not np.allclose(kernel(a, "value"), kernel(b, "value"))
    assert not np.allclose(a.actors.obs, b.actors.obs)
    assert not np.array_equal(jax.random.key_data(a.key), jax.random.key_data(b.key))
    assert len(np.unique(np.asarray(a.actors.obs), axis=0)) == SMALL.num_envs


def test_same_key_same_result():
    assert_same(jax.jit(cartpole())(jax.random.key(7)), jax.jit(cartpole())(jax.random.key(7)))


def test_vmap_over_seeds_equals_single_runs():
    train = cartpole()
    keys = jax.random.split(jax.random.key(0), 3)
    _, many = jax.jit(jax.vmap(train))(keys)
    _, one = jax.jit(train)(keys[1])
    np.testing.assert_allclose(many["value_loss"][1], one["value_loss"], rtol=1e-3)


def test_vmap_over_the_real_settings_equals_single_runs():
    env, params = gymnax.make("Pendulum-v1")
    # every real field at once, each with two values
    configs = jax.tree.map(lambda x: jnp.array([x + 0.01, (x + 0.01) / 2]), SMALL)
    key = jax.random.key(0)

    def run(config):
        return ppo.make_train(config, env, params)(key)[1]

    many = jax.jit(jax.vmap(run))(configs)
    for i in range(2):
        one = jax.jit(run)(jax.tree.map(lambda x, i=i: float(x[i]), configs))
        for name in ("value_loss", "policy_loss", "entropy"):
            np.testing.assert_allclose(many[name][i], one[name], rtol=1e-2, atol=1e-4)
    assert not np.allclose(many["value_loss"][0], many["value_loss"][1])


def test_one_real_setting_is_swept_as_the_docstring_says():
    env, params = gymnax.make("CartPole-v1")
    configs = SMALL.replace(learning_rate=jnp.array([1e-4, 1e-2]))
    axes = jax.tree.map(lambda _: None, SMALL).replace(learning_rate=0)

    def run(config, key):
        return ppo.make_train(config, env, params)(key)[1]["learning_rate"][0]

    rates = jax.jit(jax.vmap(run, in_axes=(axes, None)))(configs, jax.random.key(0))
    np.testing.assert_allclose(rates, configs.learning_rate)


def test_all_real_settings_are_leaves_and_sizes_are_not():
    names = {f.name for f in dataclasses.fields(SMALL)}
    static = {f.name for f in dataclasses.fields(SMALL) if f.metadata.get("pytree_node") is False}
    reals = {n for n in names if isinstance(getattr(SMALL, n), float)}
    assert reals == names - static
    assert len(jax.tree.leaves(SMALL)) == len(reals)


def test_steps_asked_are_steps_run():
    train = cartpole()
    assert train.total_steps == SMALL.total_steps
    state = train(jax.random.key(0))[0]
    assert state.num_updates == train.num_updates == 6


def test_rounding_is_said_before_training():
    with pytest.warns(UserWarning, match=r"total_steps = 100 .* 128 steps will be run"):
        train = cartpole(SMALL.replace(total_steps=100))
    assert train.total_steps == 128


def test_the_learning_rate_falls_linearly_to_its_last_value():
    _, metrics = jax.jit(cartpole())(jax.random.key(0))
    left = 1.0 - np.arange(6) / 6
    np.testing.assert_allclose(metrics["learning_rate"], SMALL.learning_rate * left, rtol=1e-5)


def test_rollout_and_loss_of_the_first_minibatch_see_the_same_policy():
    """With one epoch of one minibatch nothing has moved yet: ratio 1, KL 0, nothing clipped."""
    env, params = gymnax.make("Pendulum-v1")
    config = SMALL.replace(num_epochs=1, num_minibatches=1)
    _, metrics = jax.jit(ppo.make_train(config, env, params))(jax.random.key(0))
    np.testing.assert_allclose(metrics["approx_kl"], 0.0, atol=1e-5)
    np.testing.assert_array_equal(metrics["clip_fraction"], 0.0)


def test_normaliser_holds_the_statistics_of_what_was_seen():
    train = cartpole()
    state = train.init(jax.random.key(0))
    assert state.obs_stats.count == 0
    state, _ = jax.jit(train.run, static_argnums=1)(state, 2)
    assert state.obs_stats.count == 2 * SMALL.num_envs * SMALL.num_steps
    assert (state.obs_stats.var > 0).all()
    assert state.obs_stats.var.max() < 1.0  # CartPole starts within 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(total_steps=-5), "total_steps = -5 must be an integer >= 1"),
        (
            dict(num_minibatches=3),
            r"num_minibatches = 3 must divide num_envs \* num_steps = 4 \* 8",
        ),
        (dict(num_minibatches=32), "minibatches of one step"),
        (dict(gamma=1.5), r"gamma = 1.5 must lie in \[0.0, 1.0\]"),
        (dict(gamma=float("nan")), "gamma = nan"),
        (dict(learning_rate=0.0), "learning_rate = 0.0 must lie in"),
        (dict(max_grad_norm=float("inf")), "max_grad_norm = inf must lie in"),
        (dict(hidden=(64, 0)), r"hidden = \(64, 0\)"),
        (dict(activation="swishy"), "activation = 'swishy' must be one of 'tanh'"),
        (dict(squash="round"), "squash = 'round' must be one of 'tanh', 'clip'"),
        (dict(state_dependent_std=True), "needs real actions, but this environment has 2 discrete"),
    ],
)
def test_bad_settings_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        cartpole(SMALL.replace(**change))


# what it learns: the probes -----------------------------------------------------------------------

PROBE = ppo.Config(
    total_steps=16 * 16 * 100,
    num_envs=16,
    num_steps=16,
    learning_rate=3e-3,
    normalize_obs=False,
    normalize_reward=False,
    gamma=0.9,
    max_grad_norm=10.0,
)


def learn(env, config=PROBE, num_seeds=3):
    """Train; return V(o) per seed and deterministic action per seed, as functions of o."""
    params = env.default_params
    train = ppo.make_train(config, env, params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), num_seeds))
    action = spaces.action_spec(env.action_space(params))
    act = ppo.make_act(config, action, (1,))
    net = ppo.ValueNet(config.hidden, config.activation)

    def value(o):
        return jax.vmap(lambda p: net.apply(p, jnp.array([o])))(state.params["value"])

    def policy(o):
        return jax.vmap(lambda p: act(p, jnp.array([o])))(jax.vmap(ppo.get_policy)(state))

    return value, policy


def test_probe_value_of_a_constant_reward():
    value, _ = learn(probes.ConstantReward())
    np.testing.assert_allclose(value(0.0), 1.0, atol=0.02)


def test_probe_value_depends_on_the_observation():
    value, _ = learn(probes.RewardIsObs())
    np.testing.assert_allclose(value(1.0), 1.0, atol=0.05)
    np.testing.assert_allclose(value(-1.0), -1.0, atol=0.05)


def test_probe_value_is_discounted():
    value, _ = learn(probes.TwoSteps())
    np.testing.assert_allclose(value(0.0), 0.9, atol=0.03)
    np.testing.assert_allclose(value(1.0), 1.0, atol=0.03)


@pytest.mark.parametrize("squash", ["tanh", "clip"])
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_probe_real_action_decides(squash, state_dependent_std):
    # the bonus keeps the deviation from collapsing before tanh is saturated
    config = PROBE.replace(squash=squash, state_dependent_std=state_dependent_std, ent_coef=0.01)
    _, policy = learn(probes.ActionDecides(continuous=True), config)
    assert (policy(0.0) > 0.95).all(), policy(0.0)


def test_probe_discrete_action_decides():
    value, policy = learn(probes.ActionDecides())
    assert (policy(0.0) == 1).all()
    np.testing.assert_allclose(value(0.0), 1.0, atol=0.05)


def test_probe_discrete_action_copies_the_observation():
    _, policy = learn(probes.CopyObs())
    assert (policy(1.0) == 1).all()
    assert (policy(-1.0) == 0).all()


@pytest.mark.parametrize("squash", ["tanh", "clip"])
def test_probe_real_action_copies_the_observation(squash):
    _, policy = learn(probes.CopyObs(continuous=True), PROBE.replace(squash=squash))
    np.testing.assert_allclose(policy(0.5), 0.5, atol=0.1)
    np.testing.assert_allclose(policy(-0.5), -0.5, atol=0.1)


def test_probe_truncation_is_bootstrapped():
    value, _ = learn(probes.NeverEnds(), PROBE.replace(total_steps=16 * 16 * 300))
    np.testing.assert_allclose(value(0.0), 10.0, rtol=0.03)  # 1 / (1 - 0.9); 4.1 if cut means end


def test_probe_truncation_is_bootstrapped_from_before_the_reset():
    value, _ = learn(probes.ResetIsWorthless(), PROBE.replace(total_steps=16 * 16 * 300))
    np.testing.assert_allclose(value(0.0), 10.0, rtol=0.03)
    np.testing.assert_allclose(value(-1.0), 9.0, rtol=0.03)


# what it learns: the classics ---------------------------------------------------------------------


def returns(name, config, num_seeds, num_episodes=32):
    """Deterministic evaluation returns, mean per seed, after training (num_seeds,)."""
    env, params = gymnax.make(name)
    train = ppo.make_train(config, env, params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), num_seeds))
    act = ppo.make_act(
        config,
        spaces.action_spec(env.action_space(params)),
        spaces.obs_shape(env.observation_space(params)),
    )

    def evaluate(policy, key):
        episodes = rollout.evaluate(env, params, lambda obs, _: act(policy, obs), key, num_episodes)
        return episodes.returns.mean()

    keys = jax.random.split(jax.random.key(1), num_seeds)
    return np.asarray(jax.jit(jax.vmap(evaluate))(jax.vmap(ppo.get_policy)(state), keys))


CARTPOLE = ppo.Config(
    total_steps=499_712, num_envs=4, num_steps=128, learning_rate=2.5e-4, ent_coef=0.01
)


PENDULUM = ppo.Config(
    total_steps=2**18,
    num_envs=8,
    num_steps=256,
    num_epochs=10,
    num_minibatches=16,
    learning_rate=1e-3,
    gamma=0.95,
)


@pytest.mark.slow
def test_learns_pendulum():
    """>= -200 mean return over 8 seeds within 1M steps; a quarter of them is enough."""
    score = returns("Pendulum-v1", PENDULUM, num_seeds=8)
    assert score.mean() >= -200.0, score


def test_learns_cartpole():
    """>= 475 mean return over 8 seeds within 500k steps."""
    score = returns("CartPole-v1", CARTPOLE, num_seeds=8)
    assert score.mean() >= 475.0, score


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixteen_seeds_of_200k_steps_do_not_hang():
    """Batched LAPACK can wait for itself on CPU (networks.orthogonal); these end, and learn."""
    config = CARTPOLE.replace(total_steps=200_192)
    score = returns("CartPole-v1", config, num_seeds=16)
    assert score.mean() >= 400.0, score
