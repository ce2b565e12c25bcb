"""Networks: shapes, parameter counts, what their options mean."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.distributions import Categorical, Normal, TanhNormal
from jaxrl.networks import (
    MAX_COLUMNS,
    MAX_LOG_STD,
    MIN_SAMPLES,
    MLP,
    TILE,
    TRANSPOSED_ROWS,
    CriticNet,
    PolicyNet,
    ValueNet,
    dense_product,
    init_two,
    sigmoid,
    silu,
    two_values,
)
from jaxrl.spaces import Box, Discrete

OBS = jnp.ones((7, 5))
BOX = Box((2,), (-1.0, -1.0), (1.0, 1.0))


def count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_mlp_shape_and_parameter_count():
    net = MLP((8, 4), 3)
    params = net.init(jax.random.key(0), OBS)
    assert net.apply(params, OBS).shape == (7, 3)
    assert count(params) == (5 * 8 + 8) + (8 * 4 + 4) + (4 * 3 + 3)


def test_hidden_weights_are_orthogonal_with_gain_sqrt_two():
    kernel = MLP((5,), 1).init(jax.random.key(0), OBS)["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(kernel @ kernel.T, 2.0 * np.eye(5), atol=1e-5)


def test_sigmoid_and_silu_are_exact_to_float32():
    x = jnp.concatenate([jnp.linspace(-87, 87, 100_001), jnp.linspace(-1, 1, 10_001)])
    wide = np.float64(x)
    exact = 1.0 / (1.0 + np.exp(-wide))
    slope = exact * (1.0 + wide * (1.0 - exact))
    ulp = np.finfo(np.float32).eps
    np.testing.assert_allclose(jax.jit(sigmoid)(x), exact, rtol=80 * ulp)  # of exp(87): 60 of them
    np.testing.assert_allclose(jax.jit(sigmoid)(x), exact, atol=2 * ulp)
    np.testing.assert_allclose(jax.jit(silu)(x), wide * exact, rtol=2 * ulp, atol=4 * ulp)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(silu)))(x), slope, atol=8 * ulp)
    twice = jax.vmap(jax.grad(jax.grad(silu))), jax.vmap(jax.grad(jax.grad(jax.nn.silu)))
    np.testing.assert_allclose(*(jax.jit(f)(x) for f in twice), atol=16 * ulp)


def test_silu_far_out_and_of_what_is_no_number():
    far = jnp.array([jnp.inf, 1e30, 200.0, -200.0, -1e4, jnp.nan])
    np.testing.assert_allclose(silu(far), [jnp.inf, 1e30, 200.0, 0.0, 0.0, jnp.nan], atol=1e-30)
    assert np.isfinite(jax.vmap(jax.grad(silu))(far[1:-1])).all()


@pytest.mark.parametrize("rows", [TRANSPOSED_ROWS[0] - 1, *TRANSPOSED_ROWS[::64], 257])
def test_gradients_of_a_layer_by_hand_however_its_product_is_made(rows):
    x, kernel, g = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3),
            [(2, rows, 5), (2, 5, 3), (2, rows, 3)],
            strict=True,
        )
    )
    dims = (((1,), (0,)), ((), ()))

    def weighed(x, kernel, g):
        return (dense_product(x, kernel, dims) * g).sum()

    gradient = jax.grad(weighed, argnums=(0, 1))
    many = jax.jit(jax.vmap(gradient))(x, kernel, g)  # seeds side by side
    one = jax.jit(gradient)(x[1], kernel[1], g[1])
    by_hand = np.float64(g[1]) @ np.float64(kernel[1]).T, np.float64(x[1]).T @ np.float64(g[1])
    for found in (one, [of_both[1] for of_both in many]):
        for a, b in zip(found, by_hand, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    copied = "optimization_barrier" in str(jax.make_jaxpr(gradient)(x[0], kernel[0], g[0]))
    assert copied == (rows in TRANSPOSED_ROWS)


@pytest.mark.parametrize("batch", [(), (MIN_SAMPLES - 1,), (3, MIN_SAMPLES)])
@pytest.mark.parametrize("outputs", [None, 2, MAX_COLUMNS + 1])
def test_widths_off_the_tile_keep_weights_transposed_and_compute_the_same(batch, outputs):
    hidden = (TILE + 8, 2 * TILE)
    net = MLP(hidden, outputs)
    obs = jax.random.normal(jax.random.key(0), (*batch, 5))
    params = net.init(jax.random.key(1), obs)["params"]
    assert params["Dense_0"]["weight"].shape == (hidden[0], 5)
    assert params["Dense_1"]["weight"].shape == hidden[::-1]
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases, too, are to count

    def plain(params):
        x = obs
        for i in range(2):
            layer = params[f"Dense_{i}"]
            bias = jnp.broadcast_to(layer["bias"], (*batch, hidden[i]))
            x = jnp.tanh(x @ layer["weight"].T + bias)
        if outputs is not None:
            layer = params["Dense_2"]
            x = x @ layer["kernel"] + jnp.broadcast_to(layer["bias"], (*batch, outputs))
        return x

    def ours(params):
        return net.apply({"params": params}, obs)

    np.testing.assert_allclose(ours(params), plain(params), atol=1e-5)
    gradients = [jax.grad(lambda p, f=f: (f(p) ** 2).mean())(params) for f in (ours, plain)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *gradients)


def test_transposed_hidden_weights_are_orthogonal_with_gain_sqrt_two():
    net, obs = MLP((TILE + 8,), 3), jnp.ones((MIN_SAMPLES, 5))
    weight = net.init(jax.random.key(0), obs)["params"]["Dense_0"]["weight"]
    np.testing.assert_allclose(weight.T @ weight, 2.0 * np.eye(5), atol=1e-5)


def test_vmapped_weights_are_the_single_ones_drawn_one_after_the_other():
    """Batched LAPACK can hang on CPU: every decomposition in the program takes one matrix."""
    net, keys = MLP((5,), 3), jax.random.split(jax.random.key(0), 4)
    init = jax.vmap(lambda key: net.init(key, OBS))
    many = init(keys)
    for i, key in enumerate(keys):
        one = net.init(key, OBS)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), many, one)
    ranks = [rank for name, rank in inputs_of(jax.make_jaxpr(init)(keys)) if name == "qr"]
    assert ranks, "no decomposition found: has JAX renamed it?"
    assert set(ranks) == {2}


def inputs_of(jaxpr) -> Iterator[tuple[str, int]]:
    """Each equation's name and the rank of its first input, those inside of others as well."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.invars:
            yield equation.primitive.name, equation.invars[0].aval.ndim
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from inputs_of(inner)


def test_two_networks_are_drawn_apart():
    net, action = CriticNet((8,)), jnp.ones((7, 2))
    both = init_two(net, jax.random.key(0), OBS, action)
    for i, key in enumerate(jax.random.split(jax.random.key(0))):
        one = net.init(key, OBS, action)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), both, one)
    first, second = two_values(net, both, OBS, action)
    assert np.abs(first - second).min() > 0.01


def test_value_has_no_trailing_axis_and_takes_one_or_many():
    net = ValueNet((8,))
    params = net.init(jax.random.key(0), OBS)
    assert net.apply(params, OBS).shape == (7,)
    assert net.apply(params, OBS[0]).shape == ()


def test_policy_of_discrete_actions():
    net = PolicyNet((8,), Discrete(3))
    pi = net.apply(net.init(jax.random.key(0), OBS), OBS)
    assert isinstance(pi, Categorical)
    assert pi.logits.shape == (7, 3)
    # the small last layer makes the first policy nearly uniform
    np.testing.assert_allclose(jax.nn.softmax(pi.logits), 1 / 3, atol=0.02)


@pytest.mark.parametrize(("squash", "kind"), [("tanh", TanhNormal), ("clip", Normal)])
@pytest.mark.parametrize("dependent", [False, True])
def test_policy_of_real_actions(squash, kind, dependent):
    net = PolicyNet((8,), BOX, "tanh", squash, dependent, -0.5)
    params = net.init(jax.random.key(0), OBS)
    pi = net.apply(params, OBS)
    assert type(pi) is kind
    assert pi.mean.shape == pi.log_std.shape == (7, 2)
    np.testing.assert_allclose(pi.log_std, -0.5, atol=0.05)
    hidden = 5 * 8 + 8
    assert count(params) == hidden + ((8 * 4 + 4) if dependent else (8 * 2 + 2) + 2)


def test_log_std_is_bounded():
    net = PolicyNet((8,), BOX, initial_log_std=100.0)
    pi = net.apply(net.init(jax.random.key(0), OBS), OBS)
    np.testing.assert_array_equal(pi.log_std, MAX_LOG_STD)
