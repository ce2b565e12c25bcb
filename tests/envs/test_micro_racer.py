"""MicroRacer on a hand-made ring of radius 1, and on its own tracks."""

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import Ending, MicroRacer, _lidar, micro_racer
from jaxrl.envs._tracks import TrackBank

KEY = jax.random.key(0)
COAST = jnp.zeros(2)
env = MicroRacer(num_tracks=4)
lidar_env = MicroRacer(num_tracks=4, observation="lidar")


@pytest.fixture(scope="module")
def params():
    """One track: a ring, 0.96 < radius < 1.04, without obstacles."""
    x = (np.arange(1300) - 650) / 500
    radius = np.hypot(x[:, None], x[None, :])
    road = jnp.asarray((radius > 0.96) & (radius < 1.04))
    clear = _lidar.pack_cells(_lidar.clear_cells(road))[None]
    start, heading = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0, -1.0]])
    return micro_racer.EnvParams(
        tracks=TrackBank(
            road=_lidar.pack_cells(road)[None],
            clear=clear,
            start=start,
            heading=heading,
            start_counts=_lidar.scan(clear, jnp.int32(0), start[0], heading[0])[None],
            length=jnp.asarray([2 * np.pi], jnp.float32),
            midline=jnp.zeros((1, 120, 2)),
            inner=jnp.zeros((1, 120, 2)),
            outer=jnp.zeros((1, 120, 2)),
            obstacles=jnp.zeros((1, 0, 2, 2)),
        )
    )


@pytest.fixture(scope="module")
def own_params():
    return env.default_params


def at(angle, heading, speed, radius=1.0, time=0):
    """A car at an unwrapped polar angle; heading 0 is clockwise, positive is left of that."""
    theta = angle - np.pi / 2 + heading
    return micro_racer.EnvState(
        time=jnp.int32(time),
        track=jnp.int32(0),
        position=radius * jnp.asarray([np.cos(angle), np.sin(angle)], jnp.float32),
        velocity=speed * jnp.asarray([np.cos(theta), np.sin(theta)], jnp.float32),
        angle=jnp.float32(angle),
        counts=jnp.zeros(19, jnp.uint8),
        ending=jnp.int32(0),
    )


def step_env(state, action, params):
    return env.step_env(KEY, state, jnp.asarray(action), params)


def test_one_step_by_hand(params):
    _, state, reward, terminated, info = step_env(at(0.0, 0.0, 0.25), [1.0, 0.0], params)
    # v' = 0.25 + 0.04 * 0.1 = 0.254; y = -0.04 * 0.254 = -0.01016
    np.testing.assert_allclose(state.velocity, [0, -0.254], atol=1e-6)
    np.testing.assert_allclose(state.position, [1, -0.01016], atol=1e-6)
    assert reward == pytest.approx(0.01016, abs=1e-7)
    assert state.angle == pytest.approx(-0.01016, abs=1e-5)
    assert not terminated
    assert info["ending"] == Ending.NONE
    assert info["progress"] == pytest.approx(0.01016 / (2 * np.pi), abs=1e-6)
    assert info["speed"] == pytest.approx(0.254)
    assert not info["success"]


@pytest.mark.parametrize(
    ("speed", "turn"),
    [
        (0.10, np.pi / 6),  # slow: the wheel is the limit
        (0.25, 1.741 * 0.04 / 0.25),  # fast: the grip is, 0.2786 rad
    ],
)
def test_a_full_turn_to_the_right(params, speed, turn):
    # Right of clockwise travel is the origin; from (1, 0) heading down, that is -x.
    _, state, *_ = step_env(at(0.0, 0.0, speed), [0.0, 1.0], params)
    expected = speed * np.array([-np.sin(turn), -np.cos(turn)])
    np.testing.assert_allclose(state.velocity, expected, atol=1e-6)
    free = params.replace(turn_limit=False)
    _, state, *_ = step_env(at(0.0, 0.0, speed), [0.0, 1.0], free)
    np.testing.assert_allclose(state.velocity, [-speed * 0.5, -speed * np.sqrt(0.75)], atol=1e-6)


def test_turn_is_limited_by_the_new_speed(params):
    _, state, *_ = step_env(at(0.0, 0.0, 0.25), [1.0, 1.0], params)
    turn = 1.741 * 0.04 / 0.254
    np.testing.assert_allclose(
        state.velocity, 0.254 * np.array([-np.sin(turn), -np.cos(turn)]), atol=1e-6
    )


def test_actions_are_clipped_unless_told_otherwise(params):
    _, clipped, *_ = step_env(at(0.0, 0.0, 0.25), [5.0, -3.0], params)
    _, full, *_ = step_env(at(0.0, 0.0, 0.25), [1.0, -1.0], params)
    chex.assert_trees_all_equal(clipped, full)
    wild = params.replace(action_limit=jnp.inf)
    _, state, *_ = step_env(at(0.0, 0.0, 0.25), [5.0, 0.0], wild)
    np.testing.assert_allclose(state.velocity, [0, -0.27], atol=1e-6)


@pytest.mark.parametrize("bad", [[np.nan, 0.3], [0.5, np.nan], [np.nan, np.nan]])
def test_nan_is_no_action(params, bad):
    ours = step_env(at(0.0, 0.0, 0.25), bad, params)
    expected = step_env(at(0.0, 0.0, 0.25), np.nan_to_num(bad), params)
    chex.assert_trees_all_equal(ours, expected)
    chex.assert_tree_all_finite(ours)


@pytest.mark.parametrize(
    ("state", "action", "ending"),
    [
        (at(-1.0, np.pi / 2, 0.25, radius=1.035), [0, 0], Ending.CROSSING_BORDER),  # outward
        (at(-1.0, -np.pi / 2, 0.25, radius=0.965), [0, 0], Ending.CROSSING_BORDER),  # inward
        (at(-1.0, np.pi, 0.25), [0, 0], Ending.WRONG_DIRECTION),
        (at(-1.0, 0.6 * np.pi, 0.25, radius=1.035), [0, 0], Ending.CROSSING_BORDER),  # both
        (at(-1.0, 0.0, 0.051), [-1, 0], Ending.TOO_SLOW),
        (at(-1.0, np.pi, 0.051), [-1, 0], Ending.WRONG_DIRECTION),  # both
        (at(-1.0, 0.0, 0.003), [-1, 0], Ending.WRONG_DIRECTION),  # stands still: not forward
        (at(-2 * np.pi + 0.005, 0.0, 0.25), [0, 0], Ending.COMPLETED),
        (at(-2 * np.pi + 0.005, 0.0, 0.051), [-1, 0], Ending.TOO_SLOW),  # before the line
        (at(-2 * np.pi + 0.001, 0.0, 0.051), [-1, 0], Ending.TOO_SLOW),  # failures come first
        (at(-2 * np.pi + 0.02, 0.0, 0.25), [0, 0], Ending.NONE),
        (at(-np.pi + 0.005, 0.0, 0.25), [0, 0], Ending.NONE),  # across the far side
        (at(0.0, 0.0, 0.25), [0, 0], Ending.NONE),  # across the line at the start
    ],
)
def test_endings(params, state, action, ending):
    action = jnp.asarray(action, jnp.float32)
    obs, after, reward, terminated, info = step_env(state, action, params)
    assert info["ending"] == ending
    assert terminated == (ending != Ending.NONE)
    assert info["success"] == (ending == Ending.COMPLETED)
    assert env.is_terminated(after, params) == terminated
    if ending in (Ending.NONE, Ending.COMPLETED):
        assert reward == pytest.approx(0.04 * info["speed"])  # no bonus at the finish
        assert obs[2] > 0
    else:
        assert reward == -3
        np.testing.assert_array_equal(obs, np.zeros(5))
        chex.assert_trees_all_equal(after.position, state.position)
        chex.assert_trees_all_equal(after.velocity, state.velocity)
        assert after.angle == state.angle


def test_time_is_paid_for_in_every_step_but_a_failure(params):
    race = params.replace(time_cost=0.003)
    _, _, reward, *_ = step_env(at(-1.0, 0.0, 0.25), COAST, race)
    assert reward == pytest.approx(0.04 * 0.25 - 0.003, abs=1e-7)
    _, _, reward, *_ = step_env(at(-2 * np.pi + 0.005, 0.0, 0.25), COAST, race)  # the finish
    assert reward == pytest.approx(0.04 * 0.25 - 0.003, abs=1e-7)
    _, _, reward, *_ = step_env(at(-1.0, np.pi, 0.25), COAST, race)  # instead, not on top
    assert reward == -3


def test_without_a_time_cost_the_reward_is_the_distance_bit_for_bit(params):
    assert params.time_cost == 0
    speed = np.linspace(0.06, 0.6, 501, dtype=np.float32)
    velocity = jnp.stack([jnp.zeros(501), -speed], axis=-1)
    states = jax.vmap(lambda v: at(0.0, 0.0, 1.0).replace(velocity=v))(velocity)
    step = jax.jit(jax.vmap(env.step_env, in_axes=(None, 0, None, None)))
    _, _, reward, terminated, _ = step(KEY, states, COAST, params)
    assert not terminated.any()
    np.testing.assert_array_equal(reward, np.float32(0.04) * speed)
    traced = step(KEY, states, COAST, params.replace(time_cost=jnp.float32(0.0)))
    np.testing.assert_array_equal(traced[2], np.float32(0.04) * speed)


def test_the_time_cost_is_a_leaf_to_sweep(params):
    axes = jax.tree.map(lambda _: None, params).replace(time_cost=0)
    step = jax.vmap(env.step_env, in_axes=(None, None, None, axes))
    costs = jnp.asarray([0.0, 0.004, 0.02])
    _, _, reward, *_ = step(KEY, at(-1.0, 0.0, 0.25), COAST, params.replace(time_cost=costs))
    np.testing.assert_allclose(reward, [0.01, 0.006, -0.01], atol=1e-7)


def test_driving_back_over_the_far_side_is_no_finish(params):
    # The original calls this "completed": theta goes from +3.14 to -3.14.
    *_, info = step_env(at(-np.pi - 0.002, np.pi, 0.25), [0.0, 0.0], params)
    assert info["ending"] == Ending.WRONG_DIRECTION
    assert not info["success"]


def test_slow_is_allowed_without_low_speed_termination(params):
    free = params.replace(low_speed_termination=False)
    *_, info = step_env(at(-1.0, 0.0, 0.051), [-1.0, 0.0], free)
    assert info["ending"] == Ending.NONE
    *_, info = step_env(at(-1.0, 0.0, 0.003), [-1.0, 0.0], free)
    assert info["ending"] == Ending.WRONG_DIRECTION  # v' = 0: the angle does not change


def test_a_whole_lap_of_the_ring(params):
    """Steered along the circle: 2 pi of road, the finish in time, progress from 0 to 1."""
    speed, radius = 0.2, 1.0
    turn = 2 * np.arcsin(0.04 * speed / 2 / radius)  # chords of 0.008
    action = jnp.asarray([0.0, turn / (1.741 * 0.04 / speed)], jnp.float32)
    start = at(0.0, turn / 2, speed)  # turned right before the move: along the chord

    def body(state, _):
        _, state, reward, terminated, info = env.step_env(KEY, state, action, params)
        return state, (reward, terminated, info)

    _, (reward, terminated, info) = jax.jit(lambda s: jax.lax.scan(body, s, None, 800))(start)
    steps = int(np.argmax(terminated)) + 1
    assert info["ending"][steps - 1] == Ending.COMPLETED
    assert steps == np.ceil(2 * np.pi / turn)  # 786
    assert np.sum(reward[:steps]) == pytest.approx(2 * np.pi, abs=0.01)
    progress = np.asarray(info["progress"][:steps])
    assert (np.diff(progress) > 0).all()
    assert progress[0] == pytest.approx(1 / steps, rel=0.01)
    assert progress[-1] == 1.0


def test_compact_observation_by_hand(params):
    counts = jnp.asarray([3] * 7 + [5, 12, 11, 4] + [3] * 8, jnp.uint8)
    state = at(-1.0, 0.0, 0.25).replace(counts=counts)
    obs = env.observe(KEY, state, None, params)
    # ray 8 is one to the right of the middle; 12 samples: 0.04 + 0.02
    np.testing.assert_allclose(obs, [-np.pi / 54, 0.020, 0.06, 0.05, 0.25], atol=1e-6)


def test_ties_for_the_longest_ray_prefer_no_side(params):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, (4000, 19))
    right = rng.integers(0, 18, 4000)
    counts[np.arange(4000), right] = counts[np.arange(4000), right + 1] = 50  # two neighbours
    observe = jax.vmap(
        lambda c: env.observe(KEY, at(-1.0, 0.0, 0.25).replace(counts=c), None, params)
    )
    ray = np.rint(observe(jnp.asarray(counts, jnp.uint8))[:, 0] / (np.pi / 54)).astype(int) + 9
    assert np.isin(ray - right, (0, 1)).all()
    assert np.mean(ray == right) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("ray", "angle"), [(0, -np.pi / 6), (18, np.pi / 6)])
def test_compact_observation_at_the_edge_of_the_fan(params, ray, angle):
    counts = jnp.full(19, 2, jnp.uint8).at[ray].set(9)
    obs = env.observe(KEY, at(-1.0, 0.0, 0.25).replace(counts=counts), None, params)
    own = [0.036, 0.036, 0.008] if ray == 0 else [0.008, 0.036, 0.036]
    np.testing.assert_allclose(obs, [angle, *own, 0.25], atol=1e-6)


def test_ray_0_is_the_rightmost(params):
    # Near the inner border the wall is on the right.
    obs, *_ = lidar_env.step_env(KEY, at(-1.0, 0.0, 0.2, radius=0.972), COAST, params)
    assert obs.shape == (20,)
    assert obs[0] < 0.03 < obs[18]
    assert obs[19] == pytest.approx(0.2)


def test_observation_is_a_function_of_the_state(own_params):
    for e in (env, lidar_env):
        obs, state = e.reset(KEY, own_params)
        np.testing.assert_array_equal(obs, e.observe(KEY, state, None, own_params))
        obs, state, *_ = e.step_env(KEY, state, COAST, own_params)
        np.testing.assert_array_equal(obs, e.observe(KEY, state, None, own_params))


def test_reset_follows_the_law(own_params):
    keys = jax.random.split(KEY, 4096)
    reset = jax.jit(jax.vmap(env.reset_env, in_axes=(0, None)))
    obs, state = reset(keys, own_params)
    speed = np.asarray(obs[:, 4])
    assert speed.min() == pytest.approx(0.07)
    assert speed.max() < 0.5 + 1e-6
    assert np.mean(speed < 0.0701) == pytest.approx(0.14, abs=0.02)  # P(U / 2 < 0.07)
    assert speed.mean() == pytest.approx(0.255, abs=0.01)
    np.testing.assert_allclose(np.bincount(state.track) / 4096, 0.25, atol=0.03)
    # at the start, along the midline, with the scan of that place
    np.testing.assert_array_equal(state.position, own_params.tracks.start[state.track])
    direction = state.velocity / speed[:, None]
    np.testing.assert_allclose(direction, own_params.tracks.heading[state.track], atol=1e-5)
    free = own_params.replace(low_speed_termination=False)
    obs, _ = reset(keys, free)
    assert obs[:, 4].min() < 0.01
    assert obs[:, 4].mean() == pytest.approx(0.25, abs=0.01)


def test_truncation_keeps_the_final_observation(params):
    before = at(-1.0, 0.0, 0.25, time=999)
    last, *_ = step_env(before, COAST, params)
    obs, state, _, terminated, truncated, info = env.step(KEY, before, COAST, params)
    assert truncated
    assert not terminated
    np.testing.assert_array_equal(info["final_observation"], last)
    assert state.time == 0  # the new episode
    np.testing.assert_array_equal(state.position, params.tracks.start[0])
    np.testing.assert_array_equal(obs, env.observe(KEY, state, None, params))


def test_failure_resets_and_both_flags_may_come_together(params):
    before = at(-1.0, np.pi, 0.25, time=999)
    obs, state, reward, terminated, truncated, info = env.step(KEY, before, COAST, params)
    assert terminated
    assert truncated
    assert reward == -3
    np.testing.assert_array_equal(info["final_observation"], np.zeros(5))
    assert state.time == 0
    assert state.ending == Ending.NONE
    assert obs[2] > 0


def test_one_trace_and_jit_equals_eager(own_params):
    chex.clear_trace_counter()  # it counts by name
    step = jax.jit(chex.assert_max_traces(env.step_env, n=1))
    _, state = env.reset(KEY, own_params)
    for i in range(5):
        action = jnp.asarray([0.3, -0.2 + 0.1 * i])
        compiled = step(KEY, state, action, own_params)
        with jax.disable_jit():
            eager = env.step_env(KEY, state, action, own_params)
        chex.assert_trees_all_close(compiled, eager, atol=1e-6)
        state = compiled[1]


def test_vmapped_cars_are_independent(own_params):
    keys = jax.random.split(KEY, 16)
    _, states = jax.vmap(env.reset, in_axes=(0, None))(keys, own_params)
    actions = jax.random.uniform(KEY, (16, 2), minval=-1.0)
    together = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, states, actions, own_params)
    for i in (0, 7, 15):
        alone = env.step(
            keys[i], jax.tree.map(lambda leaf, i=i: leaf[i], states), actions[i], own_params
        )
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        chex.assert_trees_all_close(mine, alone, atol=1e-6)


def test_vmap_over_a_leaf_shares_the_tracks(own_params):
    grip = jnp.asarray([0.5, 1.0, 1.741])
    axes = jax.tree.map(lambda _: None, own_params).replace(grip=0)
    _, state = env.reset(KEY, own_params)
    state = state.replace(velocity=0.4 * own_params.tracks.heading[state.track])
    action = jnp.asarray([0.0, 1.0])
    step = jax.vmap(env.step_env, in_axes=(None, None, None, axes))
    _, after, *_ = step(KEY, state, action, own_params.replace(grip=grip))
    cos = after.velocity @ state.velocity / 0.16
    np.testing.assert_allclose(np.arccos(cos), grip * 0.04 / 0.4, atol=2e-3)


def test_tracks_can_be_swapped(own_params):
    other = own_params.replace(tracks=micro_racer.make_tracks(jax.random.key(9), 4))
    _, ours = env.reset(KEY, own_params)
    _, theirs = env.reset(KEY, other)
    assert ours.position[0] != theirs.position[0]


def test_default_params_inside_a_trace():
    """gymnax asks for the default parameters inside its jitted step; no tracer may stay behind."""
    fresh = MicroRacer(num_tracks=4)
    _, state = fresh.reset(KEY)
    obs, *_ = fresh.step(KEY, state, COAST)
    assert isinstance(fresh.default_params.tracks.road, jax.Array)
    chex.assert_tree_all_finite((obs, fresh.default_params.tracks.start))


def test_state_is_small(own_params):
    _, state = env.reset(KEY, own_params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 64


def test_x64_changes_no_type(own_params):
    _, state = env.reset(KEY, own_params)
    expected = env.step(KEY, state, COAST, own_params)
    with jax.enable_x64(True):
        bank = jax.eval_shape(lambda: micro_racer.make_tracks(KEY, 4))
        _, state = MicroRacer(num_tracks=4).reset(KEY, own_params)
        out = MicroRacer(num_tracks=4).step(KEY, state, COAST, own_params)
    chex.assert_trees_all_equal_dtypes(out, expected)
    chex.assert_trees_all_equal_dtypes(bank, own_params.tracks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tracks": 0}, "num_tracks = 0 must lie in 1..30000"),
        ({"num_tracks": 2.5}, "num_tracks = 2.5 must be an integer"),
        ({"track_seed": "abc"}, "track_seed = 'abc' must be an integer"),
        ({"chicanes": "no"}, "chicanes = 'no' must be True or False"),
        ({"num_tracks": 10**6}, "must lie in 1..30000"),
        ({"observation": "pixels"}, "observation = 'pixels' must be"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        MicroRacer(**arguments)


def test_gymnax_makes_it():
    made, params = gymnax.make("MicroRacer-v0", num_tracks=2, obstacles=False, observation="lidar")
    assert isinstance(made, MicroRacer)
    assert made.observation_space(params).shape == (20,)
    assert params.tracks.num_tracks == 2
    assert params.tracks.obstacles.shape == (2, 0, 2, 2)
