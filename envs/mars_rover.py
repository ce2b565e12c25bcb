"""The Mars rover: a line of states, two actions, and every quantity known in closed form.

Source: the lecture "Machine Learning for Astrophysics: Reinforcement Learning and Deep Learning",
which counts its states from 1; here they are counted from 0. A rover on six states, terminal at
both ends, with the rewards 100, 0, 0, 0, 0, 40. The model itself comes as arrays too
(`MarsRover.mdp`), so that exact planning (`jaxrl.planning`) runs on it.

The lecture prints the returns 2.7 (left) and 3.6 (right) from its state 4 beside "discount 0.4".
They belong to the discount 0.3: 0.3^3 * 100 = 2.7 and 0.3^2 * 40 = 3.6. At 0.4 there is a tie,
0.4^3 * 100 = 0.4^2 * 40 = 6.4.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

LEFT, RIGHT = 0, 1
MAX_LENGTH = 10_000  # a one-hot observation is as long; the arrays of the model are its square


class MDP(NamedTuple):
    """A finite Markov decision process as arrays; `planning.value_iteration(*mdp, gamma)`."""

    transition: jax.Array  # (S, A, S) float32 P[s, a, s']; a terminal state leads to itself
    reward: jax.Array  # (S,) float32 R[s], paid for the step taken *in* s
    terminal: jax.Array  # (S,) bool: the step taken in s is the last one


@struct.dataclass
class EnvState(environment.EnvState):
    """One rover, 9 bytes."""

    time: jax.Array  # pyright: ignore[reportIncompatibleVariableOverride]  # () int32 steps
    position: jax.Array  # () int32 index of the state the rover is in, 0 leftmost
    ended: jax.Array  # () bool: a step was taken in a terminal state


@struct.dataclass(kw_only=True)
class EnvParams(environment.EnvParams):
    """The law; every field is a leaf. The discount belongs to the problem, not to the rover."""

    rewards: jax.Array  # (length,) float32 R[s], of the state that a step is taken in
    misstep_prob: float | jax.Array = 0.0  # () chance of moving the opposite way, in [0, 1]
    max_steps_in_episode: int = 100  # truncation; from anywhere to an end it takes length steps


class MarsRover(environment.Environment[EnvState, EnvParams]):
    """Drive to one of the two ends of a line: a large reward far away, or a small one near?

    Observation "one_hot" (length,) float32: 1 at the rover's position, 0 elsewhere. Observation
    "index" () int32: the position. Action () int: 0 left, 1 right; others are clipped to these.
    The rover moves one state, with probability `misstep_prob` the opposite way; where the line
    ends (at an end that is not terminal) it stays.

    Reward: R of the state that the step is taken *in*, so that an episode returns R(s_0) +
    gamma R(s_1) + ..., the terminal state's own reward included. Terminated: by the step taken in a
    terminal state, whose action is ignored and which leads nowhere. Truncated: after
    max_steps_in_episode steps. `info` is empty: which end is a success is for the discount to say.

    From index 3 of the default line, always left takes four steps and returns gamma^3 * 100, always
    right takes three and returns gamma^2 * 40: at gamma = 0.9 that is 72.9 against 32.4, at 0.3 it
    is 2.7 against 3.6, and at 0.4 both are 6.4 (the lecture prints 2.7 and 3.6 beside 0.4).
    """

    def __init__(
        self,
        *,
        length: int = 6,
        rewards: Sequence[float] | None = None,
        terminal: Sequence[int] | None = None,
        start: int | Literal["uniform"] = 3,
        misstep_prob: float = 0.0,
        observation: Literal["one_hot", "index"] = "one_hot",
    ):
        """Choose what is static, and the law of `default_params`.

        Args:
            length: number of states. rewards: R of each; None: 100 at the left end, 40 at the right
            one, 0 between. terminal: indices of the terminal states; None: both ends; without any,
            only the time limit ends an episode. start: index of the first state, or "uniform" over
            those that are not terminal. misstep_prob: of `default_params`. observation: "one_hot"
            or "index".

        Raises:
            ValueError: an argument is outside its range.
        """
        _check_integer("length", length)
        if not 2 <= length <= MAX_LENGTH:
            raise ValueError(f"length = {length} must lie in 2..{MAX_LENGTH}")
        if rewards is None:
            rewards = (100.0, *[0.0] * (length - 2), 40.0)
        terminal = (0, length - 1) if terminal is None else terminal
        for name, values in (("rewards", rewards), ("terminal", terminal)):
            if not np.iterable(values) or not all(np.isreal(v) for v in values):
                raise ValueError(f"{name} = {values!r} must be a sequence of numbers")
        if len(rewards) != length:
            raise ValueError(
                f"rewards = {rewards!r} must have one number for each of length = {length} states"
            )
        self.rewards = tuple(float(r) for r in rewards)
        if not np.isfinite(np.asarray(self.rewards, np.float32)).all():
            raise ValueError(f"rewards = {rewards!r} must be finite")
        for index in terminal:
            _check_integer("terminal", index)
            if not 0 <= index < length:
                raise ValueError(f"terminal = {terminal!r} must hold indices in 0..{length - 1}")
        self.terminal = tuple(sorted({int(index) for index in terminal}))
        if len(self.terminal) == length:
            raise ValueError(f"terminal = {terminal!r} leaves no state to start in")
        if start != "uniform":
            _check_integer("start", start, ' or "uniform"')
            if not 0 <= start < length or start in self.terminal:
                raise ValueError(
                    f'start = {start} must be "uniform" or lie in 0..{length - 1}, outside of the '
                    f"terminal states {', '.join(map(str, self.terminal))}"
                )
        _check_probability(misstep_prob)
        if observation not in ("one_hot", "index"):
            raise ValueError(f'observation = {observation!r} must be "one_hot" or "index"')
        self.length = length
        self.start = start
        self.misstep_prob = float(misstep_prob)
        self.observation = observation

    @property
    def default_params(self) -> EnvParams:
        """The law that the constructor was given."""
        return EnvParams(
            rewards=jnp.asarray(self.rewards, jnp.float32),
            misstep_prob=self.misstep_prob,
        )

    def step_env(
        self, key: jax.Array, state: EnvState, action: Any, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One step; a step after the end pays nothing.

        Raises:
            ValueError: the action is not one integer.
        """
        action = jnp.asarray(action)
        if action.shape != () or not jnp.issubdtype(action.dtype, jnp.integer):
            raise ValueError(
                f"action of shape {action.shape} and type {action.dtype} must be one integer, "
                "0 or 1, for MarsRover-v0"
            )
        action = jnp.clip(action, LEFT, RIGHT).astype(jnp.int32)
        misstep = jax.random.uniform(key) < params.misstep_prob
        direction = jnp.where(misstep, RIGHT - action, action) * 2 - 1
        is_last = jnp.asarray(self._terminal_mask())[state.position]
        moved = jnp.clip(state.position + direction, 0, self.length - 1)
        reward = jnp.asarray(params.rewards)[state.position]
        reward = jnp.where(state.ended, 0.0, reward).astype(jnp.float32)
        state = EnvState(
            time=state.time + 1,
            position=jnp.where(is_last, state.position, moved).astype(jnp.int32),
            ended=is_last,
        )
        obs = self.observe(key, state, action, params)
        return obs, state, reward, self.is_terminated(state, params), {}

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """At the start, or anywhere but in a terminal state."""
        if self.start == "uniform":
            starts = np.setdiff1d(np.arange(self.length), self.terminal)
            drawn = jax.random.randint(key, (), 0, len(starts))
            position = jnp.asarray(starts, jnp.int32)[drawn]
        else:
            position = jnp.int32(self.start)
        state = EnvState(time=jnp.int32(0), position=position, ended=jnp.bool_(False))
        return self.observe(key, state, None, params), state

    def observe(self, key: jax.Array, state: EnvState, action: Any, params: EnvParams) -> jax.Array:
        """Where the rover is."""
        del key, action, params
        if self.observation == "index":
            return state.position
        return jax.nn.one_hot(state.position, self.length, dtype=jnp.float32)

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Whether the last step was taken in a terminal state."""
        del params
        return state.ended

    def mdp(self, params: EnvParams) -> MDP:
        """The exact model, S = length and A = 2; vmaps over the real fields of `params`.

        Raises:
            ValueError: rewards or misstep_prob, where they are no tracers, are outside their range.
        """
        for leaf, check in (
            (params.misstep_prob, _check_probability),
            (params.rewards, self._check_rewards),
        ):
            with contextlib.suppress(jax.errors.TracerArrayConversionError):  # nothing to look at
                check(np.asarray(leaf))
        positions = np.arange(self.length)
        moved = np.clip(positions[:, None] + np.array([-1, 1]), 0, self.length - 1)  # (S, 2)
        moved = np.where(np.asarray(self._terminal_mask())[:, None], positions[:, None], moved)
        intended = jnp.asarray(np.eye(self.length, dtype=np.float32)[moved])  # (S, 2, S)
        p = jnp.asarray(params.misstep_prob, jnp.float32)
        transition = (1.0 - p) * intended + p * intended[:, ::-1]
        reward = jnp.asarray(params.rewards, jnp.float32)
        return MDP(transition, reward, jnp.asarray(self._terminal_mask()))

    def render(
        self,
        state: EnvState,
        params: EnvParams,
        *,
        values: Any = None,
        policy: Any = None,
        size: int = 720,
    ) -> np.ndarray:
        """RGB frame (H, size, 3) uint8 of one state; not under jit, needs Pillow.

        values: (length,) numbers to write into the states. policy: (length,) actions, or
        (length, 2) probabilities, to draw as arrows.
        """
        from .render.mars_rover import render

        return render(
            state, params, terminal=self.terminal, values=values, policy=policy, size=size
        )

    @property
    def name(self) -> str:
        """The id under which it is registered."""
        return "MarsRover-v0"

    @property
    def num_actions(self) -> int:
        """Left and right."""
        return 2

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        """0 left, 1 right."""
        del params
        return spaces.Discrete(2)

    def observation_space(self, params: EnvParams) -> spaces.Box | spaces.Discrete:
        """The corners of the unit cube that are one-hot, or the indices."""
        del params
        if self.observation == "index":
            return spaces.Discrete(self.length)
        return spaces.Box(0.0, 1.0, (self.length,), jnp.float32)

    def _terminal_mask(self) -> np.ndarray:
        """(length,) bool."""
        return np.isin(np.arange(self.length), self.terminal)

    def _check_rewards(self, rewards: np.ndarray) -> None:
        if rewards.shape != (self.length,) or not np.isfinite(rewards).all():
            raise ValueError(
                f"rewards = {rewards.tolist()} must be finite, one for each of {self.length} states"
            )


def _check_integer(name: str, value: Any, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} = {value!r} must be an integer{alternative}")


def _check_probability(value: Any) -> None:
    try:
        inside = bool(0.0 <= float(value) <= 1.0)  # False for NaN
    except (TypeError, ValueError):
        inside = False
    if isinstance(value, bool) or not inside:
        value = value.tolist() if isinstance(value, np.ndarray) else value
        raise ValueError(f"misstep_prob = {value!r} must lie in [0, 1]")
