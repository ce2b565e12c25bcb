"""What every part of the library shares: the environment's calls, a transition, a training run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import jax
from flax import struct

Metrics = dict[str, jax.Array]
State = TypeVar("State")


class Env(Protocol):
    """The calls of a gymnax 1.0 environment that the learners use; any object with them will do."""

    def reset(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """Return (obs, state) of a new episode."""
        ...

    def step(
        self, key: jax.Array, state: Any, action: Any, params: Any
    ) -> tuple[Any, Any, jax.Array, jax.Array, jax.Array, dict[Any, Any]]:
        """Return (obs, state, reward, terminated, truncated, info), auto-reset included.

        `info["final_observation"]` is the observation before the reset.
        """
        ...

    def action_space(self, params: Any) -> Any:
        """Return the action space: `.n` if discrete, else `.low`, `.high`, `.shape`."""
        ...

    def observation_space(self, params: Any) -> Any:
        """Return the observation space: its `.shape` is that of one observation."""
        ...


@struct.dataclass
class Transition:
    """One step of one environment; batched, time is axis 0 and environments axis 1.

    `next_obs` is the observation *before* auto-reset, so that a truncated episode can be
    bootstrapped: value targets are cut by `terminated`, traces by either ending.
    """

    obs: jax.Array  # (*obs_shape)
    action: jax.Array  # what the policy drew, before scaling to the environment's bounds
    reward: jax.Array  # ()
    terminated: jax.Array  # () bool: the value after this step is 0
    truncated: jax.Array  # () bool: the episode was cut, the value after it is not 0
    next_obs: jax.Array  # (*obs_shape)


@dataclass(frozen=True)
class Train(Generic[State]):
    """A training run as pure functions; calling it with a key is the whole run.

    `train(key) -> (state, metrics)` can be jitted, and vmapped over keys. `init` and `run` are the
    same run in pieces: `run(run(init(key), 3)[0], 2)` ends where `run(init(key), 5)` does, so a
    host loop over compiled chunks can log, save and stop without callbacks inside `jit`.
    """

    init: Callable[[jax.Array], State]  # key -> state before the first update
    update: Callable[[State], tuple[State, Metrics]]  # collect, learn: one update
    num_updates: int
    steps_per_update: int  # environment steps of one update, all environments together

    @property
    def total_steps(self) -> int:
        """Environment steps of the whole run."""
        return self.num_updates * self.steps_per_update

    def run(self, state: State, num_updates: int) -> tuple[State, Metrics]:
        """Go on for `num_updates` updates; each metric comes back with shape (num_updates,)."""
        return jax.lax.scan(lambda s, _: self.update(s), state, length=num_updates)

    def __call__(self, key: jax.Array) -> tuple[State, Metrics]:
        """Train from scratch."""
        return self.run(self.init(key), self.num_updates)


@struct.dataclass
class Policy:
    """What acting needs, and nothing else: this is what is saved and loaded."""

    params: Any  # of the policy network
    obs_stats: Any  # jaxrl.normalize.RunningStats, or None where observations are taken as they are
