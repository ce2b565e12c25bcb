"""Stepping and evaluating: what is counted, where an episode ends."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl.envs  # noqa: F401  (registers the rover)
from jaxrl import rollout
from tests import probes


def test_step_keeps_the_observation_before_the_reset_and_counts_episodes():
    env = probes.ResetIsWorthless()  # starts at -1, then 0; reward 0, 1, 1, 1; cut after 4
    params = env.default_params
    actors = rollout.reset(env, params, jax.random.key(0), 3)
    rows = []
    for i in range(4):
        actors, transition, ended = rollout.step(
            env, params, actors, jnp.zeros(3, jnp.int32), jax.random.key(i)
        )
        rows.append((transition, ended))
    first, last = rows[0][0], rows[-1][0]
    np.testing.assert_array_equal(first.obs, -1.0)
    np.testing.assert_array_equal(first.next_obs, 0.0)
    assert not rows[0][1].count
    assert last.truncated.all()
    assert not last.terminated.any()
    np.testing.assert_array_equal(last.next_obs, 0.0)  # before the reset ...
    np.testing.assert_array_equal(actors.obs, -1.0)  # ... after it
    metrics = rows[-1][1].metrics()
    assert metrics["num_episodes"] == 3
    assert metrics["episode_return"] == 3.0
    assert metrics["episode_length"] == 4.0
    assert "success_rate" not in metrics
    np.testing.assert_array_equal(actors.episode_return, 0.0)


@pytest.mark.parametrize("name", ["CartPole-v1", "MarsRover-v0"])
def test_a_step_with_what_was_drawn_ahead_is_the_environments_own_step(name):
    """Of the same keys: gymnax's step splits its key in two, for the step and for the reset."""
    env, params = gymnax.make(name)
    num_steps, num_envs = 60, 3
    keys = jax.random.split(jax.random.key(1), (num_steps, num_envs))
    halves = jax.vmap(jax.vmap(jax.random.split))(keys)
    start = jax.vmap(jax.vmap(env.reset_env, (0, None)), (0, None))(halves[..., 1], params)
    ahead = rollout.Draws(halves[..., 0], start)
    actions = jax.random.randint(jax.random.key(2), (num_steps, num_envs), 0, 2)

    def steps(draws):
        def one(actors, inputs):
            actors, *seen = rollout.step(env, params, actors, *inputs)
            return actors, seen

        actors = rollout.reset(env, params, jax.random.key(0), num_envs)
        return jax.lax.scan(one, actors, (actions, draws))

    own, drawn = steps(rollout.Draws(keys, None)), steps(ahead)
    assert own[1][1].count.sum() >= 5
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(drawn), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # two programs: rounding


def test_episodes_are_begun_ahead_where_they_are_small_and_the_reset_is_gymnaxs():
    env, params = gymnax.make("CartPole-v1")
    few = rollout.draw(env, params, jax.random.key(0), 5, 4)
    assert few.key.shape == (5, 4)
    assert few.start is not None
    obs, state = few.start
    assert obs.shape == (5, 4, 4)
    assert len(np.unique(np.asarray(obs).reshape(20, 4), axis=0)) == 20
    np.testing.assert_array_equal(state.time, 0)
    assert rollout.draw(env, params, jax.random.key(0), 1000, 1000).start is None  # 36 MB

    class Wrapped:
        """An environment that resets in its own way."""

        def __getattr__(self, name):
            return getattr(env, name)

        def step(self, *arguments):
            return env.step(*arguments)

    assert rollout.draw(Wrapped(), params, jax.random.key(0), 5, 4).start is None


def test_nothing_ended_is_nan_and_not_zero():
    nothing = rollout.EndedEpisodes(*jnp.zeros(4)).metrics()
    assert nothing["num_episodes"] == 0
    assert np.isnan(nothing["episode_return"])
    assert np.isnan(nothing["success_rate"])


def test_evaluate_runs_each_episode_once_to_its_end():
    env, params = gymnax.make("Pendulum-v1")

    def act(obs, key):
        return jnp.zeros(1)

    episodes = jax.jit(lambda k: rollout.evaluate(env, params, act, k, 5, gamma=0.9))(
        jax.random.key(0)
    )
    np.testing.assert_array_equal(episodes.lengths, 200)
    assert episodes.truncated.all()
    assert not episodes.terminated.any()
    # the same by hand: only the starts are random in this environment
    _, key_reset = jax.random.split(jax.random.key(0))
    _, state = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key_reset, 5), params)
    total, discounted = np.zeros(5), np.zeros(5)
    step = jax.jit(jax.vmap(env.step_env, in_axes=(None, 0, None, None)))
    for t in range(200):
        _, state, reward, *_ = step(jax.random.key(0), state, jnp.zeros(1), params)
        total += reward
        discounted += 0.9**t * np.asarray(reward)
    np.testing.assert_allclose(episodes.returns, total, rtol=1e-3)
    np.testing.assert_allclose(episodes.discounted_returns, discounted, rtol=1e-3)


def test_evaluate_freezes_what_has_ended():
    """CartPole pushed one way falls after 8 to 10 steps; reward 1 a step, so return = length."""
    env, params = gymnax.make("CartPole-v1")
    episodes = jax.jit(lambda k: rollout.evaluate(env, params, lambda o, k: jnp.int32(1), k, 64))(
        jax.random.key(0)
    )
    assert episodes.terminated.all()
    assert 8 <= episodes.lengths.min() < episodes.lengths.max() <= 11
    np.testing.assert_array_equal(episodes.returns, episodes.lengths)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_reset_starts_different_episodes(num_envs):
    env, params = gymnax.make("CartPole-v1")
    actors = rollout.reset(env, params, jax.random.key(0), num_envs)
    assert len(np.unique(np.asarray(actors.obs), axis=0)) == num_envs


# the return from any one state --------------------------------------------------------------------

LEFT, RIGHT = 0, 1


def always(action):
    return lambda obs, key: jnp.int32(action)


def coin(obs, key):
    return jax.random.bernoulli(key).astype(jnp.int32)


def rover(position, misstep_prob=0.0):
    env, params = gymnax.make("MarsRover-v0", misstep_prob=misstep_prob)
    state = env.reset(jax.random.key(0), params)[1]
    return env, params, state.replace(position=jnp.asarray(position, jnp.int32))


def test_rollouts_on_the_rover_by_hand():
    rows = [  # index of the state, direction kept, gamma, return, steps to the end
        (3, LEFT, 0.9, 72.9, 4),  # 0.9^3 * 100: the lecture's number
        (3, RIGHT, 0.9, 32.4, 3),  # 0.9^2 * 40
        (3, LEFT, 0.3, 2.7, 4),
        (3, RIGHT, 0.3, 3.6, 3),
        (0, LEFT, 0.9, 100.0, 1),  # the terminal state's own reward
        (5, LEFT, 0.9, 40.0, 1),
    ]
    position, then, gamma, expected, length = map(np.array, zip(*rows, strict=True))
    env, params, _ = rover(0)

    def one(position, then, gamma):
        return rollout.monte_carlo_return(
            env, params, rover(position)[2], always(then), jax.random.key(0), 5, gamma
        )

    result = jax.jit(jax.vmap(one))(position, then, gamma)
    np.testing.assert_allclose(result.mean, expected, rtol=1e-6)
    # nothing is random here
    np.testing.assert_allclose(result.standard_error, 0.0, atol=1e-5)
    np.testing.assert_array_equal(result.num_terminated, 5)
    np.testing.assert_array_equal(result.num_truncated, 0)
    np.testing.assert_array_equal(result.num_steps, 5 * length)


def test_a_rollout_that_has_ended_waits_for_the_longest_and_earns_nothing_more():
    """A coin from the middle, gamma 1: k of n rollouts end on the left with 100, the others on 40.

    Mean and error must be those of k: a rollout that goes on in a new episode breaks both.
    """
    n = 64
    result = rollout.monte_carlo_return(*rover(3), coin, jax.random.key(0), n, 1.0)
    k = round(float((result.mean - 40.0) / 60.0 * n))
    assert 0 < k < n
    assert result.mean == pytest.approx(40.0 + 60.0 * k / n)
    error = 60.0 * (k / n * (1.0 - k / n) / (n - 1)) ** 0.5
    assert result.standard_error == pytest.approx(error, rel=1e-5)
    assert result.num_terminated == n
    assert 3 * n < result.num_steps < 20 * n  # the mean length is (3 - 0)(5 - 3) + 1 = 7


def test_the_first_action_is_not_the_policy_s():
    rows = [  # index of the state, first action, direction kept, gamma, return, steps to the end
        (3, RIGHT, LEFT, 0.9, 0.9**5 * 100, 6),  # by way of 4, 3, 2, 1, 0
        (4, RIGHT, LEFT, 0.9, 36.0, 2),
        (1, LEFT, RIGHT, 0.5, 50.0, 2),  # Q(2, left) of the lecture's table
        (4, LEFT, RIGHT, 0.5, 5.0, 4),  # by way of 3, 4, 5
    ]
    position, first, then, gamma, expected, length = map(np.array, zip(*rows, strict=True))
    env, params, _ = rover(0)

    def one(position, first, then, gamma):
        return rollout.monte_carlo_return(
            env,
            params,
            rover(position)[2],
            always(then),
            jax.random.key(0),
            5,
            gamma,
            first_action=first,
        )

    result = jax.jit(jax.vmap(one))(position, first, then, gamma)
    np.testing.assert_allclose(result.mean, expected, rtol=1e-6)
    np.testing.assert_array_equal(result.num_steps, 5 * length)


@pytest.mark.parametrize("given", [False, True])
def test_rollouts_on_a_stochastic_rover_meet_the_exact_values(given):
    """Against the linear system V = R + gamma P V, within 4 standard errors."""
    gamma, misstep = 0.9, 0.25
    env, params, _ = rover(0, misstep)
    reward = np.array([100.0, 0, 0, 0, 0, 40])

    def exact(p_left, first):
        """V, or Q of the first action, of a policy that means to go left with p_left."""
        left = p_left * (1 - misstep) + (1 - p_left) * misstep
        p = np.zeros((6, 6))  # the ends lead nowhere
        for s in range(1, 5):
            p[s, s - 1], p[s, s + 1] = left, 1.0 - left
        value = np.linalg.solve(np.eye(6) - gamma * p, reward)
        if not given:
            return value[1:5]
        left = 1.0 - misstep if first == LEFT else misstep
        return gamma * (left * value[0:4] + (1.0 - left) * value[2:6])

    def one(p_left, first, position, key):
        return rollout.monte_carlo_return(
            env,
            params,
            rover(position)[2],
            lambda obs, key: jax.random.bernoulli(key, 1.0 - p_left).astype(jnp.int32),
            key,
            2000,
            gamma,
            first_action=first if given else None,
        )

    cases = [(p_left, first) for p_left in (1.0, 0.5) for first in (LEFT, RIGHT)]
    rows = [(*case, position) for case in cases for position in range(1, 5)]
    p_left, first, position = (jnp.array(x) for x in zip(*rows, strict=True))
    keys = jax.random.split(jax.random.key(1), len(rows))
    result = jax.jit(jax.vmap(one))(p_left, first, position, keys)
    expected = np.concatenate([exact(*case) for case in cases])
    assert (np.asarray(result.standard_error) > 0.05).all()
    assert (np.asarray(result.standard_error) < 1.0).all()
    assert (np.abs(result.mean - expected) <= 4 * result.standard_error).all()


def test_the_standard_error_is_that_of_the_mean():
    """Returns of +-1 in n rollouts: the sample variance is (1 - mean^2) n / (n - 1)."""
    env = probes.ActionDecides()
    params = env.default_params
    state = env.reset(jax.random.key(0), params)[1]
    n = 40
    result = rollout.monte_carlo_return(env, params, state, coin, jax.random.key(0), n)
    assert abs(result.mean) < 4 / n**0.5  # and the rollouts of one call differ
    variance = (1.0 - result.mean**2) * n / (n - 1)
    assert result.standard_error == pytest.approx((variance / n) ** 0.5)
    one = rollout.monte_carlo_return(env, params, state, coin, jax.random.key(0), 1)
    assert abs(one.mean) == 1.0
    assert np.isnan(one.standard_error)


def test_a_rollout_goes_on_from_the_middle_of_an_episode():
    """CartPole, six steps in: as many more as the environment itself takes until the pole falls."""
    env, params = gymnax.make("CartPole-v1")
    _, state = env.reset(jax.random.key(0), params)
    for t in range(6):
        _, state, *_ = env.step(jax.random.key(t), state, jnp.int32(t % 2), params)
    terminated, steps, going = False, 0, state
    step = jax.jit(env.step_env)
    while not terminated:
        _, going, _, terminated, _ = step(jax.random.key(0), going, RIGHT, params)
        steps += 1
    assert 5 < steps < 15
    result = rollout.monte_carlo_return(
        env, params, state, always(RIGHT), jax.random.key(0), 3, gamma=1.0
    )
    assert result.mean == steps
    assert result.num_steps == 3 * steps
    assert state.time == 6  # and the episode itself is where it was


def worth_ten(obs):
    """10 of the observation before the reset, which is 0; 9 of that after it, which is -1."""
    return 10.0 + obs[0]


@pytest.mark.parametrize(
    ("time", "max_steps", "value", "expected", "truncated", "length"),
    [
        (2, 1000, None, 1.9, 4, 2),  # cut after 4 steps: two are left, 1 + 0.9
        (2, 1000, worth_ten, 10.0, 4, 2),  # 1.9 + 0.81 * 10
        (2, 1, None, 1.0, 0, 1),
        (2, 1, worth_ten, 10.0, 0, 1),  # 1 + 0.9 * 10
        (2, 2, worth_ten, 10.0, 4, 2),  # both at once
        (0, 3, worth_ten, 10.0, 0, 3),
    ],
)
def test_a_cut_rollout_is_worth_what_the_value_says(
    time, max_steps, value, expected, truncated, length
):
    env = probes.ResetIsWorthless()  # reward 1 a step, cut after 4 steps; the reset shows -1
    state = probes.State(time=time, x=jnp.zeros(()))
    result = rollout.monte_carlo_return(
        env,
        env.default_params,
        state,
        always(0),
        jax.random.key(0),
        4,
        0.9,
        max_steps=max_steps,
        value=value,
    )
    assert result.mean == pytest.approx(expected)
    assert (result.num_terminated, result.num_truncated) == (0, truncated)
    assert result.num_steps == 4 * length


@pytest.mark.parametrize("limit", [2, 1_000_000])
def test_a_terminal_state_is_worth_nothing_beyond_also_at_the_time_limit(limit):
    env = probes.TwoSteps()
    params = probes.Params(max_steps_in_episode=limit)
    state = probes.State(time=1, x=jnp.ones(()))  # the second step: reward 1, then the end
    result = rollout.monte_carlo_return(
        env, params, state, always(0), jax.random.key(0), 2, value=lambda obs: jnp.float32(50.0)
    )
    assert result.mean == 1.0
    assert (result.num_terminated, result.num_truncated) == (2, 0)


def test_the_first_observation_is_made_from_the_state_or_taken_as_given():
    env = probes.CopyObs()
    state = probes.State(time=0, x=jnp.ones(()))

    def copy(obs, key):
        return (obs[0] > 0).astype(jnp.int32)

    def mean(**kwargs):
        return rollout.monte_carlo_return(
            env, env.default_params, state, copy, jax.random.key(0), 2, **kwargs
        ).mean

    assert mean() == 1.0
    assert mean(obs=jnp.ones(1)) == 1.0
    assert mean(obs=-jnp.ones(1)) == -1.0  # the policy is misled


def test_a_real_first_action_and_a_gamma_to_be_swept():
    env = probes.ActionDecides(continuous=True)
    state = env.reset(jax.random.key(0), env.default_params)[1]

    def mean(action, gamma):
        return rollout.monte_carlo_return(
            env,
            env.default_params,
            state,
            lambda obs, key: jnp.zeros(1),
            jax.random.key(0),
            3,
            gamma,
            first_action=action,
        ).mean

    actions = jnp.array([[0.5], [-1.0]])
    result = jax.vmap(mean)(actions, jnp.array([0.9, 0.1]))
    assert result == pytest.approx([0.5, -1.0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_rollouts=0), "num_rollouts = 0 must be an integer >= 1"),
        (dict(max_steps=2.5), r"max_steps = 2.5 must be an integer >= 1"),
    ],
)
def test_rollouts_refuse_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        rollout.monte_carlo_return(
            *rover(3), always(LEFT), jax.random.key(0), **{"num_rollouts": 2, **change}
        )
