"""MicroRacer against recordings of the original: tracks, single steps, lidar, whole episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import Ending, MicroRacer, _lidar, _tracks
from jaxrl.envs.micro_racer import EnvParams, EnvState, start

pytestmark = pytest.mark.reference
env = MicroRacer()


@pytest.fixture(scope="module")
def recording(reference_dir):
    path = reference_dir / "micro_racer.npz"
    if not path.is_file():
        pytest.skip(f"no recording of MicroRacer at {path}")
    with np.load(path) as z:
        return {name: z[name] for name in z.files}


@pytest.fixture(scope="module")
def tracks(recording):
    """Every recorded track, rebuilt from its random numbers: a list of `Track`."""
    build = jax.jit(_tracks.track_from_draws, static_argnames=("obstacles", "chicanes"))
    rebuilt = []
    for i, (obstacles, chicanes) in enumerate(
        zip(recording["track.obstacles"], recording["track.chicanes"], strict=True)
    ):
        draws = _tracks.Draws(
            radius_u=jnp.asarray(recording["track.draw_radius_u"][i], jnp.float32),
            chicane_knot=jnp.asarray(max(recording["track.draw_chicane_knot"][i], 1), jnp.int32),
            chicane_flag=jnp.asarray(recording["track.draw_chicane_flag"][i]),
            obstacle_u=jnp.asarray(recording["track.draw_obst_u"][i], jnp.float32),
            obstacle_side=jnp.asarray(recording["track.draw_obst_side"][i], jnp.float32),
        )
        track = build(draws, obstacles=bool(obstacles), chicanes=bool(chicanes))
        rebuilt.append(jax.device_get(track))
    return rebuilt


@pytest.fixture(scope="module")
def bank(tracks):
    """The rebuilt tracks as a bank; without the segments of obstacles, kept for pictures only."""
    pack = jax.jit(_tracks.pack_track)
    packed = [pack(track).replace(obstacles=jnp.zeros((0, 2, 2))) for track in tracks]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)


def params_of(bank, recording, track):
    """The flags under which steps on the tracks (n,) were recorded, and the axes to vmap over."""
    params = EnvParams(tracks=bank, action_limit=np.inf)
    axes = jax.tree.map(lambda _: None, params).replace(turn_limit=0, low_speed_termination=0)
    params = params.replace(
        turn_limit=jnp.asarray(recording["track.turn_limit"][track]),
        low_speed_termination=jnp.asarray(recording["track.low_speed_termination"][track]),
    )
    return params, axes


def state_of(track, position, velocity, theta):
    n = len(track)
    return EnvState(
        time=jnp.zeros(n, jnp.int32),
        track=jnp.asarray(track, jnp.int32),
        position=jnp.asarray(position, jnp.float32),
        velocity=jnp.asarray(velocity, jnp.float32),
        angle=jnp.asarray(np.where(theta > 0, theta - 2 * np.pi, theta), jnp.float32),
        counts=jnp.zeros((n, 19), jnp.uint8),
        ending=jnp.zeros(n, jnp.int32),
    )


def initial_state(recording, episodes):
    init = recording["ep.init"][episodes]
    theta = np.arctan2(init[:, 1], init[:, 0])
    return state_of(recording["ep.track"][episodes], init[:, :2], init[:, 2:4], theta)


@pytest.fixture(scope="module")
def stepped(recording, bank):
    """One step from each recorded state with the recorded action."""
    length = recording["ep.length"]
    track = np.repeat(recording["ep.track"], length)
    first, last = recording["ep.start"], recording["ep.start"] + length - 1

    def before(rows, initial):
        shifted = np.roll(rows, 1, axis=0)
        shifted[first] = initial
        return shifted

    init = recording["ep.init"]
    state = state_of(
        track,
        before(recording["step.pos"], init[:, :2]),
        before(recording["step.vel"], init[:, 2:4]),
        before(recording["step.theta"], np.arctan2(init[:, 1], init[:, 0])),
    )
    params, axes = params_of(bank, recording, track)
    step = jax.jit(jax.vmap(env.step_env, in_axes=(None, 0, 0, axes)))
    action = jnp.asarray(recording["step.action"], jnp.float32)
    obs, state, reward, terminated, info = step(jax.random.key(0), state, action, params)
    ending = np.zeros(len(track), np.int32)
    ending[last] = recording["ep.reason"]
    return {
        "obs": np.asarray(obs),
        "state": jax.device_get(state),
        "reward": np.asarray(reward),
        "terminated": np.asarray(terminated),
        "ending": np.asarray(info["ending"]),
        "recorded_ending": ending,
    }


@pytest.mark.parametrize(
    ("ours", "theirs"), [("midline", "mid"), ("inner", "inner"), ("outer", "outer")]
)
def test_splines_are_the_recorded_ones(recording, tracks, ours, theirs):
    t = jnp.asarray(2 * np.pi * np.arange(400) / 400, jnp.float32)
    evaluate = jax.jit(_tracks.evaluate)
    for i, track in enumerate(tracks):
        error = np.abs(evaluate(getattr(track, ours), t) - recording[f"track.{theirs}_xy400"][i])
        assert error.max() <= 1e-5, (i, error.max())


def test_obstacles_are_the_recorded_ones(recording, tracks):
    for i, track in enumerate(tracks):
        if recording["track.obstacles"][i]:
            ends = recording["track.obst_x1x2y1y2"][i][:, [[0, 2], [1, 3]]]
            np.testing.assert_allclose(track.obstacles, ends, rtol=0, atol=1e-5)


def test_rasters_agree_near_the_road(recording, tracks):
    for i, track in enumerate(tracks):
        bits = np.unpackbits(recording["track.map_bits"][i], count=_lidar.RASTER**2)
        theirs = bits.astype(bool).reshape(_lidar.RASTER, _lidar.RASTER)
        near = theirs.copy()
        for _ in range(3):  # cells within 3 of the road
            for axis in (0, 1):
                near |= np.roll(near, 1, axis) | np.roll(near, -1, axis)
        wrong = np.sum(track.road != theirs)  # those further off count against us too
        assert wrong <= 0.001 * near.sum(), (i, wrong)


def test_start_of_every_track(recording, bank):
    u = recording["track.draw_speed_u"]
    slowest = np.where(recording["track.low_speed_termination"], 0.07, 0.0)
    speed = jnp.asarray(np.maximum(u / 2, slowest), jnp.float32)
    index = jnp.arange(len(u), dtype=jnp.int32)
    state = jax.vmap(start, in_axes=(None, 0, 0))(bank, index, speed)
    ours = np.concatenate([state.position, state.velocity], axis=1)
    np.testing.assert_allclose(ours, recording["track.init"][:, :4], rtol=0, atol=1e-5)
    readings = _lidar.reading(state.counts)
    same = np.abs(readings - recording["track.init_lidar"]) < 1e-5
    assert same.mean() >= 0.999, same.mean()


def test_one_step_gives_the_recorded_state_and_reward(recording, stepped):
    same = stepped["ending"] == stepped["recorded_ending"]
    for name, ours in [
        ("pos", stepped["state"].position),
        ("vel", stepped["state"].velocity),
        ("reward", stepped["reward"]),
    ]:
        error = np.abs(ours - recording[f"step.{name}"])[same]
        assert error.max() <= 1e-5, (name, error.max())


def test_one_step_ends_as_recorded(recording, stepped):
    same = stepped["ending"] == stepped["recorded_ending"]
    assert same.mean() >= 0.999, np.flatnonzero(~same)
    np.testing.assert_array_equal(stepped["terminated"], stepped["ending"] != Ending.NONE)
    assert np.mean(stepped["terminated"] == recording["step.done"]) >= 0.999


def test_lidar_counts_are_the_recorded_ones(recording, stepped):
    theirs = recording["step.lidar_k"]
    seen = (theirs[:, 0] < 255) & (stepped["ending"] <= Ending.COMPLETED)
    same = stepped["state"].counts[seen] == theirs[seen]
    assert same.mean() >= 0.999, 1 - same.mean()


def test_observation_is_the_recorded_one_up_to_ties(recording, stepped):
    counts = recording["step.lidar_k"]
    seen = (counts[:, 0] < 255) & (stepped["ending"] <= Ending.COMPLETED)
    obs, counts = stepped["obs"][seen], counts[seen].astype(int)
    is_tied = counts == counts.max(axis=1, keepdims=True)
    ray = np.rint(obs[:, 0] / (np.pi / 54)).astype(int) + 9
    rows = np.arange(len(ray))
    assert np.mean(is_tied[rows, ray]) >= 0.999  # any of the longest rays is right
    theirs = recording["step.obs"][seen]
    same = (is_tied.sum(axis=1) == 1) & (stepped["state"].counts[seen] == counts).all(axis=1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(obs[same], theirs[same], rtol=0, atol=1e-5)


def test_replayed_episodes_end_as_recorded(recording, bank):
    episodes = np.arange(len(recording["ep.length"]))
    length = recording["ep.length"]
    action = np.zeros((length.max(), len(episodes), 2), np.float32)
    for e in episodes:
        action[: length[e], e] = recording["step.action"][recording["ep.start"][e] :][: length[e]]
    params, axes = params_of(bank, recording, recording["ep.track"])
    step = jax.vmap(env.step_env, in_axes=(None, 0, 0, axes))

    @jax.jit
    def replay(state, action):
        def body(state, action):
            _, state, _, _, info = step(jax.random.key(0), state, action, params)
            return state, info["ending"]

        return jax.lax.scan(body, state, action)[1]

    ending = np.asarray(replay(initial_state(recording, episodes), jnp.asarray(action)))
    is_over = ending != Ending.NONE
    at = np.where(is_over.any(axis=0), is_over.argmax(axis=0), len(ending))
    reason = recording["ep.reason"]
    same = np.where(
        reason == 0,  # stopped by the recorder: ours still runs then
        at >= length,
        (ending[np.minimum(at, len(ending) - 1), episodes] == reason)
        & (np.abs(at + 1 - length) <= 1),
    )
    assert same.mean() >= 0.98, np.flatnonzero(~same)
