"""Pictures of the Mars rover: it is where it is, and the arrows point the way of the policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import MarsRover
from jaxrl.envs.render import mars_rover as render

env = MarsRover()
params = env.default_params
SIZE = 660


def frame(position=3, rover=env, **kwargs):
    _, state = rover.reset(jax.random.key(0), rover.default_params)
    state = state.replace(position=jnp.int32(position))
    return rover.render(state, rover.default_params, size=SIZE, **kwargs).astype(int)


def count(pixels, colour):
    """Pixels that have a colour."""
    return int((np.abs(pixels - np.asarray(colour)).sum(axis=-1) < 30).sum())


def column(picture, index, length=6):
    """The part of a picture that shows a state."""
    left, _, right, _ = render.cell(SIZE, length, index)
    return picture[:, left:right]


def test_the_rover_is_in_its_state_and_nowhere_else():
    for position in range(6):
        picture = frame(position)
        panels = [count(column(picture, i), render.PANEL) for i in range(6)]
        assert panels[position] > 50
        assert sum(panels) == panels[position]


def test_terminal_states_carry_a_flag():
    picture = frame(1)
    # at this height there are flags, and the rover's mast is lower
    sky = [count(column(picture, i)[15:35], render.FLAG) for i in range(6)]
    assert [n > 50 for n in sky] == [True, False, False, False, False, True]


def arrow_sides(picture, index):
    """Pixels of arrow in the left and in the right half of a state."""
    part = column(picture, index)
    middle = part.shape[1] // 2
    return count(part[-40:, :middle], render.ARROW), count(part[-40:, middle:], render.ARROW)


def test_arrows_point_where_the_policy_goes():
    picture = frame(policy=[0, 0, 0, 1, 1, 1])
    # the head is on the side to which it points: more of the arrow is there
    for index, points_right in ((1, False), (2, False), (3, True), (4, True)):
        left, right = arrow_sides(picture, index)
        assert (right > left) == points_right
        assert abs(right - left) > 50
    for index in (0, 5):  # a terminal state's action is ignored
        assert arrow_sides(picture, index) == (0, 0)


def test_a_tie_has_both_arrows():
    probabilities = np.full((6, 2), 0.5)
    left, right = arrow_sides(frame(policy=probabilities), 3)
    assert min(left, right) > 100
    assert abs(left - right) < 40


def test_values_colour_the_states():
    picture = frame(values=[100, 50, 25, 12.5, 20, 40])
    row = picture[-8]  # below the numbers

    def strength(index):
        left, _, right, _ = render.cell(SIZE, 6, index)
        return -row[(left + right) // 2, 2]  # less blue

    order = sorted(range(6), key=strength)
    assert order == [3, 4, 2, 5, 1, 0]


def test_rows_are_added_as_asked_and_the_width_is_kept():
    heights = [
        frame(**kwargs).shape
        for kwargs in ({}, {"values": np.zeros(6)}, {"values": np.zeros(6), "policy": np.zeros(6)})
    ]
    assert [shape[1:] for shape in heights] == [(SIZE, 3)] * 3
    rows = np.diff([shape[0] for shape in heights])
    assert (rows > 20).all()
    assert env.render(env.reset(jax.random.key(0), params)[1], params).dtype == np.uint8


def test_an_episode_is_drawn_to_its_end():
    states = render.drive(env, params, lambda obs: jnp.int32(0), jax.random.key(0))
    np.testing.assert_array_equal(states.position, [3, 2, 1, 0, 0])
    np.testing.assert_array_equal(states.ended, [0, 0, 0, 0, 1])
    frames = render.render_episode(states, params, terminal=env.terminal, size=SIZE)
    shown = [
        int(np.argmax([count(column(f.astype(int), i), render.PANEL) for i in range(6)]))
        for f in frames
    ]
    assert shown == [3, 2, 1, 0, 0]


def test_the_misstep_of_a_drawn_episode_is_drawn_from_its_key():
    unsteady = params.replace(misstep_prob=0.5)
    paths = {
        tuple(render.drive(env, unsteady, lambda obs: jnp.int32(0), jax.random.key(i)).position)
        for i in range(4)
    }
    assert len(paths) > 1


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"size": 100}, "size = 100 must be at least 280 pixels for 6 states"),
        ({"values": [1, 2]}, r"values of shape \(2,\) must have shape \(6,\)"),
        ({"policy": np.zeros((6, 3))}, r"policy of shape \(6, 3\) must have shape \(6,\) or"),
    ],
)
def test_wrong_arguments_are_refused_in_words(kwargs, words):
    _, state = env.reset(jax.random.key(0), params)
    with pytest.raises(ValueError, match=words):
        env.render(state, params, **kwargs)
