"""Exact planning: the lecture's numbers, Frozen Lake's known ones, and what an answer promises."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.misc import frozen_lake

from jaxrl import planning
from jaxrl.envs import MarsRover

LEFT, RIGHT = 0, 1
env = MarsRover()
params = env.default_params
SOLVERS = [planning.policy_iteration, planning.value_iteration]


# the lecture's numbers (its states 1 .. 6 are 0 .. 5 here) ----------------------------------------


@pytest.mark.parametrize("solve", SOLVERS)
def test_optimal_values_and_policy_at_one_half(solve):
    solution = solve(*env.mdp(params), 0.5)
    np.testing.assert_allclose(solution.value, [100, 50, 25, 12.5, 20, 40], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(solution.action[1:5], [LEFT, LEFT, LEFT, RIGHT])
    expected = {
        (1, RIGHT): 12.5,
        (1, LEFT): 50,
        (3, LEFT): 12.5,
        (3, RIGHT): 10,
        (4, LEFT): 6.25,
        (4, RIGHT): 20,
        (2, LEFT): 25,
        (0, LEFT): 100,
        (0, RIGHT): 100,
        (5, LEFT): 40,
        (5, RIGHT): 40,
    }
    for (state, action), q in expected.items():
        assert solution.q[state, action] == pytest.approx(q, abs=1e-5)
    assert solution.residual == solution.error_bound == 0.0


@pytest.mark.parametrize(
    ("gamma", "left", "right"),
    [
        (0.9, 72.9, 32.4),
        (0.3, 2.7, 3.6),  # the lecture prints these two beside "discount 0.4"
        (0.4, 6.4, 6.4),  # where there is a tie
    ],
)
def test_returns_of_always_left_and_always_right(gamma, left, right):
    for action, expected in ((LEFT, left), (RIGHT, right)):
        policy = jnp.full(6, action)
        value = planning.policy_evaluation(*env.mdp(params), gamma, policy)
        assert value[3] == pytest.approx(expected, abs=1e-5)


def test_the_best_direction_from_the_start_turns_at_0_4():
    def tied(gamma):
        q = planning.optimal_q(*env.mdp(params), gamma)
        return planning.greedy(q)[3].tolist()

    assert tied(0.39) == [False, True]
    assert tied(0.4) == [True, True]
    assert tied(0.41) == [True, False]


def test_values_of_the_random_policy_by_hand():
    """gamma = 1: V is the mean of the neighbours, so that it is a line from 100 to 40."""
    policy = jnp.full((6, 2), 0.5)
    value = planning.policy_evaluation(*env.mdp(params), 1.0, policy)
    np.testing.assert_allclose(value, [100, 88, 76, 64, 52, 40], atol=1e-4)


def test_a_misstep_by_hand():
    """Three states, start in the middle: V(1) = gamma (0.9 * 100 + 0.1 * 40) = 47 at 1/2."""
    rover = MarsRover(length=3, start=1, misstep_prob=0.1)
    q = planning.optimal_q(*rover.mdp(rover.default_params), 0.5)
    np.testing.assert_allclose(q[1], [47.0, 0.5 * (0.1 * 100 + 0.9 * 40)], atol=1e-5)


# what an answer promises --------------------------------------------------------------------------


def random_mdp(seed, num_states=30, num_actions=4):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(num_states, 0.3), size=(num_states, num_actions))
    reward = rng.normal(size=(num_states, num_actions))
    terminal = rng.random(num_states) < 0.1
    return transition, reward, terminal


def numpy_optimal_q(transition, reward, terminal, gamma, num_sweeps=20_000):
    """Value iteration in float64, written out."""
    value = np.zeros(len(reward))
    q = reward
    for _ in range(num_sweeps):
        q = reward + gamma * ~terminal[:, None] * (transition @ value)
        if np.array_equal(q.max(axis=1), value):
            break
        value = q.max(axis=1)
    return q


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99])
def test_solvers_agree_with_float64_on_random_problems(solve, gamma):
    for seed in range(3):
        mdp = random_mdp(seed)
        solution = solve(*mdp, gamma)  # NumPy arrays will do
        expected = numpy_optimal_q(*mdp, gamma)
        np.testing.assert_allclose(solution.q, expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(solution.value, solution.q.max(axis=1))
        np.testing.assert_array_equal(solution.action, solution.q.argmax(axis=1))


def test_policy_evaluation_solves_bellman_s_equation_in_float64_too():
    transition, reward, terminal = random_mdp(3)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), size=30)
    p = np.einsum("sa,san->sn", policy, transition) * ~terminal[:, None]
    expected = np.linalg.solve(np.eye(30) - 0.95 * p, (policy * reward).sum(axis=1))
    arrays = (jnp.float32(transition), jnp.float32(reward), jnp.asarray(terminal))
    value = planning.policy_evaluation(*arrays, 0.95, jnp.float32(policy))
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)


def test_the_error_bound_of_value_iteration_holds_and_is_by_hand():
    """One sweep from 0 at gamma 1/2: V = R, the next backup changes it by 50, so 50 at most."""
    solution = planning.value_iteration(*env.mdp(params), 0.5, max_iterations=1)
    assert (solution.num_iterations, solution.residual, solution.error_bound) == (1, 50.0, 50.0)
    error = jnp.abs(solution.value - jnp.array([100, 50, 25, 12.5, 20, 40])).max()
    assert error == 25.0  # the values are those after the backup
    assert planning.value_iteration(*env.mdp(params), 1.0).error_bound == jnp.inf


def test_value_iteration_stops_by_its_tolerance():
    """A state that pays 1 for ever: sweep k changes it by gamma^(k - 1)."""
    one = (jnp.ones((1, 1, 1)), jnp.ones(1), jnp.zeros(1, bool))
    solution = planning.value_iteration(*one, 0.5, tolerance=0.1)
    assert solution.num_iterations == 5  # 0.5^4 = 0.0625 is the first below 0.1
    assert solution.value == pytest.approx(2 - 0.5**5)
    assert solution.error_bound == pytest.approx(2 - solution.value[0])  # the bound is tight here


@pytest.mark.parametrize("gamma", [0.0, 0.4, 0.9, 1.0])
def test_policy_iteration_ends_where_everything_is_tied(gamma):
    """Equal actions, equal states: a rule that moves among equals would never end."""
    transition = jnp.full((8, 3, 8), 1 / 8)
    terminal = jnp.arange(8) == 0
    for reward in (jnp.zeros(8), jnp.full(8, 0.1)):
        solution = planning.policy_iteration(transition, reward, terminal, gamma)
        assert solution.num_iterations <= 3
        assert jnp.isfinite(solution.value).all()


def test_policy_iteration_takes_few_policies_on_a_long_line():
    rover = MarsRover(length=200, start="uniform", misstep_prob=0.1)
    solution = planning.policy_iteration(*rover.mdp(rover.default_params), 0.99)
    expected = numpy_optimal_q(
        *(np.asarray(x) for x in rover.mdp(rover.default_params)[:1]),
        np.asarray(rover.default_params.rewards, np.float64)[:, None] * np.ones((1, 2)),
        rover.mdp(rover.default_params).terminal,
        0.99,
    )
    np.testing.assert_allclose(solution.q, expected, rtol=1e-4, atol=1e-4)
    assert solution.num_iterations < 100


def test_without_terminal_states_the_time_limit_is_not_seen():
    """Three states that pay 1, 2, 3: stay at the right end for ever, V = 3 / (1 - 0.9)."""
    rover = MarsRover(length=3, rewards=(1, 2, 3), terminal=(), start=0)
    value = planning.policy_iteration(*rover.mdp(rover.default_params), 0.9).value
    np.testing.assert_allclose(value, [1 + 0.9 * (2 + 0.9 * 30), 2 + 0.9 * 30, 30], rtol=1e-5)


def test_a_row_that_sums_to_less_than_one_ends_the_episode_with_the_rest():
    # one state: pays 1, goes on with probability 1/2: V = 1 + 0.8 V / 2
    mdp = (jnp.full((1, 1, 1), 0.5), jnp.ones((1, 1)), jnp.zeros(1, bool))
    for solve in SOLVERS:
        assert solve(*mdp, 0.8).value == pytest.approx(1 / 0.6, rel=1e-5)


@pytest.mark.parametrize("solve", SOLVERS)
def test_one_call_sweeps_gamma_missteps_and_rewards(solve):
    def q(gamma, misstep_prob, rewards):
        law = params.replace(misstep_prob=misstep_prob, rewards=rewards)
        return solve(*env.mdp(law), gamma).q

    rewards = jnp.array([[100.0, 0, 0, 0, 0, 40], [1, 2, 3, 4, 5, 6]])
    over_rewards = jax.vmap(q, in_axes=(None, None, 0))
    over_missteps = jax.vmap(over_rewards, in_axes=(None, 0, None))
    sweep = jax.jit(jax.vmap(over_missteps, in_axes=(0, None, None)))
    gammas, missteps = jnp.array([0.3, 0.5, 0.99]), jnp.array([0.0, 0.1])
    many = sweep(gammas, missteps, rewards)
    assert many.shape == (3, 2, 2, 6, 2)
    for i, gamma in enumerate(gammas):
        for j, misstep_prob in enumerate(missteps):
            for k in range(2):
                one = q(float(gamma), float(misstep_prob), rewards[k])
                np.testing.assert_allclose(many[i, j, k], one, rtol=1e-5, atol=1e-5)
    assert many[1, 0, 0, 1, LEFT] == 50.0


def test_greedy_knows_ties_and_epsilon_greedy_shares_them():
    q = jnp.array([[1.0, 1.0, 0.0], [-3.0, -2.0, -2.0 - 1e-6]])
    np.testing.assert_array_equal(planning.greedy(q), [[1, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(planning.greedy(q, 0.0), [[1, 1, 0], [0, 1, 0]])
    np.testing.assert_allclose(
        planning.epsilon_greedy(q, 0.3), [[0.45, 0.45, 0.1], [0.1, 0.8, 0.1]], rtol=1e-6
    )


# an environment as arrays -------------------------------------------------------------------------


def numpy_lake(desc, slippery):
    """Frozen Lake from Gymnasium's documentation: P (S, 4, S), R (S, 4), over (S,), in float64.

    Actions left, down, right, up; on slippery ice the direction is the intended one or one of the
    two perpendicular to it, a third each; reaching G pays 1; H and G end the episode.
    """
    rows, columns = len(desc), len(desc[0])
    num_states = rows * columns
    transition, reward = np.zeros((num_states, 4, num_states)), np.zeros((num_states, 4))
    over = np.array([tile in "HG" for line in desc for tile in line])
    for state in range(num_states):
        row, column = divmod(state, columns)
        for action in range(4):
            for turn in (-1, 0, 1) if slippery else (0,):
                direction = (action + turn) % 4
                r, c = row, column
                if direction == 0:
                    c = max(c - 1, 0)
                elif direction == 1:
                    r = min(r + 1, rows - 1)
                elif direction == 2:
                    c = min(c + 1, columns - 1)
                else:
                    r = max(r - 1, 0)
                p = 1 / 3 if slippery else 1.0
                if not over[state]:
                    transition[state, action, r * columns + c] += p
                    reward[state, action] += p * (desc[r][c] == "G")
    return transition, reward, over


LAKES = {
    "4x4": ("SFFF", "FHFH", "FFFH", "HFFG"),
    "8x8": (
        "SFFFFFFF",
        "FFFFFFFF",
        "FFFHFFFF",
        "FFFFFHFF",
        "FFFHFFFF",
        "FHHFFFHF",
        "FHFFHFHF",
        "FFFHFFFG",
    ),
}


def lake_table(name, slippery, **kwargs):
    lake, lake_params = gymnax.make("FrozenLake-misc", map_name=name, is_slippery=slippery)
    num_states = len(LAKES[name]) ** 2
    states = frozen_lake.EnvState(
        time=jnp.zeros(num_states, jnp.int32), position=jnp.arange(num_states)
    )
    key = jax.random.key(0)
    return planning.tabulate(key, lake, lake_params, states, lambda s: s.position, **kwargs)


@pytest.mark.parametrize("name", ["4x4", "8x8"])
@pytest.mark.parametrize("slippery", [True, False])
def test_frozen_lake_from_its_own_steps_is_gymnasium_s(name, slippery):
    table = lake_table(name, slippery, num_keys=200, probability="p")
    assert table.num_draws == (3 if slippery else 1)
    assert table.standard_error == 0.0
    transition, reward, terminal = table.mdp
    planning.check_mdp(transition, reward, terminal)
    expected = numpy_lake(LAKES[name], slippery)
    np.testing.assert_array_equal(terminal, expected[2])
    live = ~expected[2]
    np.testing.assert_allclose(transition[live], expected[0][live], atol=1e-6)
    np.testing.assert_allclose(reward, expected[1], atol=1e-6)
    for gamma in (0.9, 0.99):
        q = planning.optimal_q(*table.mdp, gamma)
        np.testing.assert_allclose(q, numpy_optimal_q(*expected, gamma), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "slippery", "gamma", "start"),
    [
        ("4x4", True, 1.0, 14 / 17),  # the most episodes that can succeed
        ("4x4", True, 0.99, 0.5420),  # often quoted
        ("8x8", True, 0.99, 0.4146),  # likewise
        ("4x4", False, 0.9, 0.9**5),  # six steps, the reward with the sixth
        ("8x8", False, 0.9, 0.9**13),
        ("8x8", True, 1.0, 1.0),  # along the upper and right borders nothing can go wrong
    ],
)
def test_frozen_lake_s_known_optimal_values(name, slippery, gamma, start):
    mdp = lake_table(name, slippery, num_keys=200, probability="p").mdp
    solution = planning.value_iteration(*mdp, gamma, tolerance=1e-8)
    assert solution.value[0] == pytest.approx(start, abs=1e-4)
    assert solution.value[-1] == 0.0  # the goal: the reward came with the step to it


def test_without_its_probabilities_a_table_is_an_estimate_and_says_how_good():
    table = lake_table("4x4", True, num_keys=3000)
    assert table.num_draws == 3
    # sqrt(1/3 * 2/3 / 3000) = 0.0086
    assert table.standard_error == pytest.approx(0.0086, rel=0.05)
    exact = numpy_lake(LAKES["4x4"], True)
    live = ~exact[2]
    error = np.abs(np.asarray(table.mdp[0])[live] - exact[0][live]).max()
    assert 1e-5 < error < 5 * table.standard_error
    np.testing.assert_allclose(table.mdp[0].sum(axis=-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_rover_tabulated_is_its_own_model(gamma):
    _, state = env.reset(jax.random.key(0), params)
    states = jax.vmap(lambda p: state.replace(position=p))(jnp.arange(6))
    table = planning.tabulate(jax.random.key(0), env, params, states, lambda s: s.position)
    model = env.mdp(params)
    assert table.num_draws == 1
    np.testing.assert_array_equal(table.mdp[0], model.transition)
    np.testing.assert_array_equal(table.mdp[1], model.reward[:, None] * np.ones((1, 2)))
    np.testing.assert_array_equal(table.mdp[2], model.terminal)
    q = planning.optimal_q(*model, gamma)
    np.testing.assert_array_equal(planning.optimal_q(*table.mdp, gamma), q)


# wrong input --------------------------------------------------------------------------------------


def test_wrong_shapes_and_numbers_are_refused_in_words():
    transition, reward, terminal = env.mdp(params)
    mdp = (transition, reward, terminal)
    with pytest.raises(ValueError, match=r"transition of shape \(6, 6, 2\) must have shape"):
        planning.policy_iteration(transition.swapaxes(1, 2), reward, terminal, 0.9)
    with pytest.raises(ValueError, match=r"reward of shape \(5,\) must have shape \(6,\) or"):
        planning.value_iteration(transition, reward[:5], terminal, 0.9)
    with pytest.raises(ValueError, match=r"terminal of shape \(2,\) must have shape \(6,\)"):
        planning.backup(transition, reward, terminal[:2], 0.9, reward)
    with pytest.raises(ValueError, match=r"gamma = 1.1 must lie in \[0.0, 1.0\]"):
        planning.policy_evaluation(*mdp, 1.1, jnp.zeros(6, int))
    with pytest.raises(ValueError, match=r"policy of shape \(6,\) and type float32"):
        planning.policy_evaluation(*mdp, 0.9, jnp.zeros(6))
    with pytest.raises(ValueError, match="max_iterations = 0"):
        planning.value_iteration(*mdp, 0.9, max_iterations=0)
    with pytest.raises(ValueError, match=r"tolerance = -1\.0"):
        planning.value_iteration(*mdp, 0.9, tolerance=-1.0)


def test_what_is_no_decision_process_is_refused_in_words():
    transition, reward, terminal = env.mdp(params)
    planning.check_mdp(transition, reward, terminal)
    with pytest.raises(ValueError, match=r"transition\[2, 1\] = .* sum is at most 1"):
        planning.check_mdp(transition.at[2, 1, 2].add(0.5), reward, terminal)
    with pytest.raises(ValueError, match=r"transition\[1, 0\]"):
        planning.check_mdp(transition.at[1, 0, 0].set(jnp.nan), reward, terminal)
    with pytest.raises(ValueError, match="reward holds numbers that are not finite"):
        planning.check_mdp(transition, reward.at[0].set(jnp.inf), terminal)
    with pytest.raises(ValueError, match="terminal has type float32"):
        planning.check_mdp(transition, reward, terminal.astype(jnp.float32))


def test_a_table_that_cannot_be_made_is_refused_in_words():
    _, state = env.reset(jax.random.key(0), params)

    def tabulate(positions, env=env, env_params=params, index=lambda s: s.position, **kwargs):
        states = jax.vmap(lambda p: state.replace(position=p))(positions)
        return planning.tabulate(jax.random.key(0), env, env_params, states, index, **kwargs)

    with pytest.raises(ValueError, match=r"index gives \[1, 2\] for the states"):
        tabulate(jnp.array([1, 2]))
    with pytest.raises(ValueError, match="action 1 in state 2 leads to a state outside"):
        tabulate(jnp.arange(3))
    with pytest.raises(ValueError, match=r"probability = 'p' is not in info, which has \[\]"):
        tabulate(jnp.arange(6), probability="p")
    with pytest.raises(ValueError, match="num_keys = 0"):
        tabulate(jnp.arange(6), num_keys=0)
    with pytest.raises(ValueError, match="must be discrete"):
        tabulate(jnp.arange(6), *gymnax.make("Pendulum-v1"))
    with pytest.raises(
        ValueError, match=r"draws seen in num_keys = 2 keys sum to .* try more keys"
    ):
        lake_table("4x4", True, num_keys=2, probability="p")
