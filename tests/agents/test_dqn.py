"""DQN: its parts by hand, its promises as a pure program, and what it must learn."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl.envs  # noqa: F401  (registers the rover)
from jaxrl import planning, policy, rollout, spaces
from jaxrl.agents import dqn
from jaxrl.networks import QNet
from jaxrl.replay import Batch
from tests import probes
from train import _presets

SMALL = dqn.Config(
    total_steps=4 * 8 * 6,
    num_envs=4,
    num_steps=8,
    num_gradient_steps=2,
    batch_size=16,
    buffer_size=100,
    learning_starts=40,
)


def cartpole(config=SMALL):
    env, params = gymnax.make("CartPole-v1")
    return dqn.make_train(config, env, params)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


# the parts, by hand -------------------------------------------------------------------------------


def test_target_by_hand():
    batch = Batch(
        obs=None,
        action=None,
        reward=jnp.array([1.0, 2.0]),
        discount=jnp.array([0.5, 0.0]),  # the second step terminated
        next_obs=None,
    )
    q, q_target = jnp.array([[1.0, 3.0], [5.0, 4.0]]), jnp.array([[10.0, 20.0], [30.0, 40.0]])
    # the larger of the target's own: 1 + 0.5 * 20
    np.testing.assert_allclose(dqn.td_target(batch, q, q_target, double=False), [11.0, 2.0])
    q = q[:, ::-1]  # now the online network prefers action 0: 1 + 0.5 * 10
    np.testing.assert_allclose(dqn.td_target(batch, q, q_target, double=True), [6.0, 2.0])


def test_loss_by_hand():
    error, weight = jnp.array([0.5, -3.0]), jnp.array([1.0, 0.5])
    # squared: 0.5 * 0.25 and 0.5 * 0.5 * 9; Huber: the second is 0.5 * (3 - 0.5)
    assert dqn.td_loss(error, weight, "squared") == pytest.approx((0.125 + 2.25) / 2)
    assert dqn.td_loss(error, weight, "huber") == pytest.approx((0.125 + 1.25) / 2)


def test_epsilon_by_hand():
    config = dqn.Config(epsilon_start=1.0, epsilon_end=0.01, epsilon_fraction=0.5)
    steps = jnp.array([0, 250, 500, 900])  # of 1000
    linear = [dqn.epsilon(config, step, 1000) for step in steps]
    np.testing.assert_allclose(linear, [1.0, 0.505, 0.01, 0.01], rtol=1e-5)
    config = config.replace(epsilon_decay="exponential")
    exponential = [dqn.epsilon(config, step, 1000) for step in steps]
    np.testing.assert_allclose(exponential, [1.0, 0.1, 0.01, 0.01], rtol=1e-5)


def test_epsilon_greedy_is_greedy_but_for_epsilon():
    q = jnp.broadcast_to(jnp.array([0.0, 2.0, 1.0]), (30_000, 3))
    u = jax.random.uniform(jax.random.key(0), (30_000,))
    action = np.asarray(dqn.epsilon_greedy(q, u, 0.3))
    share = np.bincount(action) / action.size
    np.testing.assert_allclose(share, [0.1, 0.8, 0.1], atol=0.01)  # 5 deviations
    assert (dqn.epsilon_greedy(q, u, 0.0) == 1).all()


@pytest.mark.parametrize("num_actions", [2, 3, 12])  # 12: a product, not a column for each
@pytest.mark.parametrize("width", [8, 40])  # 40: kept transposed, the 20 samples along columns
def test_dueling_values_are_value_and_centred_advantages(num_actions, width):
    net = QNet((width,), num_actions, dueling=True)
    obs = jax.random.normal(jax.random.key(0), (20, 4))
    params = net.init(jax.random.key(1), obs)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape) / x.size, params)
    first, head = (params["params"]["MLP_0"][f"Dense_{i}"] for i in (0, 1))
    assert head["kernel"].shape == (width, 1 + num_actions)  # the value and the advantages
    weights = first["kernel"] if "kernel" in first else first["weight"].T
    hidden = jax.nn.relu(obs @ weights + first["bias"][None])
    heads = np.asarray(hidden @ head["kernel"] + head["bias"][None], np.float64)
    value, advantages = heads[:, :1], heads[:, 1:]
    expected = value + advantages - advantages.mean(1, keepdims=True)  # Wang et al. eq. 9
    np.testing.assert_allclose(net.values(params, obs), expected, rtol=1e-5, atol=1e-5)


def test_network_with_the_action_as_input():
    net = QNet((8,), 3, action_input=True)
    obs = jax.random.normal(jax.random.key(0), (5, 4))
    params = net.init(jax.random.key(1), obs)
    assert params["params"]["MLP_0"]["Dense_0"]["kernel"].shape == (4 + 3, 8)
    assert params["params"]["MLP_0"]["Dense_1"]["kernel"].shape == (8, 1)
    # the joined input of the third action, through the layers by hand
    x = jnp.concatenate([obs, jnp.tile(jnp.array([[0.0, 0.0, 1.0]]), (5, 1))], axis=1)
    for name, last in (("Dense_0", False), ("Dense_1", True)):
        layer = params["params"]["MLP_0"][name]
        x = x @ layer["kernel"] + layer["bias"][None, :]
        x = x if last else jax.nn.relu(x)
    np.testing.assert_allclose(net.values(params, obs)[:, 2], x[:, 0], rtol=1e-5)


# promises -----------------------------------------------------------------------------------------

VARIANTS = {
    "plain": SMALL,
    "all": SMALL.replace(
        prioritized=True, n_step=3, dueling=True, train_every=2, normalize_obs=True
    ),
}


@pytest.mark.parametrize("variant", ["plain", pytest.param("all", marks=pytest.mark.slow)])
def test_chunks_equal_one_program_bit_for_bit(variant):
    train = cartpole(VARIANTS[variant])
    whole_state, whole = jax.jit(train)(jax.random.key(3))
    chunk = jax.jit(train.run, static_argnums=1)
    state, parts = jax.jit(train.init)(jax.random.key(3)), []
    for length in (1, 2, 3):
        state, metrics = chunk(state, length)
        parts.append(metrics)
    assert_same(state, whole_state)
    assert_same(jax.tree.map(lambda *m: jnp.concatenate(m), *parts), whole)


def test_two_seeds_differ_from_the_start():
    a, b = (cartpole().init(jax.random.key(i)) for i in (0, 1))
    params = (jax.tree.leaves(x.learner.params) for x in (a, b))
    for x, y in zip(*params, strict=True):
        assert not x.any() or not np.allclose(x, y)  # biases start at 0
    assert not np.allclose(a.actors.obs, b.actors.obs)
    assert not np.array_equal(jax.random.key_data(a.key), jax.random.key_data(b.key))


def test_sixteen_seeds_are_one_program_and_each_is_its_own_run():
    train = cartpole()
    keys = jax.random.split(jax.random.key(0), 16)
    state, many = jax.jit(jax.vmap(train))(keys)
    _, one = jax.jit(train)(keys[11])
    np.testing.assert_allclose(many["loss"][11], one["loss"], rtol=1e-3)
    assert len(np.unique(np.asarray(many["loss"][:, -1]))) == 16
    assert state.replay.data.reward.shape == (16, 25, 4)


@pytest.mark.slow
def test_vmap_over_the_real_settings_equals_single_runs():
    env, params = gymnax.make("CartPole-v1")
    config = VARIANTS["all"]
    # every real field at once, each with two values
    configs = jax.tree.map(lambda x: jnp.array([x * 0.95, x * 0.5]), config)
    key = jax.random.key(0)

    def run(config):
        return dqn.make_train(config, env, params)(key)[1]

    many = jax.jit(jax.vmap(run))(configs)
    for i in range(2):
        one = jax.jit(run)(jax.tree.map(lambda x, i=i: float(x[i]), configs))
        np.testing.assert_allclose(many["loss"][i], one["loss"], rtol=1e-2, atol=1e-4)
    assert not np.allclose(many["loss"][0], many["loss"][1])


def test_all_real_settings_are_leaves_and_sizes_are_not():
    names = {f.name for f in dataclasses.fields(SMALL)}
    static = {f.name for f in dataclasses.fields(SMALL) if f.metadata.get("pytree_node") is False}
    reals = {n for n in names if isinstance(getattr(SMALL, n), float)}
    assert reals == names - static
    assert len(jax.tree.leaves(SMALL)) == len(reals)


def test_gradient_steps_are_as_many_as_the_ratio_says():
    _, metrics = jax.jit(cartpole())(jax.random.key(0))
    # 40 steps are stored after 10 of 8 steps of 4: from there, 2 gradient steps after each
    np.testing.assert_array_equal(metrics["num_gradient_steps"], [0, 14, 16, 16, 16, 16])
    assert metrics["loss"][0] == 0.0
    _, metrics = jax.jit(cartpole(SMALL.replace(train_every=4)))(jax.random.key(0))
    np.testing.assert_array_equal(metrics["num_gradient_steps"], [0, 4, 4, 4, 4, 4])


@pytest.mark.parametrize(
    "change", [{}, dict(total_steps=200, learning_starts=0), dict(train_every=4)], ids=str
)
@pytest.mark.filterwarnings("ignore:total_steps")
def test_the_learning_rate_falls_linearly_to_its_last_step(change):
    config = SMALL.replace(anneal_learning_rate=True, num_gradient_steps=1, **change)
    train = cartpole(config)
    state, metrics = jax.jit(train)(jax.random.key(0))
    made = int(state.learner.num_gradient_steps)
    assert made == metrics["num_gradient_steps"].sum()
    # the i-th of n steps has rate (1 - i / n): the mean over the last update's steps
    last = int(metrics["num_gradient_steps"][-1])
    rates = config.learning_rate * (1.0 - np.arange(made - last, made) / made)
    assert metrics["learning_rate"][-1] == pytest.approx(rates.mean(), rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_types_are_kept_where_x64_is_on(variant):
    with jax.enable_x64(True):
        train = cartpole(VARIANTS[variant].replace(anneal_learning_rate=True))
        state, _ = jax.eval_shape(train, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(state.learner.params)} == {jnp.dtype("float32")}


def test_nothing_is_learnt_before_learning_starts():
    train = cartpole()
    start = train.init(jax.random.key(0))
    state, _ = jax.jit(train.run, static_argnums=1)(start, 1)
    assert_same(state.learner, start.learner)
    assert state.replay.size == 8


def test_soft_target_by_hand():
    # one gradient step in all: target = params_0 + tau (params_1 - params_0)
    config = SMALL.replace(total_steps=32, num_gradient_steps=1, learning_starts=30, tau=0.25)
    train = cartpole(config)
    start = train.init(jax.random.key(0))
    state, _ = jax.jit(train.run, static_argnums=1)(start, 1)
    assert state.learner.num_gradient_steps == 1
    for before, after, target in zip(
        *(jax.tree.leaves(t) for t in (start.learner.params, state.learner.params)),
        jax.tree.leaves(state.learner.target_params),
        strict=True,
    ):
        np.testing.assert_allclose(target, before + 0.25 * (after - before), rtol=1e-5, atol=1e-7)


def test_periodic_copy_of_the_target():
    train = cartpole(SMALL.replace(tau=1.0, target_every=15))
    start = train.init(jax.random.key(0))
    run = jax.jit(train.run, static_argnums=1)
    state, _ = run(start, 2)  # 14 gradient steps
    assert_same(state.learner.target_params, start.learner.params)
    state, _ = run(state, 1)  # 30
    assert_same(state.learner.target_params, state.learner.params)


def test_replay_holds_what_happened_before_the_reset():
    env = probes.ResetIsWorthless()
    config = SMALL.replace(num_steps=4, total_steps=96)
    train = dqn.make_train(config, env, env.default_params)
    state, _ = jax.jit(train)(jax.random.key(0))
    data = jax.tree.map(lambda x: np.asarray(x), state.replay.data)
    cut = data.truncated & (np.arange(25) < int(state.replay.size))[:, None]
    assert cut.any()
    assert not data.terminated.any()
    np.testing.assert_array_equal(data.next_obs[cut], 0.0)  # -1 is the one after the reset


def test_a_run_takes_little_more_memory_than_its_state():
    """Buffer and state, donated, within 1.2 times their size: nothing is copied."""
    env, params = gymnax.make("CartPole-v1")
    train = dqn.make_train(dqn.Config(buffer_size=200_000, n_step=3), env, params)
    shapes = jax.eval_shape(train.init, jax.random.key(0))
    run = jax.jit(train.run, static_argnums=1, donate_argnums=0).lower(shapes, 10).compile()
    memory = run.memory_analysis()
    state = memory.argument_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    assert state > 200_000 * 42  # obs and next_obs 32, action and reward 8, two flags 2
    assert state + new <= 1.2 * state, (new, state)


def test_a_saved_policy_acts_as_before(tmp_path):
    env, params = gymnax.make("CartPole-v1")
    config = SMALL.replace(normalize_obs=True)
    state, _ = jax.jit(dqn.make_train(config, env, params))(jax.random.key(0))
    action, obs_shape = spaces.read(env, params)
    saved = policy.SavedPolicy(
        "dqn", config, action, obs_shape, "CartPole-v1", {}, 0, dqn.get_policy(state)
    )
    policy.save_policy(tmp_path / "p.msgpack", saved)
    obs = np.asarray(state.actors.obs)
    expected = dqn.make_act(config, action, obs_shape)(dqn.get_policy(state), obs)
    act = policy.load_policy(tmp_path / "p.msgpack")
    np.testing.assert_array_equal(act(obs), expected)
    assert act(obs[0]).shape == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(train_every=3), "train_every = 3 must divide num_steps = 8"),
        (dict(buffer_size=3), r"buffer_size = 3 must be at least train_every \* num_envs = 4"),
        (dict(learning_starts=192), "learning_starts = 192 must be below total_steps = 192"),
        (dict(learning_starts=-1), "learning_starts = -1 must be an integer >= 0"),
        (dict(batch_size=0), "batch_size = 0"),
        (dict(total_steps=3 * 10**9), r"total_steps = 3000000000 must be below 2\*\*31"),
        (dict(n_step=0), "n_step = 0"),
        (dict(target_every=0), "target_every = 0"),
        (dict(gamma=1.5), r"gamma = 1.5 must lie in \[0.0, 1.0\]"),
        (dict(tau=0.0), r"tau = 0.0 must lie in \(0.0, 1.0\]"),
        (dict(epsilon_start=2.0), "epsilon_start = 2.0"),
        (dict(epsilon_end=0.0, epsilon_decay="exponential"), "epsilon_end = 0.0"),
        (dict(epsilon_decay="cosine"), "epsilon_decay = 'cosine' must be one of 'linear'"),
        (dict(loss="l1"), "loss = 'l1' must be one of 'huber', 'squared'"),
        (dict(learning_rate=float("nan")), "learning_rate = nan"),
        (dict(dueling=True, action_input=True), "dueling = True cannot go with action_input"),
        (dict(buffer_size=10**14), r"buffer_size = 10{14} transitions of 42 bytes each ask for"),
    ],
)
def test_bad_settings_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        cartpole(SMALL.replace(**change))


def test_real_actions_are_refused_in_words():
    env, params = gymnax.make("Pendulum-v1")
    with pytest.raises(ValueError, match="DQN needs discrete actions, but this environment has 1"):
        dqn.make_train(SMALL, env, params)


# what it learns: the probes -----------------------------------------------------------------------

PROBE = dqn.Config(
    total_steps=8 * 16 * 250,
    num_envs=8,
    num_steps=16,
    buffer_size=4_000,
    learning_starts=100,
    gamma=0.9,
    tau=0.05,
    anneal_learning_rate=True,
    epsilon_end=0.2,
)
OPTIONS = {
    "plain": {},
    "single, periodic": dict(double=False, tau=1.0, target_every=20),
    "dueling, huber": dict(dueling=True, loss="huber"),
    "prioritized": dict(prioritized=True),
    "three steps": dict(n_step=3, train_every=2, num_gradient_steps=2),
    "action as input": dict(action_input=True),
}


def learn(env, config=PROBE, num_seeds=2):
    """Train; return Q(o, .) (num_seeds, 2) as a function of o."""
    train = dqn.make_train(config, env, env.default_params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), num_seeds))
    net = dqn.q_net(config, spaces.Discrete(2))
    return lambda o: jax.vmap(lambda p: net.values(p, jnp.array([o])))(state.learner.params)


@pytest.mark.parametrize("option", ["plain", "action as input"])  # the others: below
def test_probe_action_copies_the_observation(option):
    q = learn(probes.CopyObs(), PROBE.replace(**OPTIONS[option]))
    np.testing.assert_allclose(q(1.0), [[-1.0, 1.0]] * 2, atol=0.05)
    np.testing.assert_allclose(q(-1.0), [[1.0, -1.0]] * 2, atol=0.05)


@pytest.mark.parametrize("option", OPTIONS)
def test_probe_truncation_is_bootstrapped_from_before_the_reset(option):
    q = learn(probes.ResetIsWorthless(), PROBE.replace(**OPTIONS[option]))
    np.testing.assert_allclose(q(0.0), 10.0, rtol=0.03)  # 1 / (1 - 0.9); 3.4 if cut means end
    np.testing.assert_allclose(q(-1.0), 9.0, rtol=0.03)


def test_probe_value_is_discounted():
    q = learn(probes.TwoSteps())
    np.testing.assert_allclose(q(0.0), 0.9, atol=0.02)
    np.testing.assert_allclose(q(1.0), 1.0, atol=0.02)


def test_probe_values_of_ended_episodes():
    q = learn(probes.RewardIsObs(), PROBE.replace(normalize_obs=False))
    np.testing.assert_allclose(q(1.0), 1.0, atol=0.02)
    np.testing.assert_allclose(q(-1.0), -1.0, atol=0.02)


# what it learns: the rover, CartPole --------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_rovers_exact_values_within_2_percent(gamma):
    env, params = gymnax.make("MarsRover-v0", start="uniform")
    config = dqn.Config(
        total_steps=16 * 16 * 400,
        num_envs=16,
        num_steps=16,
        buffer_size=10_000,
        learning_rate=2e-3,
        anneal_learning_rate=True,
        gamma=gamma,
        epsilon_end=1.0,  # every pair is visited
        tau=0.02,
        max_grad_norm=100.0,
    )
    state, _ = jax.jit(jax.vmap(dqn.make_train(config, env, params)))(
        jax.random.split(jax.random.key(0), 3)
    )
    net = dqn.q_net(config, spaces.Discrete(2))
    q = jax.vmap(lambda p: net.values(p, jnp.eye(6)))(state.learner.params)
    exact = planning.optimal_q(*env.mdp(params), gamma)
    np.testing.assert_allclose(q, np.broadcast_to(exact, q.shape), rtol=0.02)


def test_learns_cartpole():
    """>= 475 mean return over 8 seeds within 300k steps, by the script's settings."""
    config = dqn.Config(**_presets.DQN["CartPole-v1"].config)
    assert config.total_steps <= 300_000
    env, params = gymnax.make("CartPole-v1")
    train = dqn.make_train(config, env, params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 8))
    act = dqn.make_act(config, spaces.Discrete(2), (4,))

    def evaluate(state, key):
        run = dqn.get_policy(state)
        return rollout.evaluate(env, params, lambda o, _: act(run, o), key, 32).returns.mean()

    score = jax.jit(jax.vmap(evaluate))(state, jax.random.split(jax.random.key(1), 8))
    assert score.mean() >= 475.0, score
