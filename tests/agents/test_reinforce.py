"""REINFORCE: its estimate by hand, its promises as a pure program, and what it must learn."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl.envs  # noqa: F401  (registers the rover)
from jaxrl import normalize, rollout, spaces
from jaxrl.agents import reinforce
from tests import probes
from train import _presets

SMALL = reinforce.Config(
    total_steps=4 * 8 * 6,
    num_envs=4,
    num_steps=8,
    num_states=8,
    num_rollouts=2,
    max_rollout_steps=20,
    num_value_steps=2,
    hidden=(8,),
)


def cartpole(config=SMALL):
    env, params = gymnax.make("CartPole-v1")
    return reinforce.make_train(config, env, params)


def assert_same(a, b):
    """Bit for bit: NaN equals NaN, keys are compared by their data."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


# the estimate, by hand ----------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # log probabilities log(1/2), log(1/4), weights 3 and -1
    log_prob, weight = jnp.log(jnp.array([0.5, 0.25])), jnp.array([3.0, -1.0])
    loss = reinforce.policy_loss(log_prob, weight)
    assert loss == pytest.approx((3 * np.log(2) - np.log(4)) / 2)  # = log(2) / 2
    # its gradient in log pi is -weight / B, and the weight is a number, not a function
    by_log_prob, by_weight = jax.grad(reinforce.policy_loss, argnums=(0, 1))(log_prob, weight)
    assert by_log_prob == pytest.approx([-1.5, 0.5])
    assert by_weight == pytest.approx([0.0, 0.0])


def test_mean_of_others_by_hand():
    baseline = reinforce.mean_of_others(jnp.array([1.0, 2.0, 6.0]))
    assert baseline == pytest.approx([4.0, 3.5, 1.5])


def test_weights_by_hand():
    returns, baseline = jnp.array([1.0, 5.0]), jnp.array([2.0, 2.0])
    assert reinforce.weights(returns, baseline, None) == pytest.approx([-1.0, 3.0])
    stats = normalize.RunningStats(jnp.float32(7.0), jnp.float32(4.0), jnp.float32(1.0))
    assert reinforce.weights(returns, baseline, stats) == pytest.approx([-0.5, 1.5])


def test_value_is_in_units_of_the_return():
    net = reinforce.ValueNet((4,))
    obs = jnp.ones((3, 2))
    params = net.init(jax.random.key(0), obs)
    stats = normalize.RunningStats(jnp.float32(7.0), jnp.float32(4.0), jnp.float32(1.0))
    value = reinforce.state_value(net, params, stats, obs)
    np.testing.assert_allclose(value, 7.0 + 2.0 * net.apply(params, obs), rtol=1e-6)
    loss = reinforce.value_loss(params, net, obs, net.apply(params, obs) + jnp.array([0.0, 1, 2]))
    assert loss == pytest.approx(0.5 * (0 + 1 + 4) / 3, rel=1e-5)


def test_trajectory_returns_by_hand():
    """gamma 1/2, three environments: one terminates, one is cut, one goes on; and both flags."""
    reward = jnp.array([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0]])
    no = [False] * 4
    terminated = jnp.array([no, [True, False, False, True], no])
    truncated = jnp.array([no, [False, True, False, True], no])
    beyond_cut = jnp.full((3, 4), 8.0)  # counts at a cut only
    rest = jnp.array([16.0, 16.0, 16.0, 16.0])
    returns = reinforce.trajectory_returns(reward, terminated, truncated, beyond_cut, rest, 0.5)
    last = 4 + 0.5 * 16
    np.testing.assert_allclose(
        returns,
        [
            [1 + 0.5 * 2, 1 + 0.5 * 6, 1 + 0.5 * 8, 1 + 0.5 * 2],
            [2, 2 + 0.5 * 8, 2 + 0.5 * last, 2],
            [last] * 4,
        ],
    )
    # ended in the last row: what goes on there is another episode
    ends = jnp.array([True, False, False, False]), jnp.array([False, True, False, False])
    last_row = reinforce.trajectory_returns(
        reward[-1:], ends[0][None], ends[1][None], beyond_cut[:1], rest, 0.5
    )
    np.testing.assert_allclose(last_row, [[4, 4 + 0.5 * 8, last, last]])


def with_bias(state, bias):
    """The state with the given last bias in its policy, and with last weights 0: logits = bias."""
    layers = dict(state.params["policy"]["params"]["MLP_0"])
    name = max(layers)
    layers[name] = {"kernel": jnp.zeros_like(layers[name]["kernel"]), "bias": jnp.asarray(bias)}
    policy = {"params": {"MLP_0": layers}}
    return state.replace(params={**state.params, "policy": policy}), name


@pytest.mark.parametrize(
    ("returns", "baseline"),
    [("rollouts", "none"), ("rollouts", "mean"), ("rollouts", "value"), ("episode", "mean")],
)
def test_the_gradient_of_an_update_is_the_analytic_one(returns, baseline):
    """Two arms paying -1 and 1: J = p1 - p0, so dJ / db1 = 2 p0 p1 = -dJ / db0."""
    config = SMALL.replace(
        num_envs=64,
        num_steps=128,
        total_steps=64 * 128,
        num_states=4096,
        returns=returns,
        baseline=baseline,
        normalize_returns=False,
        normalize_obs=False,
        max_grad_norm=1e6,
    )
    env = probes.ActionDecides()
    train = reinforce.make_train(config, env, env.default_params)
    state, name = with_bias(train.init(jax.random.key(0)), jnp.array([0.5, -0.5]))
    if baseline == "value":  # of a network that knows nothing: b(s) = 2 is no harm
        stats = normalize.RunningStats(jnp.float32(2.0), jnp.float32(0.0), jnp.float32(1.0))
        state = state.replace(return_stats=stats)
    state, metrics = jax.jit(train.update)(state)
    mu = state.opt_state["policy"][1].mu["params"]["MLP_0"][name]["bias"]
    gradient = -np.asarray(mu) / 0.1  # mu = (1 - 0.9) * gradient of the loss
    p1 = 1.0 / (1.0 + np.e)
    p0 = 1.0 - p1
    # of one sample w (1{a = 1} - p1), w = +-1 - b: the variance by hand
    b = {"none": 0.0, "mean": p1 - p0, "value": 2.0}[baseline]
    samples, p = np.array([(1 - b) * p0, (-1 - b) * -p1]), np.array([p1, p0])
    mean = (samples * p).sum()
    error = ((((samples - mean) ** 2) * p).sum() / reinforce.batch_size(config)) ** 0.5
    assert mean == pytest.approx(2 * p0 * p1)
    assert error < 0.05 * mean
    assert gradient[1] == pytest.approx(mean, abs=4 * error)
    assert gradient[0] == pytest.approx(-mean, abs=4 * error)
    assert metrics["return_mean"] == pytest.approx(p1 - p0, abs=0.1)


def test_simulated_steps_are_counted():
    """TwoSteps: of 32 visited states half are the first (two steps to go), half the last (one)."""
    env = probes.TwoSteps()
    config = SMALL.replace(num_states=32, num_rollouts=3, total_steps=32)
    train = reinforce.make_train(config, env, env.default_params)
    _, metrics = jax.jit(train)(jax.random.key(0))
    assert train.steps_per_update == 32
    assert metrics["rollout_steps"].tolist() == [3 * (16 * 2 + 16 * 1)]
    assert metrics["return_error"].tolist() == [0.0]
    # all states drawn, each once: gamma 0.99 from the first, 1 from the last
    assert metrics["return_mean"][0] == pytest.approx((0.99 + 1.0) / 2)
    # the trajectory's own return: what it lacks is nothing, each window ends with an episode
    train = reinforce.make_train(config.replace(returns="episode"), env, env.default_params)
    _, metrics = jax.jit(train)(jax.random.key(0))
    assert metrics["return_mean"][0] == pytest.approx((0.99 + 1.0) / 2)
    assert "return_error" not in metrics


def test_a_trajectory_is_completed_by_rollouts_from_where_it_stands():
    """One step an update: half the time the episode is unfinished, and its rest is simulated."""
    env = probes.TwoSteps()
    config = SMALL.replace(
        num_steps=1, total_steps=2 * 4, returns="episode", baseline="none", num_rollouts=1
    )
    train = reinforce.make_train(config, env, env.default_params)
    _, metrics = jax.jit(train)(jax.random.key(0))
    assert metrics["return_mean"] == pytest.approx([0.99, 1.0])
    assert metrics["rollout_steps"].tolist() == [4 * 1, 4 * 2]  # the second: of new episodes


@pytest.mark.slow
def test_rollouts_leave_the_acting_environments_alone():
    """What the actors see is the same whether few or many rollouts are run beside them."""

    def run(**change):
        config = SMALL.replace(total_steps=32, **change)
        return jax.jit(cartpole(config))(jax.random.key(5))[0].actors

    assert_same(run(num_rollouts=1), run(num_rollouts=3, max_rollout_steps=4))


def test_gradient_is_clipped_by_its_global_norm():
    train = cartpole(SMALL.replace(max_grad_norm=1e-3))
    state, metrics = jax.jit(train.update)(train.init(jax.random.key(0)))
    assert metrics["grad_norm"] > 1e-2  # as it was before clipping
    norm = jnp.sqrt(sum(jnp.sum(m**2) for m in jax.tree.leaves(state.opt_state["policy"][1].mu)))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)  # mu = (1 - 0.9) * gradient


# promises -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("returns", ["rollouts", "episode"])
def test_chunks_equal_one_program_bit_for_bit(returns):
    train = cartpole(SMALL.replace(returns=returns))
    whole_state, whole = jax.jit(train)(jax.random.key(3))
    chunk = jax.jit(train.run, static_argnums=1)
    state, parts = jax.jit(train.init)(jax.random.key(3)), []
    for length in (2, 2, 2):  # one size, so that little is compiled
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


@pytest.mark.slow
def test_vmap_over_seeds_equals_single_runs():
    train = cartpole(SMALL.replace(total_steps=64))
    keys = jax.random.split(jax.random.key(0), 3)
    _, many = jax.jit(jax.vmap(train))(keys)
    _, one = jax.jit(train)(keys[1])
    np.testing.assert_allclose(many["return_mean"][1], one["return_mean"], rtol=1e-3)
    np.testing.assert_allclose(many["value_loss"][1], one["value_loss"], rtol=1e-3)
    assert len(np.unique(many["return_mean"])) == 6


@pytest.mark.slow
def test_vmap_over_the_real_settings_equals_single_runs():
    env, params = gymnax.make("Pendulum-v1")
    config = SMALL.replace(total_steps=64)
    # every real field at once, each with two values
    configs = jax.tree.map(lambda x: jnp.array([x + 0.01, (x + 0.01) / 2]), config)
    key = jax.random.key(0)

    def run(config):
        return reinforce.make_train(config, env, params)(key)[1]

    many = jax.jit(jax.vmap(run))(configs)
    one = jax.jit(run)
    for i in range(2):
        single = one(jax.tree.map(lambda x, i=i: x[i], configs))
        for name in ("value_loss", "policy_loss", "entropy", "learning_rate"):
            np.testing.assert_allclose(many[name][i], single[name], rtol=1e-2, atol=1e-4)
    assert not np.allclose(many["return_mean"][0], many["return_mean"][1])


def test_all_real_settings_are_leaves_and_sizes_are_not():
    names = {f.name for f in dataclasses.fields(SMALL)}
    static = {f.name for f in dataclasses.fields(SMALL) if f.metadata.get("pytree_node") is False}
    reals = {n for n in names if isinstance(getattr(SMALL, n), float)}
    assert reals == names - static
    assert len(jax.tree.leaves(SMALL)) == len(reals)


def test_steps_asked_are_steps_run_and_rounding_is_said():
    assert cartpole().total_steps == SMALL.total_steps
    with pytest.warns(UserWarning, match=r"total_steps = 100 .* 128 steps will be run"):
        train = cartpole(SMALL.replace(total_steps=100))
    assert train.total_steps == 128


def test_the_learning_rate_falls_linearly_and_the_normaliser_sees_every_step():
    state, metrics = jax.jit(cartpole())(jax.random.key(0))
    left = 1.0 - np.arange(6) / 6
    np.testing.assert_allclose(metrics["learning_rate"], SMALL.learning_rate * left, rtol=1e-5)
    assert state.num_updates == 6
    assert state.obs_stats.count == SMALL.total_steps
    assert state.return_stats.count == 6 * SMALL.num_states


def test_without_a_learned_baseline_there_is_no_value_network():
    state = cartpole(SMALL.replace(baseline="mean")).init(jax.random.key(0))
    assert set(state.params) == set(state.opt_state) == {"policy"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(num_rollouts=0), "num_rollouts = 0 must be an integer >= 1"),
        (dict(max_rollout_steps=1.5), "max_rollout_steps = 1.5 must be an integer >= 1"),
        (dict(num_states=33), r"num_states = 33 must be at most num_envs \* num_steps = 4 \* 8"),
        (dict(returns="td"), "returns = 'td' must be one of 'rollouts', 'episode'"),
        (dict(baseline="median"), "baseline = 'median' must be one of 'value', 'mean', 'none'"),
        (dict(baseline="mean", num_states=1), "num_states = 1.*raise them"),
        (dict(gamma=1.5), r"gamma = 1.5 must lie in \[0.0, 1.0\]"),
        (dict(learning_rate=float("nan")), "learning_rate = nan"),
        (dict(value_learning_rate=0.0), "value_learning_rate = 0.0 must lie in"),
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

PROBE = reinforce.Config(
    total_steps=16 * 16 * 60,
    num_envs=16,
    num_steps=16,
    num_states=64,
    num_rollouts=2,
    normalize_obs=False,
    gamma=0.9,
    learning_rate=1e-2,
    hidden=(32,),
)


def learn(env, config=PROBE, num_seeds=3):
    """Train; return V(o) per seed and deterministic action per seed, as functions of o."""
    params = env.default_params
    train = reinforce.make_train(config, env, params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), num_seeds))
    action = spaces.action_spec(env.action_space(params))
    act = reinforce.make_act(config, action, (1,))
    net = reinforce.ValueNet(config.hidden, config.activation)

    def value(o):
        return jax.vmap(
            lambda s: reinforce.state_value(net, s.params["value"], s.return_stats, jnp.array([o]))
        )(state)

    def policy(o):
        return jax.vmap(lambda p: act(p, jnp.array([o])))(jax.vmap(reinforce.get_policy)(state))

    return value, policy


def test_probe_value_depends_on_the_observation():
    value, _ = learn(probes.RewardIsObs())
    np.testing.assert_allclose(value(1.0), 1.0, atol=0.05)
    np.testing.assert_allclose(value(-1.0), -1.0, atol=0.05)


@pytest.mark.parametrize("returns", ["rollouts", "episode"])
def test_probe_value_is_discounted(returns):
    value, _ = learn(probes.TwoSteps(), PROBE.replace(returns=returns))
    np.testing.assert_allclose(value(0.0), 0.9, atol=0.03)
    np.testing.assert_allclose(value(1.0), 1.0, atol=0.03)


@pytest.mark.parametrize("baseline", ["none", "mean"])  # "value" copies the observation below
def test_probe_discrete_action_decides(baseline):
    _, policy = learn(probes.ActionDecides(), PROBE.replace(baseline=baseline))
    assert (policy(0.0) == 1).all()


def test_probe_discrete_action_copies_the_observation():
    _, policy = learn(probes.CopyObs())
    assert (policy(1.0) == 1).all()
    assert (policy(-1.0) == 0).all()


@pytest.mark.parametrize("squash", ["tanh", "clip"])
def test_probe_real_action_copies_the_observation(squash):
    # a narrow start: under a wide deviation cut by the bounds the best mean is not the best action
    config = PROBE.replace(squash=squash, total_steps=16 * 16 * 200, initial_log_std=-1.0)
    _, policy = learn(probes.CopyObs(continuous=True), config)
    np.testing.assert_allclose(policy(0.5), 0.5, atol=0.1)
    np.testing.assert_allclose(policy(-0.5), -0.5, atol=0.1)


@pytest.mark.parametrize("returns", ["rollouts", "episode"])
def test_probe_truncation_is_bootstrapped_from_before_the_reset(returns):
    config = PROBE.replace(total_steps=16 * 16 * 200, returns=returns)
    value, _ = learn(probes.ResetIsWorthless(), config)
    np.testing.assert_allclose(value(0.0), 10.0, rtol=0.03)  # 1 / (1 - 0.9)
    np.testing.assert_allclose(value(-1.0), 9.0, rtol=0.03)


def test_probe_a_rollout_broken_off_is_bootstrapped():
    """No end within sight: rollouts of 3 steps, V = 1 / (1 - 0.9) all the same."""
    config = PROBE.replace(total_steps=16 * 16 * 200, max_rollout_steps=3)
    env = probes.NeverEnds()
    value, _ = learn(env, config)
    np.testing.assert_allclose(value(0.0), 10.0, rtol=0.03)


# what it learns: the rover and the classic --------------------------------------------------------


def preset(env_id, **change):
    """Config and environment of the script's preset."""
    found = _presets.REINFORCE[env_id]
    env, params = gymnax.make(env_id, **found.env_kwargs)
    return reinforce.Config(**found.config).replace(**change), env, params


@pytest.mark.parametrize(
    ("gamma", "best"),
    [pytest.param(0.5, [0, 0, 0, 1], marks=pytest.mark.slow), (0.9, [0, 0, 0, 0])],
)
def test_solves_the_rover(gamma, best):
    """The most likely action is the optimal one in every state that is not terminal, on 8 seeds.

    gamma 0.5: the lecture's table. 0.9: left everywhere, 0.9^4 * 100 = 65.6 > 0.9 * 40 in state 5.
    """
    config, env, params = preset("MarsRover-v0", gamma=gamma)
    train = reinforce.make_train(config, env, params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 8))
    act = reinforce.make_act(config, spaces.Discrete(2), (6,))
    actions = jax.vmap(lambda p: act(p, jnp.eye(6)[1:5]))(jax.vmap(reinforce.get_policy)(state))
    np.testing.assert_array_equal(actions, [best] * 8)


def cartpole_returns(config, env, params, num_seeds):
    """Deterministic evaluation returns, mean per seed, after training (num_seeds,)."""
    train = reinforce.make_train(config, env, params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), num_seeds))
    act = reinforce.make_act(config, spaces.Discrete(2), (4,))

    def evaluate(policy, key):
        episodes = rollout.evaluate(env, params, lambda obs, _: act(policy, obs), key, 32)
        return episodes.returns.mean()

    keys = jax.random.split(jax.random.key(1), num_seeds)
    return np.asarray(jax.jit(jax.vmap(evaluate))(jax.vmap(reinforce.get_policy)(state), keys))


@pytest.mark.slow
def test_solves_cartpole():
    """>= 475 mean return over 4 seeds, by rollouts from 128 of 512 visited states an update."""
    score = cartpole_returns(*preset("CartPole-v1"), num_seeds=4)
    assert score.mean() >= 475.0, score


@pytest.mark.slow
def test_solves_cartpole_by_the_trajectory_s_own_return():
    """>= 475 mean return over 4 seeds, the classical estimate."""
    config, env, params = preset("CartPole-v1", returns="episode", num_rollouts=1)
    score = cartpole_returns(config, env, params, num_seeds=4)
    assert score.mean() >= 475.0, score
