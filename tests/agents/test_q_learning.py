"""Tabular learning: updates by hand, promises as a pure program, the exact Q that must be found."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import planning, policy, spaces
from jaxrl.agents import q_learning
from jaxrl.envs import MarsRover
from jaxrl.types import Policy

SMALL = q_learning.Config(total_steps=4 * 10 * 6, num_envs=4, num_steps=10)
LEFT, RIGHT = 0, 1


def rover_train(config=SMALL, **kwargs):
    rover = MarsRover(**kwargs)
    return q_learning.make_train(config, rover, rover.default_params)


def assert_same(a, b):
    """Bit for bit: NaN equals NaN, keys are compared by their data."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


# the update, by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("q_learning", 5.0),
        ("sarsa", 3.0),  # the next action is 0
        ("expected_sarsa", 0.1 * 3 + 0.9 * 5),  # epsilon 0.2: the other action with 0.1
    ],
)
def test_value_of_what_follows_by_hand(method, value):
    next_q, next_action = jnp.array([[3.0, 5.0]]), jnp.array([0])
    assert q_learning.next_value(method, next_q, next_action, 0.2) == pytest.approx([value])


@pytest.mark.parametrize(
    ("method", "q"),
    [
        ("q_learning", 2 + 0.5 * (1 + 0.9 * 5 - 2)),
        ("sarsa", 2 + 0.5 * (1 + 0.9 * 3 - 2)),
        ("expected_sarsa", 2 + 0.5 * (1 + 0.9 * 4.8 - 2)),
    ],
)
def test_one_update_by_hand(method, q):
    """Q(0, 1) = 2, reward 1, gamma 0.9, then state 1 with Q = (3, 5), step size 1/2."""
    table = jnp.array([[0.0, 2.0], [3.0, 5.0]])
    value = q_learning.next_value(method, table[jnp.array([1])], jnp.array([0]), 0.2)
    state, action = jnp.array([0]), jnp.array([1])
    new, visits, td_error = q_learning.update_table(
        table, jnp.zeros((2, 2)), state, action, 1 + 0.9 * value, 0.5, 0.0
    )
    np.testing.assert_allclose(new, [[0.0, q], [3.0, 5.0]], rtol=1e-6)
    np.testing.assert_array_equal(visits, [[0, 1], [0, 0]])
    assert td_error == pytest.approx([2 * (q - 2)])


def test_environments_that_meet_give_the_mean_of_their_increments():
    state, action = jnp.array([0, 0, 1]), jnp.array([1, 1, 0])
    table = jnp.array([[7.0, 1.0], [0.0, 7.0]])
    new, visits, _ = q_learning.update_table(
        table, jnp.zeros((2, 2)), state, action, jnp.array([3.0, 6.0, 8.0]), 0.5, 0.0
    )
    # (2 + 5) / 2 = 3.5, half of it; and 8, half of it
    np.testing.assert_allclose(new, [[7.0, 1 + 1.75], [4.0, 7.0]])
    np.testing.assert_array_equal(visits, [[0, 1], [1, 0]])


def test_the_step_size_falls_with_the_visits_of_its_own_entry():
    table, visits = jnp.zeros((1, 2)), jnp.array([[3.0, 0.0]])
    at = (jnp.array([0]), jnp.array([0]), jnp.array([1.0]))
    new, visits, _ = q_learning.update_table(table, visits, *at, 1.0, 0.5)
    np.testing.assert_allclose(new, [[0.5, 0.0]])  # the fourth visit: 1 / 4^0.5
    np.testing.assert_array_equal(visits, [[4, 0]])
    # power 1: the mean of all targets
    table, visits = jnp.full((1, 2), 9.0), jnp.zeros((1, 2))
    for target in (1.0, 2.0, 6.0):
        where = (jnp.array([0]), jnp.array([0]), jnp.array([target]))
        table, visits, _ = q_learning.update_table(table, visits, *where, 1.0, 1.0)
    np.testing.assert_allclose(table, [[3.0, 9.0]], rtol=1e-6)


def test_actions_are_drawn_epsilon_greedily_and_ties_are_shared():
    q = jnp.tile(jnp.array([[1.0, 4.0, 4.0]]), (20_000, 1))
    drawn = q_learning.draw(q, 0.3, jax.random.key(0))
    share = np.bincount(drawn, minlength=3) / 20_000
    np.testing.assert_allclose(share, [0.1, 0.45, 0.45], atol=0.015)  # four standard deviations
    assert (q_learning.draw(q, 0.0, jax.random.key(1)) > 0).all()


def first_updates(method, limit, position, **config):
    """The state before and after one update of a rover at `position`; the table is Q = 0 .. 11."""
    env = MarsRover()
    settings = q_learning.Config(total_steps=10, num_envs=1, num_steps=1, method=method, **config)
    params = env.default_params.replace(max_steps_in_episode=limit)
    train = q_learning.make_train(settings, env, params)
    state = jax.jit(train.init)(jax.random.key(0))
    actors = state.actors.replace(
        env_state=state.actors.env_state.replace(position=jnp.array([position])),
        obs=jax.nn.one_hot(jnp.array([position]), 6),
    )
    before = state.replace(actors=actors, q=jnp.arange(12.0).reshape(6, 2))
    return before, jax.jit(train.update)(before)[0]


GREEDY = dict(gamma=0.5, epsilon_start=0.0, epsilon_end=0.0, learning_rate_power=0.0)


@pytest.mark.parametrize("method", q_learning.METHODS)
def test_a_truncated_step_is_bootstrapped_from_before_the_reset(method):
    """From state 3 to 4, cut: 0 + 0.5 * max(8, 9), not state 3's; or to 2: 0.5 * max(4, 5)."""
    before, after = first_updates(method, 1, 3, **GREEDY)
    assert after.actors.env_state.time == 0  # it was cut
    changed = np.argwhere(after.q != before.q)
    # SARSA has drawn its first action from the table of init, all zero
    action = changed[0, 1] if method == "sarsa" else RIGHT
    np.testing.assert_array_equal(changed, [[3, action]])
    assert after.q[3, action] == {LEFT: 0.5 * 5.0, RIGHT: 0.5 * 9.0}[action]


@pytest.mark.parametrize("method", q_learning.METHODS)
def test_nothing_follows_a_terminated_step(method):
    """State 5 pays 40 and ends: Q = 40, whatever the table says of state 5."""
    before, after = first_updates(method, 100, 5, **GREEDY)
    changed = np.argwhere(after.q != before.q)
    assert changed.shape == (1, 2)
    assert changed[0, 0] == 5
    assert after.q[tuple(changed[0])] == 40.0
    assert after.actors.env_state.position == 3  # a new episode


def test_sarsa_learns_from_the_action_that_it_then_takes():
    """Of each step of a random SARSA the target must hold Q of the action taken in the next one."""
    env = MarsRover(start="uniform")
    config = q_learning.Config(
        total_steps=100,
        num_envs=1,
        num_steps=1,
        method="sarsa",
        epsilon_start=1.0,
        epsilon_end=1.0,
        learning_rate=1.0,
        learning_rate_power=0.0,
        gamma=1.0,
    )
    params = env.default_params.replace(max_steps_in_episode=10_000)
    train = q_learning.make_train(config, env, params)
    update = jax.jit(train.update)
    state = jax.jit(train.init)(jax.random.key(0))
    # a table that knows nothing twice: Q tells which action a target came from
    state = state.replace(q=jnp.arange(12.0).reshape(6, 2) ** 2)
    num_checked, seen = 0, set()
    for _ in range(40):
        before, (state, _) = state, update(state)
        position, action = int(before.actors.env_state.position[0]), int(before.action[0])
        q = state.q[position, action]
        if int(state.actors.env_state.time[0]) == 0:  # the episode ended
            assert q == params.rewards[position]
        else:
            following = int(state.actors.env_state.position[0])
            taken = int(state.action[0])
            assert following == position + (1 if action == RIGHT else -1)
            assert q == params.rewards[position] + before.q[following, taken]
            num_checked += 1
            seen.add((action, taken))
    assert num_checked > 15
    assert len(seen) == 4  # not always the same, not always the best


def test_epsilon_falls_linearly_and_then_stays():
    config = SMALL.replace(epsilon_start=0.8, epsilon_end=0.2, epsilon_fraction=0.5)
    _, metrics = jax.jit(rover_train(config))(jax.random.key(0))
    # 60 steps, the fall ends with the 30th; the metric is that of each update's last step
    expected = [0.8 - 0.6 * step / 30 for step in (9, 19, 29)] + [0.2] * 3
    np.testing.assert_allclose(metrics["epsilon"], expected, rtol=1e-5)


# what it finds ------------------------------------------------------------------------------------


def learn(config, num_seeds=4, **kwargs):
    """Tables of several seeds (num_seeds, 6, 2), and the model."""
    rover = MarsRover(**kwargs)
    params = rover.default_params
    train = q_learning.make_train(config, rover, params)
    keys = jax.random.split(jax.random.key(0), num_seeds)
    state, metrics = jax.jit(jax.vmap(train))(keys)
    assert (metrics["visited"][:, -1] == 1).all()
    return state.q, rover.mdp(params)


@pytest.mark.parametrize(("gamma", "observation"), [(0.5, "one_hot"), (0.9, "index")])
def test_finds_the_exact_q_of_the_rover(gamma, observation):
    config = q_learning.Config(total_steps=40_000, gamma=gamma)
    q, model = learn(config, num_seeds=8, observation=observation)
    exact = planning.optimal_q(*model, gamma)
    np.testing.assert_allclose(q, np.broadcast_to(exact, q.shape), rtol=0.01)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_finds_the_exact_q_of_a_rover_that_missteps(gamma):
    """Within 2 % in every entry and seed: with these counts the noise is 0.5 %."""
    config = q_learning.Config(
        total_steps=2_048_000,
        num_envs=256,
        num_steps=100,
        gamma=gamma,
        epsilon_end=1.0,  # Q-learning is off-policy: it may go on exploring
    )
    q, model = learn(config, misstep_prob=0.1)
    exact = planning.optimal_q(*model, gamma)
    np.testing.assert_allclose(q, np.broadcast_to(exact, q.shape), rtol=0.02)


@pytest.mark.parametrize(
    ("method", "gamma"), [("sarsa", 0.5), ("sarsa", 0.9), ("expected_sarsa", 0.5)]
)
def test_sarsa_finds_the_q_of_its_own_policy(method, gamma):
    """The fixed point: Q of the policy that is epsilon-greedy in that very Q, by exact solving."""
    epsilon = 0.3
    config = q_learning.Config(
        total_steps=1_024_000,
        num_envs=64,
        num_steps=100,
        method=method,
        gamma=gamma,
        epsilon_start=epsilon,
        epsilon_end=epsilon,
    )
    q, model = learn(config)
    optimal = planning.optimal_q(*model, gamma)
    fixed = optimal
    for _ in range(10):
        pi = planning.epsilon_greedy(fixed, epsilon)
        value = planning.policy_evaluation(*model, gamma, pi)
        fixed = planning.backup(*model, gamma, value)
    np.testing.assert_allclose(q, np.broadcast_to(fixed, q.shape), rtol=0.01)
    assert (np.abs(fixed / optimal - 1).max()) > 0.15  # it is not the optimal one


# promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["q_learning", "sarsa"])
def test_chunks_equal_one_program_bit_for_bit(method):
    train = rover_train(SMALL.replace(method=method), misstep_prob=0.2)
    whole_state, whole = jax.jit(train)(jax.random.key(3))
    chunk = jax.jit(train.run, static_argnums=1)
    state, parts = jax.jit(train.init)(jax.random.key(3)), []
    for length in (1, 2, 3):
        state, metrics = chunk(state, length)
        parts.append(metrics)
    assert_same(state, whole_state)
    assert_same(jax.tree.map(lambda *m: jnp.concatenate(m), *parts), whole)


def test_vmap_over_seeds_equals_single_runs_and_seeds_differ():
    train = rover_train(misstep_prob=0.2)
    keys = jax.random.split(jax.random.key(0), 3)
    many, _ = jax.jit(jax.vmap(train))(keys)
    for i in range(3):
        one, _ = jax.jit(train)(keys[i])
        np.testing.assert_allclose(many.q[i], one.q, rtol=1e-5)
    assert not np.allclose(many.q[0], many.q[1])
    assert not np.allclose(many.q[1], many.q[2])


def test_vmap_over_the_real_settings_equals_single_runs():
    rover = MarsRover(misstep_prob=0.2)
    configs = jax.tree.map(lambda x: jnp.array([x * 0.9 + 0.01, x * 0.5 + 0.02]), SMALL)

    def run(config):
        return q_learning.make_train(config, rover, rover.default_params)(jax.random.key(0))[0].q

    many = jax.jit(jax.vmap(run))(configs)
    for i in range(2):
        one = jax.jit(run)(jax.tree.map(lambda x, i=i: float(x[i]), configs))
        np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-4)
    assert not np.allclose(many[0], many[1])


def test_all_real_settings_are_leaves_and_sizes_are_not():
    names = {f.name for f in dataclasses.fields(SMALL)}
    static = {f.name for f in dataclasses.fields(SMALL) if f.metadata.get("pytree_node") is False}
    reals = {n for n in names if isinstance(getattr(SMALL, n), float)}
    assert reals == names - static
    assert len(jax.tree.leaves(SMALL)) == len(reals)


def test_rounding_is_said_before_training():
    with pytest.warns(UserWarning, match=r"total_steps = 100 .* 120 steps will be run"):
        train = rover_train(SMALL.replace(total_steps=100))
    assert (train.total_steps, train.num_updates) == (120, 3)


def test_a_policy_is_saved_loaded_and_acts(tmp_path):
    config = SMALL.replace(epsilon_end=0.5)
    q = jnp.array([[0.0, 1.0]] * 3 + [[2.0, 1.0]] * 3)
    saved = policy.SavedPolicy(
        agent="q_learning",
        config=config,
        action=spaces.Discrete(2),
        obs_shape=(6,),
        env="MarsRover-v0",
        env_kwargs={},
        seed=0,
        policy=Policy({"q": q}, None),
    )
    policy.save_policy(tmp_path / "policy.msgpack", saved)
    act = policy.load_policy(tmp_path / "policy.msgpack")
    np.testing.assert_array_equal(act(np.eye(6)), [1, 1, 1, 0, 0, 0])
    assert act(np.eye(6)[4]) == 0
    drawn = act(np.tile(np.eye(6)[:1], (4000, 1)), seed=0)
    assert drawn.mean() == pytest.approx(0.75, abs=0.04)  # epsilon_end: 0.5 / 2 the other one
    index = dataclasses.replace(saved, obs_shape=())
    assert index.act_fn()(index.policy, jnp.arange(6)).tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(method="dyna"), "method = 'dyna' must be one of 'q_learning', 'sarsa'"),
        (dict(learning_rate=1.5), r"learning_rate = 1.5 must lie in \(0.0, 1.0\]"),
        (dict(learning_rate_power=-0.5), r"learning_rate_power = -0.5 must lie in \[0.0, 1.0\]"),
        (dict(gamma=float("nan")), "gamma = nan"),
        (dict(epsilon_end=2.0), "epsilon_end = 2.0 must lie in"),
        (dict(initial_q=float("inf")), "initial_q = inf must lie in"),
    ],
)
def test_bad_settings_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        rover_train(SMALL.replace(**change))


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("CartPole-v1", "observation space Box.* is not supported by a table"),
        ("Pendulum-v1", "is not supported by a table"),
        ("Catch-bsuite", "is not supported by a table"),
    ],
)
def test_environments_without_a_table_are_refused_in_words(env_id, words):
    with pytest.raises(ValueError, match=words):
        q_learning.check_config(SMALL, *gymnax.make(env_id))


def test_an_observation_that_is_not_one_hot_is_not_passed_over():
    class TwoPlaces(MarsRover):
        """Claims to be one-hot, and shows the neighbour of state 4 too."""

        def observe(self, key, state, action, params):
            obs = super().observe(key, state, action, params)
            return jnp.where(state.position == 4, obs.at[3].set(1.0), obs)

    rover = TwoPlaces(start=4)
    train = q_learning.make_train(SMALL, rover, rover.default_params)
    state, metrics = jax.jit(train)(jax.random.key(0))
    assert jnp.isnan(metrics["td_error"]).any()
    assert jnp.isnan(state.q).any()
