"""Running mean and variance, as values: kept in the train state, saved with the policy."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class RunningStats:
    """Mean and variance of all samples seen so far, elementwise over `shape`."""

    mean: jax.Array  # (*shape)
    var: jax.Array  # (*shape) population variance
    count: jax.Array  # () float32 number of samples; float: it only weighs


def init(shape: tuple[int, ...]) -> RunningStats:
    """Return the statistics before any sample; `normalize` with them is the identity."""
    return RunningStats(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))


def update(stats: RunningStats, batch: jax.Array) -> RunningStats:
    """Merge a batch (*batch, *shape) of samples: Chan, Golub and LeVeque (1983) eq. 2.1."""
    axes = tuple(range(batch.ndim - stats.mean.ndim))
    batch = batch.astype(jnp.float32)
    batch_count = float(batch.size // stats.mean.size)
    batch_mean, batch_var = batch.mean(axes), batch.var(axes)
    count = stats.count + batch_count
    delta = batch_mean - stats.mean
    m2 = stats.var * stats.count + batch_var * batch_count
    m2 = m2 + delta**2 * (stats.count * batch_count / count)
    return RunningStats(stats.mean + delta * (batch_count / count), m2 / count, count)


def normalize(stats: RunningStats, x: jax.Array, clip: float = 10.0) -> jax.Array:
    """Return (x - mean) / std, cut to +-clip; x (*batch, *shape) -> the same, float32."""
    lift = (1,) * (x.ndim - stats.mean.ndim)
    mean, var = (
        stats.mean.reshape(lift + stats.mean.shape),
        stats.var.reshape(lift + stats.mean.shape),
    )
    return jnp.clip((x - mean) * jax.lax.rsqrt(var + 1e-8), -clip, clip)
