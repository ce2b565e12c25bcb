"""MicroRacer: drive one lap of a random track, seeing it only through a lidar.

Source: github.com/asperti/MicroRacer, commit f7effe0 (MIT); paper: Asperti & Del Brutto (2022),
"MicroRacer: a didactic environment for deep reinforcement learning",
https://arxiv.org/abs/2203.10494. The tracks are made in `_tracks.py`, the lidar is in `_lidar.py`.
What differs from the original is listed in the class docstring.
"""

import enum
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from ._lidar import MAX_COUNT, NUM_RAYS, RAY_SPACING, is_on_road, reading, scan
from ._tracks import TrackBank, make_tracks


class Ending(enum.IntEnum):
    """How a step ended the episode, `info["ending"]`. The time limit is `truncated`, no ending."""

    NONE = 0
    COMPLETED = 1
    CROSSING_BORDER = 2
    WRONG_DIRECTION = 3
    TOO_SLOW = 4


@struct.dataclass
class EnvState(environment.EnvState):
    """One car, 51 bytes. After a failure the car is where it was before the step."""

    time: jax.Array  # pyright: ignore[reportIncompatibleVariableOverride]  # () int32 steps
    track: jax.Array  # () int32 index into params.tracks
    position: jax.Array  # (2,) float32
    velocity: jax.Array  # (2,) float32 [1 / time unit]
    angle: (
        jax.Array
    )  # () float32 polar angle of the position, unwrapped: 0 at the start, -2 pi at the finish
    counts: jax.Array  # (19,) uint8 lidar samples before the first blocked one, ray 0 rightmost
    ending: jax.Array  # () int32 Ending of the last step


@struct.dataclass(kw_only=True)
class EnvParams(environment.EnvParams):
    """The law of one episode; every field is a leaf. Lengths: the road is nominally 0.04 wide.

    To sweep physics with the bank shared: `axes = jax.tree.map(lambda _: None,
    params).replace(grip=0)`, then `jax.vmap(env.step, in_axes=(0, 0, 0, axes))(keys, states,
    actions, params.replace(grip=grips))`.
    """

    tracks: TrackBank  # shared by all environments
    # Truncation; a good driver needs about 490 steps, a slow one 900.
    max_steps_in_episode: int = 1000
    dt: float | jax.Array = 0.04  # time units a step
    max_acceleration: float | jax.Array = 0.1  # [1 / time unit^2]
    max_turn: float | jax.Array = np.pi / 6  # [rad] a step
    grip: float | jax.Array = 1.741  # most lateral acceleration, speed * turn rate
    turn_limit: bool | jax.Array = True  # whether grip limits the turn
    min_speed: float | jax.Array = 0.05  # slower is "too slow"
    low_speed_termination: bool | jax.Array = True  # whether "too slow" exists
    failure_reward: float | jax.Array = -3.0  # instead of the step's reward
    # What a race rewards: a lap pays its length less time_cost for each of its steps. 0: the
    # original, where speed pays only through the discount. Above dt * speed (0.01 is the distance
    # of a step at speed 0.25) driving on costs more than it pays: keep the crash dearer than that.
    time_cost: float | jax.Array = 0.0
    initial_speed_min: float | jax.Array = 0.07  # applies with low_speed_termination
    initial_speed_max: float | jax.Array = 0.5
    action_limit: float | jax.Array = 1.0  # actions are clipped to +- this; inf: the original


class MicroRacer(environment.Environment[EnvState, EnvParams]):
    """Drive a car clockwise around a random closed track, past a chicane and six obstacles, without
    touching.

    Observation "compact" (5,) float32: [direction of the longest ray [rad, positive = to the left],
    reading one ray to its right, its reading, reading one ray to its left, speed]. Of
    equally long rays any may count; at the edge of the fan the missing neighbour is the longest ray
    itself. Observation "lidar" (20,) float32: the 19 readings, from 30 degrees right to 30 degrees
    left of the direction of travel, then the speed. **Index 0 is the rightmost ray.** After a
    failure the observation is zeros.

    Action (2,) float32 in [-1, 1]: [acceleration, turn]; a positive turn goes to the right.
    Clipped; NaN is 0. The turn is limited to max_turn and by the grip: at most grip * dt / speed.

    Reward: the distance driven, dt * speed (a lap is about 6.6), less time_cost, which is 0 unless
    set; -3 instead on failure; no bonus at the finish. Terminated, in this order: off the road (2),
    not moving clockwise around the origin (3), too slow (4), a whole lap driven (1). Truncated:
    after max_steps_in_episode steps.

    `info` of a step: "ending" () int32, see `Ending`; "success" () bool, the lap was completed in
    this step; "progress" () float32, share of the lap in [0, 1]; "speed" () float32 after the step.

    Differences from the original: actions are clipped, there is a time limit, a car that crosses
    the far side of the ring backward has not finished (the original says so), the failure
    observation has shape (5,), ties for the longest ray go to a coin that is a function of the
    state (the original: to rounding noise), outside the raster there is wall (the original: wraps
    or raises), tracks come from a bank drawn in advance, all randomness from keys. Kept, raster
    accidents included: everything else. The lidar is short by up to one stride: the original's
    refinement never runs, and its published agents were trained so.
    """

    def __init__(
        self,
        *,
        num_tracks: int = 256,
        track_seed: int = 0,
        obstacles: bool = True,
        chicanes: bool = True,
        observation: Literal["compact", "lidar"] = "compact",
    ):
        """Choose what is static; the bank is built by the first `default_params`.

        Args:
            num_tracks: size of the bank of `default_params`; 0.44 MB and about 10 ms of a CPU core
            a track. track_seed: the key of that bank; two environments with equal arguments have
            equal tracks. obstacles: whether there are six obstacles on each track. chicanes:
            whether there is a chicane on each track. observation: "compact" (5,) as in the
            original, or "lidar" (20,).

        Raises:
            ValueError: an argument is outside its range.
        """
        for name, flag in (("obstacles", obstacles), ("chicanes", chicanes)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} = {flag!r} must be True or False")
        for name, number in (("num_tracks", num_tracks), ("track_seed", track_seed)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"{name} = {number!r} must be an integer")
        if not 1 <= num_tracks <= 30_000:
            raise ValueError(f"num_tracks = {num_tracks} must lie in 1..30000")
        if observation not in ("compact", "lidar"):
            raise ValueError(f'observation = {observation!r} must be "compact" or "lidar"')
        self.num_tracks = num_tracks
        self.track_seed = track_seed
        self.obstacles = obstacles
        self.chicanes = chicanes
        self.observation = observation
        self._tracks: TrackBank | None = None

    @property
    def default_params(self) -> EnvParams:
        """The original's law, on this instance's bank of tracks (built once, some seconds)."""
        if self._tracks is None:
            with jax.ensure_compile_time_eval():  # may be asked for inside a trace
                self._tracks = make_tracks(
                    jax.random.key(self.track_seed),
                    self.num_tracks,
                    obstacles=self.obstacles,
                    chicanes=self.chicanes,
                )
        return EnvParams(tracks=self._tracks)

    def step_env(
        self, key: jax.Array, state: EnvState, action: Any, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One step of dt; deterministic, `key` is not used.

        Raises:
            ValueError: the action is not two real numbers.
        """
        action = jnp.asarray(action)
        is_real = jnp.issubdtype(action.dtype, jnp.floating)
        if action.shape != (2,) or not (is_real or jnp.issubdtype(action.dtype, jnp.integer)):
            raise ValueError(
                f"action of shape {action.shape} and type {action.dtype} must be two real numbers, "
                "[acceleration, turn], for MicroRacer-v0"
            )
        action = action.astype(jnp.float32)
        action = jnp.where(jnp.isnan(action), 0.0, action)
        action = jnp.clip(action, -params.action_limit, params.action_limit)

        speed = _norm(state.velocity)
        direction = _direction(state.velocity, speed)
        speed = jnp.maximum(0.0, speed + params.dt * params.max_acceleration * action[0])
        most = params.grip * params.dt / jnp.maximum(speed, 1e-6)  # no speed: max_turn is less
        turn = jnp.where(params.turn_limit, jnp.minimum(params.max_turn, most), params.max_turn)
        direction = _rotate(direction, -turn * action[1])
        speed = speed.astype(jnp.float32)
        direction = direction.astype(jnp.float32)
        step = (params.dt * speed * direction).astype(jnp.float32)
        position = state.position + step

        # Clockwise, strictly: a product is better conditioned than a difference of angles.
        is_forward = state.position[0] * step[1] - state.position[1] * step[0] < 0
        angle = _angle(position)
        angle = jnp.where((angle > 0) | (state.angle < -np.pi), angle - 2 * np.pi, angle)
        # In the second half of the lap the positive x axis is reached: 2 pi are driven.
        is_finished = (state.angle < -np.pi) & (angle <= -2 * np.pi)

        ending = jnp.where(is_finished, Ending.COMPLETED, Ending.NONE)
        is_slow = (speed < params.min_speed) & params.low_speed_termination
        ending = jnp.where(is_slow, Ending.TOO_SLOW, ending)
        ending = jnp.where(is_forward, ending, Ending.WRONG_DIRECTION)
        on_road = is_on_road(params.tracks.road, state.track, position)
        ending = jnp.where(on_road, ending, Ending.CROSSING_BORDER).astype(jnp.int32)
        failed = ending > Ending.COMPLETED

        counts = scan(params.tracks.clear, state.track, position, direction)
        state = EnvState(
            time=state.time + 1,
            track=state.track,
            position=jnp.where(failed, state.position, position),
            velocity=jnp.where(failed, state.velocity, speed * direction),
            angle=jnp.where(failed, state.angle, angle),
            counts=jnp.where(failed, state.counts, counts),
            ending=ending,
        )
        paid = params.dt * speed - params.time_cost
        reward = jnp.where(failed, params.failure_reward, paid).astype(jnp.float32)
        info = {
            "ending": ending,
            "success": ending == Ending.COMPLETED,
            "progress": jnp.clip(state.angle / (-2 * np.pi), 0.0, 1.0),
            "speed": _norm(state.velocity),
        }
        obs = self.observe(key, state, action, params)
        return obs, state, reward, self.is_terminated(state, params), info

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """At the start of a track of the bank, with speed max(U / 2, 0.07), U uniform in [0, 1)."""
        bits = jax.random.bits(key, (2,), jnp.uint32)
        track = (bits[0] % params.tracks.num_tracks).astype(jnp.int32)
        u = (bits[1] >> 8).astype(jnp.float32) * 2.0**-24
        slowest = jnp.where(params.low_speed_termination, params.initial_speed_min, 0.0)
        speed = jnp.maximum(u * params.initial_speed_max, slowest).astype(jnp.float32)
        state = start(params.tracks, track, speed)
        return self.observe(key, state, None, params), state

    def observe(self, key: jax.Array, state: EnvState, action: Any, params: EnvParams) -> jax.Array:
        """What the car sees in this state; a function of the state alone."""
        del key, action, params
        speed = _norm(state.velocity)
        if self.observation == "lidar":
            obs = jnp.concatenate([reading(state.counts), speed[None]])
        else:
            longest = _longest_ray(state.counts, state.time)
            rays = jnp.stack([longest - 1, longest, longest + 1])
            rays = jnp.where((rays < 0) | (rays >= NUM_RAYS), longest, rays)
            direction = (longest - NUM_RAYS // 2).astype(jnp.float32) * np.float32(RAY_SPACING)
            obs = jnp.concatenate([direction[None], reading(state.counts[rays]), speed[None]])
        return jnp.where(state.ending > Ending.COMPLETED, 0.0, obs).astype(jnp.float32)

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Whether the last step completed the lap or failed."""
        del params
        return state.ending != Ending.NONE

    def render(self, state: EnvState, params: EnvParams, *, size: int = 720) -> np.ndarray:
        """RGB frame (size, size, 3) uint8 of one state; not under jit, needs Pillow."""
        from .render.micro_racer import render

        return render(state, params, size=size)

    @property
    def name(self) -> str:
        """The id under which it is registered."""
        return "MicroRacer-v0"

    def action_space(self, params: EnvParams) -> spaces.Box:
        """[acceleration, turn], both in [-1, 1]."""
        del params
        return spaces.Box(-1.0, 1.0, (2,), jnp.float32)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        """True, finite bounds: the longest chord of the ring, full throttle for a whole episode."""
        furthest = reading(jnp.int32(MAX_COUNT))
        gain = jnp.asarray(params.dt * params.max_acceleration)
        gain = jnp.where(gain > 0, gain * params.action_limit, 0.0)  # the limit may be infinite
        at_start = jnp.maximum(params.initial_speed_min, params.initial_speed_max)
        fastest = 1.001 * (at_start + gain * params.max_steps_in_episode)
        fastest = jnp.asarray(fastest, jnp.float32)
        if self.observation == "lidar":
            high = jnp.stack([furthest] * NUM_RAYS + [fastest])
            return spaces.Box(jnp.zeros(NUM_RAYS + 1), high, (NUM_RAYS + 1,), jnp.float32)
        widest = jnp.float32(NUM_RAYS // 2) * np.float32(RAY_SPACING)
        low = jnp.stack([-widest] + [jnp.zeros((), jnp.float32)] * 4)
        high = jnp.stack([widest, furthest, furthest, furthest, fastest])
        return spaces.Box(low, high, (5,), jnp.float32)


def start(tracks: TrackBank, track: jax.Array, speed: jax.Array) -> EnvState:
    """The state at the start of a given track () int32, with a given speed () float32."""
    return EnvState(
        time=jnp.int32(0),
        track=track,
        position=tracks.start[track],
        velocity=speed * tracks.heading[track],
        angle=jnp.float32(0.0),
        counts=tracks.start_counts[track],
        ending=jnp.int32(Ending.NONE),
    )


def _longest_ray(counts: jax.Array, time: jax.Array) -> jax.Array:
    """Index, int32, of the longest of 19 rays; among equals a coin, a hash of the scan and the
    time.

    Readings lie on a lattice, so that 5 % of scans have equals, and the original leaves the choice
    to the rounding of square roots. A rule that always prefers one side is noticed: with the
    rightmost, the published DSAC completes 4.6 points more laps than there, with the coin 2.8.
    """
    counts = counts.astype(jnp.uint32)
    rays = np.arange(NUM_RAYS, dtype=np.uint32)
    toss = jnp.sum(counts * (2 * rays + 1), dtype=jnp.uint32) + 64 * time.astype(jnp.uint32)
    toss = toss * jnp.uint32(0x9E3779B1)
    toss = ((toss ^ (toss >> 15)) * jnp.uint32(0x85EBCA77)) >> 27  # 5 bits
    # Of two numbers below 32 the larger one after ^ toss is either, with equal chance.
    longest = jnp.max((counts << 5) | (rays ^ toss))
    return ((longest & 31) ^ toss).astype(jnp.int32)


def _norm(vector: jax.Array) -> jax.Array:
    return jnp.sqrt(vector[0] * vector[0] + vector[1] * vector[1])


def _direction(velocity: jax.Array, speed: jax.Array) -> jax.Array:
    """Unit vector; a car that stands points along x, as atan2(0, 0) says."""
    stands = speed == 0
    unit = velocity / jnp.where(stands, 1.0, speed)
    return jnp.where(stands, jnp.array([1.0, 0.0], jnp.float32), unit)


def _rotate(vector: jax.Array, angle: jax.Array) -> jax.Array:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos * vector[0] - sin * vector[1], cos * vector[1] + sin * vector[0]])


def _angle(point: jax.Array) -> jax.Array:
    return jnp.arctan2(point[1], point[0])
