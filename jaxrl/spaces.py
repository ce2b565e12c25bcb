"""What a learner needs to know of an environment's spaces, as plain static values."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Discrete:
    """Actions 0 .. n - 1."""

    n: int


@dataclass(frozen=True)
class Box:
    """Real actions of `shape` (a vector, or () for a scalar), each between its `low` and `high`."""

    shape: tuple[int, ...]
    low: tuple[float, ...]  # flat, one per component
    high: tuple[float, ...]

    @property
    def size(self) -> int:
        """Number of components."""
        return len(self.low)

    def scale(self, unit: jax.Array) -> jax.Array:
        """Map components from [-1, 1] to [low, high]: (..., size) -> (..., *shape)."""
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        half, middle = (high - low) / 2, (high + low) / 2
        batch = unit.shape[:-1]
        scaled = unit * half.reshape((1,) * len(batch) + half.shape) + middle.reshape(
            (1,) * len(batch) + half.shape
        )
        return scaled.reshape(batch + self.shape)


ActionSpec = Discrete | Box


def action_spec(space: Any) -> ActionSpec:
    """Read a gymnax action space.

    Raises:
        ValueError: the space is neither discrete nor a bounded box.
    """
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if not all(hasattr(space, name) for name in ("low", "high", "shape")):
        raise ValueError(
            f"action space {space!r} is not supported: it must be Discrete or Box (Tuple and Dict "
            "spaces can be flattened by a wrapper)"
        )
    shape = tuple(int(n) for n in space.shape)
    low = np.broadcast_to(np.asarray(space.low, np.float32), shape).reshape(-1)
    high = np.broadcast_to(np.asarray(space.high, np.float32), shape).reshape(-1)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(
            f"action space with low = {low.tolist()} and high = {high.tolist()} is not supported: "
            "bounds must be finite and low < high"
        )
    return Box(shape, tuple(low.tolist()), tuple(high.tolist()))


def obs_shape(space: Any) -> tuple[int, ...]:
    """Read the shape of one observation.

    Raises:
        ValueError: the space is not one array (a Dict or Tuple space).
    """
    if not hasattr(space, "shape"):
        raise ValueError(
            f"observation space {space!r} is not supported: it must be one array (flatten Dict and "
            "Tuple observations by a wrapper)"
        )
    return tuple(int(n) for n in space.shape)


def read(env: Any, env_params: Any) -> tuple[ActionSpec, tuple[int, ...]]:
    """Return (action spec, shape of one observation) of an environment, also while tracing.

    Raises:
        ValueError: see `action_spec` and `obs_shape`.
    """
    with jax.ensure_compile_time_eval():  # some environments make their bounds as jax arrays
        return (
            action_spec(env.action_space(env_params)),
            obs_shape(env.observation_space(env_params)),
        )


def flat(obs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Flatten observations for a network: (*batch, *shape) -> (*batch, size), float32."""
    batch = obs.shape[: obs.ndim - len(shape)]
    return obs.reshape((*batch, -1)).astype(jnp.float32)
