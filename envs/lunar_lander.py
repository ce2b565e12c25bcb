"""LunarLander: land a rocket with two sprung legs between two flags, as Gymnasium's v3 has it.

Source: gymnasium 1.4.0, envs/box2d/lunar_lander.py (MIT), on Box2D 2.3.10 (zlib licence); here
without either. The physics is in `_lander_world.py`, on `_rigid_body.py` and `_contacts.py`; it
repeats what Box2D does with this scene, its unconverged solver and the contact flags' quirk
included. What differs from the original is listed in the class docstring.
"""

import enum
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces
from jax.core import Tracer

from . import _lander_world
from ._lander_start import HEIGHT, WIDTH, after_first_step
from ._lander_world import EXACT, FAST, World
from ._rigid_body import (
    HULL_CENTRE,
    HULL_INV_INERTIA,
    HULL_INV_MASS,
    MAX_ROTATION,
    MAX_TRANSLATION,
    Velocity,
)

FPS = 50
SCALE = 30.0  # pixels per metre: the original gives lengths in pixels
HELIPAD_Y = HEIGHT / 4  # [m]; the pad itself lies at 0.99 of it
LEG_DOWN = 18.0 / SCALE


class LanderEnding(enum.IntEnum):
    """How a step ended the episode, `info["ending"]`. The time limit is `truncated`, no ending."""

    NONE = 0
    LANDED = 1  # asleep: at rest for half a second
    CRASHED = 2  # the hull has touched the ground
    OUT_OF_VIEW = 3  # left or right of the scene


@struct.dataclass
class EnvState(environment.EnvState):
    """One lander over its terrain, 0.4 kB."""

    time: jax.Array  # pyright: ignore[reportIncompatibleVariableOverride]  # () int32 steps
    world: World  # bodies, joints, contacts
    terrain: jax.Array  # (11,) float32 heights [m] at x = 0, 2, ..., 20 m
    wind_index: jax.Array  # (2,) int32 of wind and turbulence
    shaping: jax.Array  # () float32, of which the reward is the change
    throttle: jax.Array  # (2,) float32 of the last step: main in [0, 1], side in [-1, 1]


@struct.dataclass(kw_only=True)
class EnvParams(environment.EnvParams):
    """The law of one episode; every field is a leaf, so `vmap` over them randomises physics."""

    max_steps_in_episode: int = 1000
    gravity: float | jax.Array = -10.0  # [m/s^2], in (-12, 0) in the original
    main_engine_power: float | jax.Array = 13.0  # impulse [N s] per metre of nozzle offset
    side_engine_power: float | jax.Array = 0.6  # likewise
    dispersion: float | jax.Array = 1.0  # scale of the engines' noise
    enable_wind: bool | jax.Array = False
    wind_power: float | jax.Array = 15.0  # [N]
    turbulence_power: float | jax.Array = 1.5  # [N m]
    terrain_roughness: float | jax.Array = 1.0  # 0: flat ground; scales heights above the pad's
    initial_force: float | jax.Array = 1000.0  # [N] bound of the push at the start, at most 1100


class LunarLander(environment.Environment[EnvState, EnvParams]):
    """Land between the flags at x in [8, 12] m, from a random push at the top of the scene.

    Observation (8,) float32: [x / 10 m from the pad's middle, y / 6.67 m above where the hull's
    origin stands when landed, vx / (5 m/s), vy / (7.5 m/s), angle [rad, unwrapped], 0.4 s * turn
    rate, whether the right leg touches, whether the left leg does]. Not clipped, as in the
    original, whose space it may leave; `observation_space` here has bounds that hold.

    Action, discrete () integer: 0 nothing, 1 side engine that pushes to the left, 2 main engine, 3
    side engine that pushes to the right. Continuous (2,) float32: [main, side], clipped to [-1,
    1]; main > 0 fires with power (1 + main) / 2; |side| > 0.5 fires with power |side|. NaN fires
    nothing.

    Reward: the change of -100 |position| - 100 |velocity| - 100 |angle| + 10 per touching leg (of
    the observation), less 0.3 and 0.03 times the power of the engines; +100 instead for a step that
    lands, -100 for one that crashes or leaves. Terminated: asleep on the ground (landed), the hull
    touches the ground, |x| of the observation >= 1. Truncated: after max_steps_in_episode steps.

    `info` of a step: "ending" () int32, see `LanderEnding`; "success" () bool, landed in this step.

    `solver` "exact" is Box2D's: 180 sweeps in its order, its continuous collision, its contact
    flags. "fast" gives up landing like Box2D: 60 sweeps, at most 4 corrections of poses and one
    continuous collision of each leg a step; free flight is the same. What that costs is measured in
    docs/lunar_lander.md.

    Differences from the original: randomness comes from keys; float32 where the original's Python
    part has float64; the ground does not push back at the hull, with whose touch the episode ends
    (the last observation of a crash shows it); the base edge at y = 0 below the terrain is missing;
    the step that the reset takes is a fitted table (to 1e-5). Physics that the original fixes is in
    `EnvParams`.
    """

    def __init__(self, *, continuous: bool = False, solver: Literal["exact", "fast"] = "exact"):
        """Choose what is static.

        Args:
            continuous: whether actions are two throttles instead of one of four. solver: "exact"
            or "fast", see the class.

        Raises:
            ValueError: an argument is outside its range.
        """
        if not isinstance(continuous, bool):
            raise ValueError(f"continuous = {continuous!r} must be True or False")
        if solver not in ("exact", "fast"):
            raise ValueError(f'solver = {solver!r} must be "exact" or "fast"')
        self.continuous = continuous
        self.solver = EXACT if solver == "exact" else FAST

    @property
    def default_params(self) -> EnvParams:
        """The original's defaults: no wind."""
        return EnvParams()

    def step(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, key: jax.Array, state: EnvState, action: Any, params: EnvParams | None = None
    ) -> tuple[Any, EnvState, jax.Array, jax.Array, jax.Array, dict[Any, Any]]:
        """The base class's step with automatic reset.

        Raises:
            ValueError: the action is none of this environment; outside of `jit` and `vmap` also if
                its value is.
        """
        self.check_action(action)
        return super().step(key, state, action, params)

    def step_env(
        self, key: jax.Array, state: EnvState, action: Any, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One step of 0.02 s; the key is for the noise of the engines."""
        noise = 2.0 * _uniform(jax.random.bits(key, (2,), jnp.uint32)) - 1.0
        return self.step_with(state, action, noise, params)

    def step_with(
        self, state: EnvState, action: Any, noise: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One step with given noise (2,) in [-1, 1]: all else is deterministic."""
        self.check_action(action)
        main, side = throttles(action, continuous=self.continuous)
        world = state.world
        wind_x, torque, wind_index = wind(state.wind_index, world.flag, params)
        dispersion = noise.astype(jnp.float32) * params.dispersion / SCALE
        velocity = fire(world, main, side, dispersion, params)
        world = _lander_world.step(
            world._replace(hull_velocity=velocity),
            state.terrain,
            jnp.asarray(params.gravity, jnp.float32),
            wind_x,
            jnp.float32(0.0),
            torque,
            self.solver,
        )
        obs = observation(world)
        shaping = shaping_of(obs)
        reward = shaping - state.shaping - 0.3 * main - 0.03 * jnp.abs(side)
        ending = ending_of(world)
        reward = jnp.where(ending == LanderEnding.NONE, reward, -100.0)
        reward = jnp.where(ending == LanderEnding.LANDED, 100.0, reward).astype(jnp.float32)
        state = EnvState(
            time=state.time + 1,
            world=world,
            terrain=state.terrain,
            wind_index=wind_index,
            shaping=shaping,
            throttle=jnp.stack([main, side]),
        )
        info = {"ending": ending, "success": ending == LanderEnding.LANDED}
        return obs, state, reward, ending != LanderEnding.NONE, info

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """A random terrain, push and wind, after the first step, which the original takes too."""
        bits = jax.random.bits(key, (16,), jnp.uint32)
        u = _uniform(bits[:14])
        wind_index = (bits[14:] % jnp.uint32(19998)).astype(jnp.int32) - 9999
        force = (2.0 * u[12:] - 1.0) * params.initial_force
        state = start(terrain(u[:12], params), force, wind_index, params)
        return self.observe(key, state, None, params), state

    def observe(self, key: jax.Array, state: EnvState, action: Any, params: EnvParams) -> jax.Array:
        """The eight numbers of the class docstring; a function of the state alone."""
        del key, action, params
        return observation(state.world)

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Whether the last step landed, crashed or left."""
        del params
        return ending_of(state.world) != LanderEnding.NONE

    def check_action(self, action: Any) -> None:
        """Refuse what is no action here; of a traced one only shape and type are known.

        Raises:
            ValueError: says what was given and what is wanted.
        """
        traced = isinstance(action, Tracer)
        given = action if traced else np.asarray(action)
        if self.continuous:
            is_real = any(jnp.issubdtype(given.dtype, kind) for kind in (jnp.floating, jnp.integer))
            if given.shape != (2,) or not is_real:
                raise ValueError(
                    f"action of shape {given.shape} and type {given.dtype} must be two real"
                    " numbers, [main, side], for LunarLanderContinuous-v3"
                )
            if not traced and not np.isfinite(given).all():
                raise ValueError(f"action = {given} must be finite")
        else:
            if given.shape != () or not np.issubdtype(given.dtype, np.integer):
                raise ValueError(
                    f"action of shape {given.shape} and type {given.dtype} must be one integer in"
                    " 0..3 for LunarLander-v3"
                )
            if not traced and not 0 <= given <= 3:
                raise ValueError(f"action = {given} must lie in 0..3")

    def render(self, state: EnvState, params: EnvParams, *, width: int = 600) -> np.ndarray:
        """RGB frame (2/3 width, width, 3) uint8 of one state; not under jit, needs Pillow."""
        from .render.lunar_lander import render

        return render(state, params, width=width)

    @property
    def name(self) -> str:
        """The id under which it is registered."""
        return "LunarLanderContinuous-v3" if self.continuous else "LunarLander-v3"

    @property
    def num_actions(self) -> int:
        """Four, or two throttles."""
        return 2 if self.continuous else 4

    def action_space(self, params: EnvParams) -> spaces.Box | spaces.Discrete:
        """Four actions, or [main, side] in [-1, 1]."""
        del params
        if self.continuous:
            return spaces.Box(-1.0, 1.0, (2,), jnp.float32)
        return spaces.Discrete(4)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        """Bounds that hold: the physics lets a step move 2 m and a quarter turn at most.

        Gymnasium declares 2.5, 2.5, 10, 10, 2 pi and 10, which its observations leave (high up, or
        spinning). Twice the way of all steps leaves room for what the joints correct.
        """
        num_steps = jnp.asarray(params.max_steps_in_episode, jnp.float32) + 1.0
        way, turn = 2.0 * MAX_TRANSLATION * num_steps, 2.0 * MAX_ROTATION * num_steps
        fastest = 1.001 * np.array(
            [
                MAX_TRANSLATION * WIDTH / 2,  # a step, times FPS / FPS
                MAX_TRANSLATION * HEIGHT / 2,
                MAX_ROTATION * 20.0,
            ]
        )
        high = jnp.stack([2.5, 2.5 + way / (HEIGHT / 2), *fastest[:2], turn, fastest[2], 1.0, 1.0])
        low = jnp.concatenate([jnp.stack([-2.5, -2.5]), -high[2:6], jnp.zeros(2)])
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        return spaces.Box(low, high, (8,), jnp.float32)


class LunarLanderContinuous(LunarLander):
    """`LunarLander` with two throttles: the class of the id LunarLanderContinuous-v3."""

    def __init__(self, *, solver: Literal["exact", "fast"] = "exact"):
        """As of `LunarLander`."""
        super().__init__(continuous=True, solver=solver)


def terrain(u: jax.Array, params: EnvParams) -> jax.Array:
    """Heights (11,) float32 [m] from u (12,) uniform in [0, 1).

    Each is 0.33 times the sum of three neighbours, where the left neighbour of the first is the
    last of the twelve (the original indexes with -1); the five in the middle are the pad's.
    """
    height = HELIPAD_Y + params.terrain_roughness * (u * (HEIGHT / 2) - HELIPAD_Y)
    index = np.arange(12)
    height = jnp.where((index >= 3) & (index <= 7), HELIPAD_Y, height)
    smooth = 0.33 * (jnp.roll(height, 1) + height + jnp.roll(height, -1))
    return smooth[:11].astype(jnp.float32)


def start(
    terrain: jax.Array, force: jax.Array, wind_index: jax.Array, params: EnvParams
) -> EnvState:
    """The state after the reset's own step; terrain (11,) [m], force (2,) [N], wind_index (2,)."""
    touching = jnp.zeros(2, bool)
    wind_x, torque, wind_index = wind(wind_index, touching, params)
    gravity = jnp.asarray(params.gravity, jnp.float32)
    force = force.astype(jnp.float32)
    world = after_first_step(gravity, force[0] + wind_x, force[1], torque)
    return EnvState(
        time=jnp.int32(0),
        world=world,
        terrain=terrain,
        wind_index=wind_index,
        shaping=shaping_of(observation(world)),
        throttle=jnp.zeros(2, jnp.float32),
    )


def wind(
    index: jax.Array, touching: jax.Array, params: EnvParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Force in x () [N], torque () [N m] and the indices (2,) after it.

    tanh(sin(0.02 i) + sin(0.01 pi i)) times the power, while no leg is believed to touch.
    """
    blows = jnp.asarray(params.enable_wind, bool) & ~touching[0] & ~touching[1]
    # Both sines within one period, or a great index would lose digits in float32: the second
    # repeats every 200 steps, the first every 100 pi = 314 + 0.159265359.
    whole = index.astype(jnp.float32)
    periods = jnp.round(whole * np.float32(1 / (100 * np.pi)))
    rest = (whole - 314.0 * periods) - np.float32(100 * np.pi - 314) * periods
    turn = (index % 200).astype(jnp.float32) * np.float32(0.01 * np.pi)
    gust = jnp.tanh(jnp.sin(rest * np.float32(0.02)) + jnp.sin(turn))
    gust = jnp.where(blows, gust, 0.0)
    index = index + blows.astype(jnp.int32)
    force = (gust[0] * params.wind_power).astype(jnp.float32)
    return force, (gust[1] * params.turbulence_power).astype(jnp.float32), index


def throttles(action: Any, *, continuous: bool) -> tuple[jax.Array, jax.Array]:
    """Power of the main engine, 0 or in [0.5, 1], and of the side engines, signed: float32."""
    if continuous:
        action = jnp.clip(jnp.asarray(action, jnp.float32), -1.0, 1.0)
        main = jnp.where(action[0] > 0.0, 0.5 * (1.0 + action[0]), 0.0)
        side = jnp.where(jnp.abs(action[1]) > 0.5, action[1], 0.0)
        return main, side
    action = jnp.asarray(action)
    main = jnp.where(action == 2, 1.0, 0.0)
    side = jnp.where(action == 1, -1.0, jnp.where(action == 3, 1.0, 0.0))
    return main.astype(jnp.float32), side.astype(jnp.float32)


def fire(
    world: World, main: jax.Array, side: jax.Array, dispersion: jax.Array, params: EnvParams
) -> Velocity:
    """Velocity of the hull after the engines' impulses; dispersion (2,) [m] serves both.

    The nozzles are offsets (ox, oy) from the hull's origin; the impulse is -power * offset. Of the
    side engine the arm is 17 pixels in x and 14 in y, as in the original, so its torque depends on
    the angle.
    """
    vx, vy, w = world.hull_velocity
    sin, cos = jnp.sin(world.hull.a), jnp.cos(world.hull.a)
    # from the centre of mass to the origin
    dx, dy = sin * HULL_CENTRE, -cos * HULL_CENTRE
    along = 4.0 / SCALE + 2.0 * dispersion[0]
    main_x = sin * along - cos * dispersion[1]
    main_y = -cos * along - sin * dispersion[1]
    across = 3.0 * dispersion[1] + jnp.sign(side) * (12.0 / SCALE)
    side_x = sin * dispersion[0] - cos * across
    side_y = -cos * dispersion[0] - sin * across
    main_power = main * params.main_engine_power
    side_power = jnp.abs(side) * params.side_engine_power
    for power, ox, oy, rx, ry in (
        (main_power, main_x, main_y, main_x, main_y),
        (
            side_power,
            side_x,
            side_y,
            side_x - sin * (17.0 / SCALE),
            side_y + cos * (14.0 / SCALE),
        ),
    ):
        px, py = -power * ox, -power * oy
        vx, vy = vx + HULL_INV_MASS * px, vy + HULL_INV_MASS * py
        w = w + HULL_INV_INERTIA * ((dx + rx) * py - (dy + ry) * px)
    return Velocity(*(a.astype(jnp.float32) for a in (vx, vy, w)))


def origin(world: World) -> tuple[jax.Array, jax.Array]:
    """x, y [m] of the hull's origin, 0.1 m below its centre of mass."""
    hull = world.hull
    return hull.x + jnp.sin(hull.a) * HULL_CENTRE, hull.y - jnp.cos(hull.a) * HULL_CENTRE


def observation(world: World) -> jax.Array:
    """The observation (8,) float32, see `LunarLander`."""
    x, y = origin(world)
    v = world.hull_velocity
    numbers = (
        (x - np.float32(WIDTH / 2)) / np.float32(WIDTH / 2),
        (y - np.float32(HELIPAD_Y + LEG_DOWN)) / np.float32(HEIGHT / 2),
        v.x * np.float32(WIDTH / 2 / FPS),
        v.y * np.float32(HEIGHT / 2 / FPS),
        world.hull.a,
        v.w * np.float32(20.0 / FPS),
        world.flag[0].astype(jnp.float32),
        world.flag[1].astype(jnp.float32),
    )
    return jnp.stack(numbers)


def shaping_of(obs: jax.Array) -> jax.Array:
    """What the reward is the change of, from an observation (8,)."""
    return (
        -100.0 * jnp.sqrt(obs[0] * obs[0] + obs[1] * obs[1])
        - 100.0 * jnp.sqrt(obs[2] * obs[2] + obs[3] * obs[3])
        - 100.0 * jnp.abs(obs[4])
        + 10.0 * obs[6]
        + 10.0 * obs[7]
    )


def ending_of(world: World) -> jax.Array:
    """`LanderEnding` () int32 of a world; to have landed wins."""
    x, _ = origin(world)
    is_out = jnp.abs(x - np.float32(WIDTH / 2)) >= np.float32(WIDTH / 2)
    ending = jnp.where(is_out, LanderEnding.OUT_OF_VIEW, LanderEnding.NONE)
    ending = jnp.where(world.game_over, LanderEnding.CRASHED, ending)
    return jnp.where(world.awake, ending, LanderEnding.LANDED).astype(jnp.int32)


def _uniform(bits: jax.Array) -> jax.Array:
    """uint32 -> float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)
