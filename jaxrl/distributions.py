"""The few action distributions the learners need, each a frozen dataclass of its parameters.

A distribution lives on the *drawn* value: for `TanhNormal` that is the number before squashing, so
that its log-density never needs the ill-conditioned inverse of tanh. `squash` turns a drawn value
into [-1, 1]; `jaxrl.spaces.Box.scale` turns that into the environment's bounds.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl import draws

_LOG_2PI = math.log(2.0 * math.pi)


def entropy_of(log_probs: jax.Array) -> jax.Array:
    """Entropy (...) in nats of log-probabilities (..., n); what cannot happen adds nothing."""
    p_log_p = jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0.0)
    return -p_log_p.sum(axis=-1)


@struct.dataclass
class Categorical:
    """Discrete distribution over the last axis of `logits` (..., n)."""

    logits: jax.Array

    def noise(self, key: jax.Array, num: tuple[int, ...] = ()) -> jax.Array:
        """Draw Gumbel noise (*num, ..., n), of which `place` takes (..., n)."""
        shape = num + self.logits.shape
        return draws.draw(jax.random.gumbel, key, shape, self.logits.dtype)

    def place(self, noise: jax.Array) -> jax.Array:
        """Turn noise into a draw (...) int32: the largest of logits plus noise."""
        return jnp.argmax(self.logits + noise, axis=-1).astype(jnp.int32)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw (...) int32."""
        return self.place(self.noise(key))

    def mode(self) -> jax.Array:
        """Most likely value (...), int32."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-probability (...) of integer `value` (...)."""
        log_p = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(log_p, value[..., None], axis=-1)[..., 0]

    def entropy(self, key: jax.Array | None = None) -> jax.Array:
        """Entropy (...) in nats, exact; `key` is not used."""
        del key
        return entropy_of(jax.nn.log_softmax(self.logits))


@struct.dataclass
class Normal:
    """Independent normals over the last axis; mean (..., n), log_std (..., n)."""

    mean: jax.Array
    log_std: jax.Array

    def noise(self, key: jax.Array, num: tuple[int, ...] = ()) -> jax.Array:
        """Draw standard normal noise (*num, ..., n), of which `place` takes (..., n)."""
        return draws.draw(jax.random.normal, key, num + self.mean.shape, self.mean.dtype)

    def place(self, noise: jax.Array) -> jax.Array:
        """Turn noise into a draw (..., n) by the reparameterisation mean + std * noise."""
        return self.mean + jnp.exp(self.log_std) * noise

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw (..., n)."""
        return self.place(self.noise(key))

    def mode(self) -> jax.Array:
        """Most likely value (..., n)."""
        return self.mean

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density (...) of `value` (..., n)."""
        z = (value - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * z**2 - self.log_std - 0.5 * _LOG_2PI, axis=-1)

    def entropy(self, key: jax.Array) -> jax.Array:
        """Entropy (...) in nats, exact; `key` is not used."""
        del key
        return jnp.sum(self.log_std + 0.5 * (1.0 + _LOG_2PI), axis=-1)

    def squash(self, value: jax.Array) -> jax.Array:
        """Cut a drawn value to [-1, 1]."""
        return jnp.clip(value, -1.0, 1.0)


@struct.dataclass
class TanhNormal(Normal):
    """tanh of independent normals (Haarnoja et al. 2018, appendix C), a density on (-1, 1)^n.

    `sample`, `mode` and `log_prob` speak of the value u *before* squashing; `log_prob(u)` is the
    log-density of tanh(u), the change of variables included.
    """

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density (...) of tanh(value); value (..., n).

        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which does not cancel for large |u|.
        """
        log_det = 2.0 * (math.log(2.0) - value - jax.nn.softplus(-2.0 * value))
        return super().log_prob(value) - log_det.sum(axis=-1)

    def entropy(self, key: jax.Array) -> jax.Array:
        """Entropy (...) in nats, an unbiased one-sample estimate: there is no closed form."""
        return -self.log_prob(self.sample(key))

    def squash(self, value: jax.Array) -> jax.Array:
        """Squash a drawn value to (-1, 1)."""
        return jnp.tanh(value)
