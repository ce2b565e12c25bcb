"""LunarLander against recordings of Gymnasium: the reset, free flight, whole episodes replayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import LanderEnding, LunarLander
from jaxrl.envs.lunar_lander import start, terrain

pytestmark = pytest.mark.reference
OUTCOME = {
    LanderEnding.LANDED: 0,
    LanderEnding.CRASHED: 1,
    LanderEnding.OUT_OF_VIEW: 2,
    LanderEnding.NONE: 3,  # the time limit
}


@pytest.fixture(scope="module")
def recording(reference_dir):
    path = reference_dir / "lunar_lander.npz"
    if not path.is_file():
        pytest.skip(f"no recording of LunarLander at {path}")
    with np.load(path) as z:
        return {name: z[name] for name in z.files}


def params_of(env, windy):
    """Parameters of each episode, and the axes to vmap over."""
    params = env.default_params
    axes = jax.tree.map(lambda _: None, params).replace(enable_wind=0)
    return params.replace(enable_wind=jnp.asarray(windy)), axes


def initial_states(recording):
    env = LunarLander()
    params, axes = params_of(env, recording["ep_wind"] == 1)
    make = jax.vmap(start, in_axes=(0, 0, 0, axes))
    return make(
        jnp.asarray(recording["ep_smooth_y"]),
        jnp.asarray(recording["ep_force"], jnp.float32),
        jnp.asarray(recording["ep_wind_idx"]),
        params,
    )


def replay(recording, solver):
    """Observations (T, E, 8), rewards and endings (T, E) under the recorded actions and noise.

    Discrete actions as the throttles that they are: one program for all. A lander whose episode is
    over starts anew, for the batch is the faster the fewer are on the ground.
    """
    env = LunarLander(continuous=True, solver=solver)
    length, first = recording["ep_length"], recording["ep_start"]
    rows = np.minimum(first + np.arange(length.max())[:, None], first + length - 1)
    action, noise = recording["action"][rows], recording["noise"][rows].astype(np.float32)
    throttles = np.array([[0, 0], [0, -1], [1, 0], [0, 1]], np.float32)
    discrete = throttles[np.where(recording["ep_variant"] == 1, 0, action[..., 0]).astype(int)]
    action = np.where((recording["ep_variant"] == 1)[:, None], action, discrete)
    params, axes = params_of(env, recording["ep_wind"] == 1)
    step = jax.vmap(env.step_with, in_axes=(0, 0, 0, axes))

    @jax.jit
    def run(first, action, noise):
        def body(state, inputs):
            obs, state, reward, over, info = step(state, *inputs, params)
            again = jax.vmap(
                lambda over, a, b: jax.tree.map(lambda x, y: jnp.where(over, x, y), a, b)
            )
            return again(over, first, state), (obs, reward, info["ending"])

        return jax.lax.scan(body, first, (action, noise))[1]

    state = initial_states(recording)
    return jax.device_get(run(state, jnp.asarray(action), jnp.asarray(noise)))


class Replay:
    """What has become of the recorded episodes; obs: of each, until its own end."""

    def __init__(self, recording, solver):
        obs, reward, ending = replay(recording, solver)
        num = len(recording["ep_length"])
        self.length, self.outcome, self.ret = np.zeros(num, int), np.full(num, -1), np.zeros(num)
        self.obs = {}
        for e in range(num):
            over = np.flatnonzero(ending[:, e] != LanderEnding.NONE)
            # past the recorded length the actions are made up: only that it went on counts
            n = int(over[0]) + 1 if len(over) else len(ending)
            self.length[e] = n
            if n <= recording["ep_length"][e] + 50:
                self.outcome[e] = OUTCOME[LanderEnding(ending[n - 1, e])]
            self.ret[e] = reward[:n, e].sum()
            self.obs[e] = obs[:n, e]


@pytest.fixture(scope="module")
def exact(recording):
    return Replay(recording, "exact")


def theirs(recording, e):
    first = recording["ep_start"][e]
    return recording["obs"][first : first + recording["ep_length"][e]]


def free_flight(recording, e):
    """Recorded steps before the first in which anything touches."""
    first = recording["ep_start"][e]
    touch = recording["touch"][first : first + recording["ep_length"][e]].any(axis=1)
    return int(touch.argmax()) if touch.any() else len(touch)


def errors_in_flight(recording, replayed, num_steps):
    """Greatest error of the observation per step of all episodes, in the first num_steps."""
    errors = []
    for e, obs in replayed.obs.items():
        n = min(num_steps, free_flight(recording, e), len(obs))
        errors.append(np.abs(obs[:n] - theirs(recording, e)[:n]).max(axis=1, initial=0.0))
    return np.concatenate(errors)


def test_terrain_from_the_recorded_draws(recording):
    u = recording["ep_height"] / (40.0 / 6.0)
    params = LunarLander().default_params
    ours = jax.vmap(terrain, in_axes=(0, None))(jnp.asarray(u, jnp.float32), params)
    np.testing.assert_allclose(ours, recording["ep_smooth_y"], rtol=0, atol=2e-6)


def test_the_state_after_the_reset(recording):
    env = LunarLander()
    state = initial_states(recording)
    obs = jax.vmap(env.observe, in_axes=(None, 0, None, None))(None, state, None, None)
    np.testing.assert_allclose(obs, recording["ep_obs0"], rtol=0, atol=1e-5)
    world = state.world
    legs = recording["ep_bodies_post"][:, 1:]
    for ours, column in zip(world.leg, (0, 1, 2), strict=True):
        np.testing.assert_allclose(ours, legs[..., column], rtol=0, atol=2e-5)
    for ours, column in zip(world.leg_velocity, (3, 4, 5), strict=True):
        np.testing.assert_allclose(ours, legs[..., column], rtol=0, atol=5e-5)


def test_free_flight(recording, exact):
    assert errors_in_flight(recording, exact, 50).max() <= 1e-4
    errors = errors_in_flight(recording, exact, 100)
    assert len(errors) > 10_000
    assert np.quantile(errors, 0.999) <= 1e-4
    assert errors.max() <= 2e-3


@pytest.mark.parametrize(
    ("policy", "variant", "same_outcome", "same_length"),
    [(None, None, 0.97, 0.84), ("heur", 0, 0.90, 0.0), ("heur", 1, 1.0, 0.90)],
)
def test_episodes_end_as_recorded(recording, exact, policy, variant, same_outcome, same_length):
    chosen = recording["ep_wind"] == 0
    if policy is not None:
        chosen &= (recording["ep_policy"] == policy) & (recording["ep_variant"] == variant)
    outcome = (exact.outcome == recording["ep_outcome"])[chosen]
    length = (exact.length == recording["ep_length"])[chosen]
    assert outcome.mean() >= same_outcome, np.flatnonzero(chosen)[~outcome]
    assert length.mean() >= same_length, np.flatnonzero(chosen)[~length]


def test_windy_episodes_end_as_recorded(recording, exact):
    chosen = recording["ep_wind"] == 1
    outcome = (exact.outcome == recording["ep_outcome"])[chosen]
    assert outcome.mean() >= 0.97, np.flatnonzero(chosen)[~outcome]


def test_landings_agree_throughout(recording, exact):
    chosen = (recording["ep_policy"] == "heur") & (recording["ep_variant"] == 1)
    chosen &= recording["ep_wind"] == 0
    worst = []
    for e in np.flatnonzero(chosen):
        n = min(len(exact.obs[e]), recording["ep_length"][e])
        worst.append(np.abs(exact.obs[e][:n] - theirs(recording, e)[:n]).max())
    assert np.mean(np.array(worst) <= 1e-3) >= 0.8, worst


def test_returns_agree(recording, exact):
    chosen = recording["ep_wind"] == 0
    difference = np.abs(exact.ret - recording["ep_ret"])[chosen]
    assert np.median(difference) <= 0.02, np.median(difference)


def test_the_fast_solver_flies_alike(recording):
    fast = Replay(recording, "fast")
    chosen = recording["ep_wind"] == 0
    outcome = (fast.outcome == recording["ep_outcome"])[chosen].mean()
    length = (fast.length == recording["ep_length"])[chosen].mean()
    errors = errors_in_flight(recording, fast, 50)
    print(f"fast: outcome {outcome:.3f}, length {length:.3f}, flight {errors.max():.1e}")
    assert outcome >= 0.90
    assert errors.max() <= 2e-3  # a joint that is at a clamp is solved less well
