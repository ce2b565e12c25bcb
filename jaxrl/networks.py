"""Flax (Linen) networks: plain functions of params, for single or batched inputs alike."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl import draws
from jaxrl.distributions import Categorical, Normal, TanhNormal
from jaxrl.spaces import ActionSpec, Discrete

# 2^f for |f| <= 1/2 to a part in 10^7, in powers of f from the fifth down: minimax with 2^0 = 1
EXP2 = (1.3264727e-3, 9.671513e-3, 5.5507336e-2, 2.4022242e-1, 6.931470e-1, 1.0)


@jax.custom_jvp
def sigmoid(x: jax.Array) -> jax.Array:
    """Return 1 / (1 + exp(-x)), any shape, to float32's rounding; XLA's own takes longer on CPU.

    exp(-x) = 2^n 2^f with a whole n, which is added to the exponent's bits, and a short polynomial.
    """
    t = jnp.clip(x * -math.log2(math.e), -126.0, 126.0)
    n = jnp.round(t)
    power = functools.reduce(lambda p, c: p * (t - n) + c, EXP2[1:], jnp.float32(EXP2[0]))
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + (n.astype(jnp.int32) << 23)
    return 1.0 / (1.0 + jax.lax.bitcast_convert_type(bits, jnp.float32))


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    s = sigmoid(*primals)
    return s, tangents[0] * (s * (1.0 - s))


@jax.custom_jvp
def silu(x: jax.Array) -> jax.Array:
    """Return x sigmoid(x), of float32: Elfwing et al. (2017, arXiv 1702.03118), eq. 6."""
    return x * sigmoid(x)


@silu.defjvp
def _silu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    s = sigmoid(*primals)
    y = primals[0] * s
    return y, tangents[0] * (s + y * (1.0 - s))  # written so, it is one kernel less


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "silu": silu,
    "gelu": jax.nn.gelu,
}

# exp(-10) .. exp(2): beyond these a Gaussian policy is numerically a point or no policy at all
MIN_LOG_STD, MAX_LOG_STD = -10.0, 2.0

MAX_COLUMNS = 8  # of a Head that is faster column by column
TILE = 32  # widths of which XLA's products on CPU are made; other widths cost up to the next
MIN_SAMPLES = 16  # that are worth being laid along the columns instead
TRANSPOSED_ROWS = range(64, 257)  # of a batch, see `product`


def orthogonal(normals: jax.Array) -> jax.Array:
    """Make of standard normals (in, out) an orthogonal matrix, uniformly drawn; one at a time.

    Mezzadri (2007, arXiv math-ph/0609050), section 5. Under vmap one after the other: a batched QR
    decomposition spreads over XLA's threads on CPU and waits for them on one of them; two at once,
    of two networks or on two devices, can wait for each other for ever (jax 0.10).
    """

    @jax.custom_batching.sequential_vmap
    def one(normals: jax.Array) -> jax.Array:
        wide = normals.shape[0] < normals.shape[1]
        q, r = jnp.linalg.qr(normals.T if wide else normals)
        diagonal = (r * jnp.eye(r.shape[0], dtype=r.dtype)).sum(0)  # jnp.diag is four kernels more
        q = q * jnp.where(diagonal < 0, -1.0, 1.0)[None]
        return q.T if wide else q

    return one(normals)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel, for x (rows, in) and kernel (in, out), with a faster gradient on CPU.

    XLA's product x.T @ g of the kernel's gradient takes longer there than that of a transposed
    copy, made by the kernel that makes x. The same numbers, bit for bit, up to 256 rows.
    """
    return x @ kernel


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return x @ kernel, (x, kernel)


def _product_backward(inputs: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    transposed = jax.lax.platform_dependent(
        x, cpu=lambda x: jax.lax.optimization_barrier(x.T), default=jnp.transpose
    )
    return g @ kernel.T, transposed @ g


product.defvjp(_product_forward, _product_backward)


def dense_product(x: jax.Array, kernel: jax.Array, dims: Any, **options: Any) -> jax.Array:
    """Take the place of `jax.lax.dot_general` in `nn.Dense`."""
    if x.ndim == 2 and x.shape[0] in TRANSPOSED_ROWS:
        return product(x, kernel)
    return jax.lax.dot_general(x, kernel, dims, **options)


class Head(nn.Module):
    """The last layer, x (..., in) -> (..., features): `nn.Dense`, written for few features.

    On CPU a matrix product with a handful of columns, its gradient above all, takes 3 to 6 times as
    long as one product with a vector for each column; the numbers are the same. With
    `sample_columns` x is (in, samples), the result (samples, features) all the same.

    `join` is a linear map of the features, (..., features) -> (..., fewer), that follows: it is
    applied to the weights instead, once and not for each sample.
    """

    features: int
    kernel_init: Callable[..., jax.Array]
    join: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, sample_columns: bool = False) -> jax.Array:
        """Apply the layer."""
        size = x.shape[0 if sample_columns else -1]
        kernel = self.param("kernel", self.kernel_init, (size, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if self.join is not None:
            kernel, bias = self.join(kernel), self.join(bias)
        num_columns = kernel.shape[-1]
        if num_columns > MAX_COLUMNS:
            out = (x.T if sample_columns else x) @ kernel
        else:
            columns = jnp.unstack(kernel, axis=-1)
            each = [column @ x if sample_columns else x @ column for column in columns]
            out = jnp.stack(each, axis=-1)
        return out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)


class TransposedDense(nn.Module):
    """`nn.Dense` with a `weight` (features, in) for its kernel: x (..., in) -> (..., features).

    With `sample_columns` x (in, samples) -> (features, samples).
    """

    features: int
    kernel_init: Callable[..., jax.Array]
    """Of weights (in, features)."""

    @nn.compact
    def __call__(self, x: jax.Array, sample_columns: bool) -> jax.Array:
        """Apply the layer."""
        shape = (self.features, x.shape[0 if sample_columns else -1])
        weight = self.param(
            "weight",
            lambda key, shape, dtype: self.kernel_init(key, shape[::-1], dtype).T,
            shape,
            jnp.float32,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if sample_columns:
            return weight @ x + bias[:, None]
        return x @ weight.T + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


class MLP(nn.Module):
    """Fully connected layers with orthogonal weights: x (..., in) -> (..., features[-1]).

    `out_scale` is the gain of the last layer; hidden layers use sqrt(2). With `out_size` None the
    last hidden layer, activated, is the output. `layer_norm` normalises each hidden layer before
    its activation (Ba et al. 2016, arXiv 1607.06450). `join` follows the last layer, see `Head`.

    Where a width above 32 does not fill XLA's tiles on CPU (and without `layer_norm`), hidden
    weights are kept transposed, (out, in), and samples are laid along the columns: a batch of 128
    fills them (DQN with widths of 120 and 84 takes a tenth less time; with 64 and 64 it would take
    a tenth more).
    """

    hidden: Sequence[int]
    out_size: int | None = None
    activation: str = "tanh"
    out_scale: float = 1.0
    layer_norm: bool = False
    join: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layers."""
        activation = ACTIVATIONS[self.activation]
        scales = [2.0**0.5] * len(self.hidden) + [self.out_scale]
        outputs = [*self.hidden, *([] if self.out_size is None else [self.out_size])]
        shapes = list(itertools.pairwise([x.shape[-1], *outputs]))
        normals: Sequence[jax.Array] = []
        if self.is_initializing():
            # at once: XLA compiles a draw for each layer, and a key for it, in 0.2 s on CPU
            sizes = [math.prod(shape) for shape in shapes]
            drawn = draws.draw(jax.random.normal, self.make_rng("params"), (sum(sizes),))
            normals = jnp.split(drawn, list(itertools.accumulate(sizes))[:-1])

        def weights(layer: int) -> Callable[..., jax.Array]:
            def init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
                del key
                if not normals:  # Flax asks for the shape when it applies the layer
                    return jnp.zeros(shape, dtype)
                return (scales[layer] * orthogonal(normals[layer].reshape(shape))).astype(dtype)

            return init

        batch, last = x.shape[:-1], len(self.hidden)
        transposed = not self.layer_norm and any(w > TILE and w % TILE for w in self.hidden)
        columns = transposed and math.prod(batch) >= MIN_SAMPLES
        if columns:
            x = x.reshape(-1, x.shape[-1]).T
        for i, width in enumerate(self.hidden):
            if transposed:
                x = TransposedDense(width, weights(i), name=f"Dense_{i}")(x, columns)
            else:
                name = f"Dense_{i}"
                x = nn.Dense(width, kernel_init=weights(i), dot_general=dense_product, name=name)(x)
            x = activation(nn.LayerNorm()(x) if self.layer_norm else x)
        if self.out_size is not None:
            x = Head(self.out_size, weights(last), self.join, name=f"Dense_{last}")(x, columns)
        elif columns:
            x = x.T
        return x.reshape(*batch, -1) if columns else x


class ValueNet(nn.Module):
    """State value: obs (..., in) -> (...)."""

    hidden: Sequence[int]
    activation: str = "tanh"

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        """Return V(obs)."""
        return MLP(self.hidden, 1, self.activation)(obs)[..., 0]

    def value(self, params: Any, obs: jax.Array) -> jax.Array:
        """Return V(obs) under `params`: `apply`, with its type known."""
        return cast(jax.Array, self.apply(params, obs))


def join_heads(heads: jax.Array) -> jax.Array:
    """Turn V and advantages A (..., 1 + n) into Q = V + A - mean A (..., n): Wang et al. eq. 9."""
    value, *advantages = [heads[..., i] for i in range(heads.shape[-1])]
    base = value - sum(advantages) / len(advantages)
    return jnp.stack([base + advantage for advantage in advantages], axis=-1)


class QNet(nn.Module):
    """Action values of `num_actions` discrete actions: obs (..., in) -> (..., num_actions).

    `dueling`: Q = V + A - mean A from two heads (Wang et al. 2016, arXiv 1511.06581, eq. 9).
    `action_input`: one output for an observation joined with a one-hot action, evaluated for every
    action, instead of one output per action.
    """

    hidden: Sequence[int]
    num_actions: int
    activation: str = "relu"
    dueling: bool = False
    action_input: bool = False

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        """Return Q(obs, .)."""
        if self.action_input:
            batch = obs.shape[:-1]
            every = jnp.broadcast_to(
                jnp.eye(self.num_actions), (*batch, self.num_actions, self.num_actions)
            )
            obs = jnp.broadcast_to(obs[..., None, :], (*every.shape[:-1], obs.shape[-1]))
            return MLP(self.hidden, 1, self.activation)(jnp.concatenate([obs, every], -1))[..., 0]
        if self.dueling:  # one layer of 1 + n outputs is two heads side by side
            return MLP(self.hidden, 1 + self.num_actions, self.activation, join=join_heads)(obs)
        return MLP(self.hidden, self.num_actions, self.activation)(obs)

    def values(self, params: Any, obs: jax.Array) -> jax.Array:
        """Return Q(obs, .) under `params`: `apply`, with its type known."""
        return cast(jax.Array, self.apply(params, obs))


class CriticNet(nn.Module):
    """Numbers about a real action: obs (..., in), action (..., size) -> (..., num_outputs).

    `outputs` are all of them, `values` the first alone: its value Q.
    """

    hidden: Sequence[int]
    activation: str = "relu"
    num_outputs: int = 1

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Return the outputs for (obs, action)."""
        joined = jnp.concatenate([obs, action], axis=-1)
        return MLP(self.hidden, self.num_outputs, self.activation)(joined)

    def outputs(self, params: Any, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Return the outputs under `params`: `apply`, with its type known."""
        return cast(jax.Array, self.apply(params, obs, action))

    def values(self, params: Any, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Return Q(obs, action) (...) under `params`."""
        return self.outputs(params, obs, action)[..., 0]


def init_two(net: QNet | CriticNet, key: jax.Array, *inputs: jax.Array) -> Any:
    """Return two sets of params (leading axis 2) for inputs of those shapes, independently drawn.

    One after the other, as each network's init is: what is alike compiles once.
    """
    each = [net.init(one, *inputs) for one in draws.split(key)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def two_values(net: QNet | CriticNet, params: Any, *inputs: jax.Array) -> jax.Array:
    """Return the values (2, ...) under two sets of params (leading axis 2) for the same inputs.

    One network after the other: on CPU a batched matrix product takes a quarter longer than two.
    """
    each = [
        cast(jax.Array, net.values(jax.tree.map(lambda x, i=i: x[i], params), *inputs))
        for i in (0, 1)
    ]
    return jnp.stack(each)


class ActorNet(nn.Module):
    """Deterministic policy: obs (..., in) -> action (..., size) in [-1, 1], by tanh."""

    hidden: Sequence[int]
    size: int
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        """Return mu(obs)."""
        net = MLP(self.hidden, self.size, self.activation, 0.01, self.layer_norm)
        return jnp.tanh(net(obs))

    def action(self, params: Any, obs: jax.Array) -> jax.Array:
        """Return mu(obs) under `params`: `apply`, with its type known."""
        return cast(jax.Array, self.apply(params, obs))


class PolicyNet(nn.Module):
    """Stochastic policy: obs (..., in) -> a distribution over the drawn actions.

    Discrete: Categorical with n logits. Box: `TanhNormal` (`squash="tanh"`) or `Normal` cut to the
    bounds (`squash="clip"`); the standard deviation is a parameter of its own, or, with
    `state_dependent_std`, a second output.
    """

    hidden: Sequence[int]
    action: ActionSpec
    activation: str = "tanh"
    squash: str = "tanh"
    state_dependent_std: bool = False
    initial_log_std: float = 0.0

    @nn.compact
    def __call__(self, obs: jax.Array) -> Categorical | Normal:
        """Return pi(. | obs)."""
        if isinstance(self.action, Discrete):
            logits = MLP(self.hidden, self.action.n, self.activation, out_scale=0.01)(obs)
            return Categorical(logits)
        size = self.action.size
        outputs = 2 * size if self.state_dependent_std else size
        out = MLP(self.hidden, outputs, self.activation, out_scale=0.01)(obs)
        if self.state_dependent_std:
            mean, log_std = jnp.split(out, 2, axis=-1)
            log_std = log_std + self.initial_log_std
        else:
            mean = out
            init = nn.initializers.constant(self.initial_log_std)
            log_std = jnp.broadcast_to(self.param("log_std", init, (size,)), mean.shape)
        log_std = jnp.clip(log_std, MIN_LOG_STD, MAX_LOG_STD)
        return (TanhNormal if self.squash == "tanh" else Normal)(mean, log_std)

    def policy(self, params: Any, obs: jax.Array) -> Categorical | Normal:
        """Return pi(. | obs) under `params`: `apply`, with its type known."""
        return cast(Categorical | Normal, self.apply(params, obs))
