"""The Mars rover: the lecture's returns, both ends, and a model that says what the steps do."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import MarsRover, mars_rover

KEY = jax.random.key(0)
LEFT, RIGHT = 0, 1
env = MarsRover()


def at(position, time=0):
    return mars_rover.EnvState(
        time=jnp.int32(time), position=jnp.int32(position), ended=jnp.bool_(False)
    )


def discounted_return(action, gamma, rover=env):
    """From the start until the episode ends, always with the same action."""
    params = rover.default_params
    _, state = rover.reset(KEY, params)
    total, discount = 0.0, 1.0
    for _ in range(20):
        _, state, reward, terminated, _ = rover.step_env(KEY, state, action, params)
        total, discount = total + discount * float(reward), discount * gamma
        if terminated:
            return total
    raise AssertionError("the episode did not end")


@pytest.mark.parametrize(
    ("gamma", "left", "right"),
    [
        (0.9, 72.9, 32.4),  # 0.9^3 * 100, 0.9^2 * 40
        (0.3, 2.7, 3.6),  # printed beside "discount 0.4" in the lecture
        (0.4, 6.4, 6.4),  # there it is a tie
        (0.5, 12.5, 10.0),
    ],
)
def test_returns_of_the_lecture(gamma, left, right):
    assert discounted_return(LEFT, gamma) == pytest.approx(left, abs=1e-5)
    assert discounted_return(RIGHT, gamma) == pytest.approx(right, abs=1e-5)


def test_one_episode_step_by_step():
    """Index 3, left: positions 2, 1, 0, then the step taken in state 0 pays 100 and is the last."""
    params = env.default_params
    obs, state = env.reset(KEY, params)
    np.testing.assert_array_equal(obs, [0, 0, 0, 1, 0, 0])
    trace = []
    for _ in range(4):
        obs, state, reward, terminated, info = env.step_env(KEY, state, LEFT, params)
        trace.append((int(state.position), int(obs.argmax()), float(reward), bool(terminated)))
        assert info == {}
    assert trace == [(2, 2, 0, False), (1, 1, 0, False), (0, 0, 0, False), (0, 0, 100, True)]
    assert state.time == 4


@pytest.mark.parametrize("action", [LEFT, RIGHT])
def test_the_action_in_a_terminal_state_is_ignored(action):
    _, state, reward, terminated, _ = env.step_env(KEY, at(5), action, env.default_params)
    assert (int(state.position), float(reward), bool(terminated)) == (5, 40.0, True)
    # a step after the end pays nothing
    _, _, reward, terminated, _ = env.step_env(KEY, state, action, env.default_params)
    assert (float(reward), bool(terminated)) == (0.0, True)


def test_arriving_in_a_terminal_state_is_not_yet_the_end():
    _, state, reward, terminated, _ = env.step_env(KEY, at(1), LEFT, env.default_params)
    assert (int(state.position), float(reward), bool(terminated)) == (0, 0.0, False)
    assert not env.is_terminated(state, env.default_params)


def test_auto_reset_keeps_the_final_observation():
    obs, state, reward, terminated, truncated, info = env.step(KEY, at(0), LEFT, env.default_params)
    assert (float(reward), bool(terminated), bool(truncated)) == (100.0, True, False)
    np.testing.assert_array_equal(info["final_observation"], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(obs, [0, 0, 0, 1, 0, 0])
    assert (int(state.position), int(state.time), bool(state.ended)) == (3, 0, False)


def test_the_time_limit_truncates():
    params = env.default_params.replace(max_steps_in_episode=7)
    *_, terminated, truncated, info = env.step(KEY, at(3, time=6), RIGHT, params)
    assert (bool(terminated), bool(truncated)) == (False, True)
    assert info["final_observation"].argmax() == 4


def test_a_line_without_terminal_states_ends_by_the_time_limit_alone():
    rover = MarsRover(length=3, rewards=(1, 2, 3), terminal=(), start=0)
    params = rover.default_params
    state, rewards = at(0), []
    for _ in range(4):  # stays at the end of the line
        _, state, reward, terminated, _ = rover.step_env(KEY, state, RIGHT, params)
        rewards.append(float(reward))
        assert not terminated
    assert rewards == [1, 2, 3, 3]
    *_, truncated, _ = rover.step(KEY, at(2, time=99), RIGHT, params)
    assert truncated


@pytest.mark.parametrize(("action", "meant"), [(-3, LEFT), (7, RIGHT)])
def test_an_action_that_does_not_exist_is_clipped(action, meant):
    params = env.default_params
    _, a, *_ = env.step(KEY, at(3), action, params)
    _, b, *_ = env.step(KEY, at(3), meant, params)
    assert a.position == b.position


def test_the_default_start_is_the_lecture_s_fourth_state_and_uniform_avoids_the_ends():
    rover = MarsRover(start="uniform")
    keys = jax.random.split(KEY, 4000)
    _, state = jax.vmap(rover.reset, in_axes=(0, None))(keys, rover.default_params)
    counts = np.bincount(state.position, minlength=6)
    assert counts[[0, 5]].sum() == 0
    # expected 1000 each, standard deviation 27
    np.testing.assert_allclose(counts[1:5], 1000, atol=5 * 27)


@pytest.mark.parametrize(
    "rover",
    [
        MarsRover(misstep_prob=0.25),
        MarsRover(length=5, rewards=range(5), terminal=(2,), start=0, misstep_prob=0.9),
        MarsRover(length=3, terminal=(), start=1, misstep_prob=0.5),
    ],
    ids=["lecture", "terminal in the middle", "no terminal"],
)
def test_the_model_says_what_the_steps_do(rover):
    """Frequencies of 20,000 steps from every state with every action, and their rewards."""
    params, num_keys = rover.default_params, 20_000
    keys = jax.random.split(KEY, num_keys)
    model = rover.mdp(params)
    step = jax.jit(jax.vmap(rover.step_env, in_axes=(0, None, None, None)))
    for position in range(rover.length):
        for action in (LEFT, RIGHT):
            _, state, reward, terminated, _ = step(keys, at(position), action, params)
            frequency = np.bincount(state.position, minlength=rover.length) / num_keys
            # five standard deviations of a frequency, at most 0.5 / sqrt(20000)
            np.testing.assert_allclose(frequency, model.transition[position, action], atol=0.018)
            np.testing.assert_array_equal(reward, model.reward[position])
            np.testing.assert_array_equal(terminated, model.terminal[position])


def test_the_model_of_the_lecture_by_hand():
    transition, reward, terminal = env.mdp(env.default_params.replace(misstep_prob=0.1))
    assert transition.dtype == reward.dtype == jnp.float32
    np.testing.assert_array_equal(reward, [100, 0, 0, 0, 0, 40])
    np.testing.assert_array_equal(terminal, [1, 0, 0, 0, 0, 1])
    np.testing.assert_allclose(transition[3, LEFT], [0, 0, 0.9, 0, 0.1, 0], atol=1e-7)
    np.testing.assert_allclose(transition[3, RIGHT], [0, 0, 0.1, 0, 0.9, 0], atol=1e-7)
    for action in (LEFT, RIGHT):
        np.testing.assert_allclose(transition[5, action], [0, 0, 0, 0, 0, 1], atol=1e-7)
    np.testing.assert_allclose(transition.sum(axis=-1), 1.0, atol=1e-6)


def test_the_model_is_swept_over_the_law():
    axes = jax.tree.map(lambda _: None, env.default_params).replace(misstep_prob=0, rewards=0)
    many = env.default_params.replace(
        misstep_prob=jnp.array([0.0, 1.0]), rewards=jnp.arange(12.0).reshape(2, 6)
    )
    models = jax.jit(jax.vmap(env.mdp, in_axes=(axes,)))(many)
    assert models.transition.shape == (2, 6, 2, 6)
    # a rover that always missteps has its two actions exchanged
    np.testing.assert_array_equal(models.transition[0], models.transition[1][:, ::-1])
    np.testing.assert_array_equal(models.reward[1], np.arange(6, 12))


def test_the_id_takes_the_arguments():
    rover, params = gymnax.make("MarsRover-v0", length=4, start=1, misstep_prob=0.3)
    assert (rover.name, rover.num_actions) == ("MarsRover-v0", 2)
    assert params.misstep_prob == 0.3
    np.testing.assert_array_equal(params.rewards, [100, 0, 0, 40])
    index, params = gymnax.make("MarsRover-v0", observation="index")
    obs, _ = index.reset(KEY, params)
    assert (obs.shape, obs.dtype, int(obs)) == ((), jnp.int32, 3)
    assert index.observation_space(params).n == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(length=1), "length = 1 must lie in 2..10000"),
        (dict(length=6.0), "length = 6.0 must be an integer"),
        (dict(rewards=(1, 2)), r"rewards = \(1, 2\) must have one number for each of length = 6"),
        (dict(rewards=(1, 2, float("nan"), 4, 5, 6)), "rewards = .* must be finite"),
        (dict(rewards="123456"), "rewards = '123456' must be a sequence of numbers"),
        (dict(rewards=5.0), "rewards = 5.0 must be a sequence"),
        (dict(rewards=(1, 2, "x", 4, 5, 6)), "rewards = .* must be a sequence of numbers"),
        (dict(terminal=(0, 6)), r"terminal = \(0, 6\) must hold indices in 0..5"),
        (dict(terminal=(-1,)), r"terminal = \(-1,\) must hold indices"),
        (dict(terminal=(0.5,)), "terminal = 0.5 must be an integer"),
        (dict(terminal=range(6)), "leaves no state to start in"),
        (dict(start=0), 'start = 0 must be "uniform" or lie in 0..5, outside .* 0, 5'),
        (dict(start=6), "start = 6 must be"),
        (dict(length=3), "start = 3 must be"),
        (dict(start="left"), "start = 'left' must be an integer or \"uniform\""),
        (dict(misstep_prob=1.5), r"misstep_prob = 1.5 must lie in \[0, 1\]"),
        (dict(misstep_prob=float("nan")), "misstep_prob = nan"),
        (dict(misstep_prob="often"), "misstep_prob = 'often'"),
        (dict(misstep_prob=True), "misstep_prob = True"),
        (dict(observation="image"), 'observation = \'image\' must be "one_hot" or "index"'),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        MarsRover(**arguments)


def test_a_model_of_bad_parameters_is_refused_in_words():
    params = env.default_params
    with pytest.raises(ValueError, match=r"misstep_prob = -0.1 must lie in \[0, 1\]"):
        env.mdp(params.replace(misstep_prob=-0.1))
    with pytest.raises(ValueError, match=r"rewards = .* must be finite, one for each of 6 states"):
        env.mdp(params.replace(rewards=jnp.ones(5)))
