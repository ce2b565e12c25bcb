"""FLOPs by hand, against XLA where a program has no loop, and of whole training runs."""

import functools
import itertools

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrl.agents import dqn, ppo, sac
from jaxrl.cost import flops
from jaxrl.cost.flops import count

X = jax.ShapeDtypeStruct((8, 3), jnp.float32)
W = jax.ShapeDtypeStruct((3, 5), jnp.float32)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def convolve(x, w, stride=1, padding="SAME", **kwargs):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


# one operation, by hand ---------------------------------------------------------------------------


def test_a_product_of_matrices():
    cost = count(jnp.matmul, X, W)
    assert (cost.macs, cost.flops, cost.layer_flops) == (8 * 3 * 5, 240, 240)
    ((layer, times),) = cost.layers.items()
    assert (layer.S, layer.Cin, layer.Cout, layer.K1, layer.K2, times) == (8, 3, 5, 1, 1, 1)


def test_batch_axes_are_layers_of_their_own():
    cost = count(jax.vmap(jnp.matmul), *(jnp.zeros((7, *x.shape)) for x in (X, W)))
    assert cost.macs == 7 * 8 * 3 * 5
    ((layer, times),) = cost.layers.items()
    assert (layer.S, layer.Cin, layer.Cout, times) == (8, 3, 5, 7)


def test_a_vector_has_one_row():
    ((layer, _),) = count(jnp.matmul, jnp.zeros(3), W).layers.items()
    assert (layer.S, layer.Cin, layer.Cout, layer.macs) == (1, 3, 5, 15)


@pytest.mark.parametrize(
    ("function", "kind", "expected"),
    [
        (lambda x: x + x, "elementwise", 24),
        (lambda x: x < 1.0, "elementwise", 24),
        (lambda x: jnp.where(x < 1.0, x, -x), "elementwise", 3 * 24),
        (lambda x: x**2, "elementwise", 24),
        (lambda x: x**7, "elementwise", 4 * 24),  # x2, x4, x2 * x, x4 * x3
        (lambda x: x**-2, "elementwise", 2 * 24),
        (lambda x: jnp.tanh(x), "transcendental", 24),
        (lambda x: x.sum(), "reduction", 23),
        (lambda x: x.max(axis=1), "reduction", 24 - 8),
        (lambda x: jnp.cumsum(x, axis=1), "reduction", 24 - 8),
        (lambda x: x.at[jnp.array([0, 2])].add(1.0), "elementwise", 6),
        (lambda x: x.T.reshape(4, 6)[::2], "elementwise", 0),
        (lambda x: x.astype(jnp.int32), "elementwise", 0),
    ],
)
def test_small_operations(function, kind, expected):
    cost = count(function, X)
    assert cost.by_kind == {**dict.fromkeys(flops.KINDS, 0), kind: expected}
    assert cost.not_counted == {}


def test_integers_are_no_flops():
    i = jnp.ones((8, 3), jnp.int32)
    cost = count(lambda i: (i + i, i @ i.T, i < 2, i.sum()), i)
    assert cost.flops == cost.macs == 0
    assert cost.int_ops == 24 + 2 * 8 * 3 * 8 + 24 + 23


@pytest.mark.parametrize("batched", [False, True])
def test_both_gradients_of_a_dense_layer_are_its_layer(batched):
    x, w = jnp.zeros((8, 3)), jnp.zeros((3, 5))
    if batched:
        x, w = jnp.zeros((7, 8, 3)), jnp.zeros((7, 3, 5))
    cost = count(lambda x, w: jax.vjp(jnp.matmul, x, w)[1](jnp.matmul(x, w)), x, w)
    times = 7 if batched else 1
    for stage in ("forward", "input gradient", "weight gradient"):
        ((layer, n),) = ((x, n) for x, n in cost.layers.items() if x.stage == stage)
        assert (layer.S, {layer.Cin, layer.Cout}, layer.macs, n) == (8, {3, 5}, 120, times)


# convolutions -------------------------------------------------------------------------------------


def test_taps_on_padding_are_nominal_only():
    # 3 taps on an axis of 4: the first and the last position miss one each, 12 - 2 = 10 of 12
    cost = count(convolve, jnp.zeros((2, 4, 4, 5)), jnp.zeros((3, 3, 5, 7)))
    assert cost.macs == 2 * 7 * 5 * 10 * 10
    assert cost.nominal_macs == 2 * 7 * 5 * 12 * 12
    assert cost.by_kind["convolution"] == 2 * cost.macs
    ((layer, _),) = cost.layers.items()
    assert (layer.S, layer.Cin, layer.Cout, layer.K1, layer.K2) == (2 * 16, 5, 7, 3, 3)
    assert layer.forward_macs == cost.nominal_macs


def test_taps_on_the_zeros_of_a_dilated_input_are_nominal_only():
    # x0 0 x1 0 x2, kernel 3, no padding: 3 outputs; they meet x0 x1, x1, x1 x2: 5 of 9 taps
    function = functools.partial(convolve, padding=[(0, 0)] * 2, lhs_dilation=(2, 2))
    cost = count(function, jnp.zeros((1, 3, 3, 1)), jnp.zeros((3, 3, 1, 1)))
    assert (cost.macs, cost.nominal_macs) == (5 * 5, 9 * 9)


def test_a_dilated_kernel_has_its_own_taps_only():
    function = functools.partial(convolve, padding="VALID", rhs_dilation=(2, 2))
    cost = count(function, jnp.zeros((1, 6, 6, 1)), jnp.zeros((3, 3, 1, 1)))
    assert cost.macs == cost.nominal_macs == (2 * 3) ** 2  # 2 x 2 outputs of 3 x 3 taps


def test_groups_divide_the_input_channels():
    function = functools.partial(convolve, padding="VALID", feature_group_count=4)
    cost = count(function, jnp.zeros((1, 5, 5, 8)), jnp.zeros((3, 3, 2, 16)))
    ((layer, _),) = cost.layers.items()
    assert cost.macs == 9 * 16 * 2 * 9
    assert (layer.Cin, layer.Cout, layer.forward_macs) == (2, 16, cost.macs)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_both_gradients_of_a_convolution_cost_what_it_costs(stride, padding, groups):
    """Each pair of input value and weight that meets forward meets once in each gradient."""
    x, w = jnp.zeros((2, 11, 11, 4)), jnp.zeros((3, 3, 4 // groups, 6))
    function = functools.partial(
        convolve, stride=stride, padding=padding, feature_group_count=groups
    )
    forward = count(function, x, w)
    both = count(lambda x, w: jax.vjp(function, x, w)[1](jnp.ones_like(function(x, w))), x, w)
    assert both.macs == 2 * forward.macs  # the forward pass itself is dead here
    stages = {layer.stage: layer for layer in both.layers}
    assert set(stages) == {"input gradient", "weight gradient"}
    (layer,) = forward.layers
    for one in stages.values():
        assert (one.S, one.K1, one.K2, one.macs) == (layer.S, 3, 3, layer.macs)
        assert (one.Cin, one.Cout) == (layer.Cin, layer.Cout)
        assert one.forward_macs == layer.forward_macs
    if stride == 3:  # the naive count loops over the dilated gradient
        assert stages["input gradient"].nominal_macs > 5 * layer.macs


# loops, branches, calls ---------------------------------------------------------------------------


def steps(n):
    return lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=n)[0]


def test_a_scan_counts_its_length_and_xla_does_not():
    x, w = normal(4, 4), normal(4, 4)
    cost = count(steps(1000), x, w)
    assert cost.macs == 1000 * 4**3
    assert cost.by_kind["transcendental"] == 1000 * 16
    analysis = jax.jit(steps(1000)).lower(x, w).compile().cost_analysis()
    assert analysis["flops"] < cost.flops / 500  # the body once: not an oracle of loops


def test_nested_scans_multiply_exactly():
    def outer(x, w):
        return jax.lax.scan(lambda c, _: (steps(10**7)(c, w), None), x, length=10**9)[0]

    cost = count(outer, jnp.zeros((3, 3)), jnp.zeros((3, 3)))
    assert cost.macs == 27 * 10**16  # beyond float64's whole numbers
    assert list(cost.layers.values()) == [10**16]
    assert cost.loop_steps == 10**9 + 10**16


def test_a_while_loop_is_counted_as_hinted_or_once_with_a_warning():
    def until(x, w):
        with jax.named_scope("settle"):
            return jax.lax.while_loop(lambda c: c.sum() < 9.0, lambda c: c @ w, x)

    x, w = jnp.zeros((4, 4)), jnp.zeros((4, 4))
    once = count(until, x, w)
    assert (once.macs, once.by_kind["reduction"]) == (64, 15)
    (warning,) = once.warnings
    assert "while loop (in settle" in warning
    assert "while_steps" in warning
    for hint in (7, {"settle": 7, "other": 3}):
        hinted = count(until, x, w, while_steps=hint)
        # the condition is looked at once more
        assert (hinted.macs, hinted.by_kind["reduction"]) == (7 * 64, 8 * 15)
        assert hinted.warnings == ()
        assert hinted.loop_steps == 7
    assert count(until, x, w, while_steps={"other": 3}).warnings == once.warnings
    with pytest.raises(ValueError, match="while_steps = -1 must be an integer >= 0"):
        count(until, x, w, while_steps=-1)


def multiply(x, n):
    """x, multiplied n times by itself: 64 n MACs."""
    return jax.lax.while_loop(lambda c: c[0] != n, lambda c: (c[0] + 1, c[1] @ x), (0, x))[1]


def measured_program(name):
    """(function of x (4, 4), multiplications in one call)."""

    @jax.checkpoint
    def twice(x, n):
        return multiply(multiply(x, n), n + 1)

    return {
        # 0 + 1 + 2 + 3: a mean of 1.5
        "scan": (lambda x: jax.lax.scan(lambda c, n: (multiply(c, n), n), x, jnp.arange(4)), 6),
        # three rounds of 0, 1 and 2
        "while": (
            lambda x: jax.lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, multiply(c[1], c[0])), (0, x)
            ),
            3,
        ),
        "call": (jax.jit(lambda x: twice(x, 5)), 5 + 6),
        "branch": (lambda x: jax.lax.cond(x.sum() > 0, lambda x: multiply(x, 7), jnp.sin, x), 7),
        "other branch": (
            lambda x: jax.lax.cond(x.sum() < 0, lambda x: multiply(x, 7), jnp.sin, x),
            0,
        ),
        # lanes of 1, 4 and 2: all go on until the last one ends
        "vmap": (
            lambda x: jax.vmap(multiply, in_axes=(None, 0))(x, jnp.array([1, 4, 2])),
            3 * 4,
        ),
        "none": (lambda x: x @ x, 1),
    }[name]


@pytest.mark.parametrize(
    "name", ["scan", "while", "call", "branch", "other branch", "vmap", "none"]
)
def test_loops_are_counted_as_long_as_they_were(name):
    function, multiplications = measured_program(name)
    cost = flops.count_measured(function, jnp.ones((4, 4)) / 4)
    assert cost.macs == 64 * multiplications
    assert isinstance(cost.flops, int)
    has_loop = name != "none"
    assert [("counted as long as" in w) for w in cost.warnings] == [True] * has_loop
    if not has_loop:
        assert cost == count(function, jnp.ones((4, 4)))


def test_an_environment_with_loops_is_measured_as_it_runs():
    """A gymnax step inside a scan: random keys, structures and selections pass through."""
    env, params = gymnax.make("CartPole-v1")

    def walk(key):
        obs, state = env.reset(key, params)

        def step(carry, key):
            state, settled = carry
            obs, state, *_ = env.step(key, state, 1, params)
            settled = jax.lax.while_loop(lambda x: x < 3.0, lambda x: x + 1.0, settled * 0.0)
            return (state, settled), obs

        return jax.lax.scan(step, (state, obs[0]), jax.random.split(key, 5))

    cost = flops.count_measured(walk, jax.random.key(0))
    assert cost.loop_steps == 5 + 5 * 3
    once = count(walk, jax.random.key(0))
    assert cost.flops - once.flops == 5 * 2 + 5 * 3  # two more additions, three more comparisons


def test_a_branch_counts_as_the_dearest():
    def branch(i, x, w):
        return jax.lax.switch(
            i, [lambda x, w: x, lambda x, w: (x @ w) @ w, lambda x, w: x @ w], x, w
        )

    assert count(branch, jnp.int32(0), jnp.zeros((4, 4)), jnp.zeros((4, 4))).macs == 2 * 64


def test_vmap_turns_a_branch_into_both():
    """A lane-wise condition becomes a selection: the compiled program does both."""

    def branch(x):
        return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

    assert count(branch, jnp.zeros(4)).by_kind["transcendental"] == 4
    assert count(jax.vmap(branch), jnp.zeros((3, 4))).by_kind["transcendental"] == 2 * 12


@jax.custom_vjp
def square(x, w):
    return (x @ w) ** 2


square.defvjp(
    lambda x, w: (square(x, w), (x, w)),
    lambda kept, g: (g @ kept[1].T @ kept[1] @ kept[1].T, kept[0].T @ g),
)


def test_calls_are_looked_into():
    x, w = jnp.zeros((4, 4)), jnp.zeros((4, 4))
    assert count(jax.jit(jnp.matmul), x, w).macs == 64
    assert count(square, x, w).macs == 64
    assert count(jax.nn.relu, x).by_kind["elementwise"] == 16  # a custom_jvp
    # one product forward, four in the rule of our own
    gradient = jax.value_and_grad(lambda x, w: square(x, w).sum(), argnums=(0, 1))
    assert count(gradient, x, w).macs == 5 * 64


def test_recomputation_counts():
    def loss(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    x, w = jnp.zeros((4, 4)), jnp.zeros((4, 4))
    plain = count(jax.value_and_grad(loss, argnums=1), x, w).macs
    again = count(jax.value_and_grad(jax.checkpoint(loss), argnums=1), x, w).macs
    assert plain == 64 * (2 + 3)  # two products, their three gradients
    assert again == plain + 2 * 64


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("i")
    sharded = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count(sharded, jnp.zeros((8, 3))).by_kind["transcendental"] == 24


# what is left out ---------------------------------------------------------------------------------


def test_dead_code_costs_nothing():
    def function(x, w):
        _ = jnp.sin(x) @ w
        return jax.jit(lambda x: (x + 1.0, x @ w, jnp.tanh(x)))(x)[0]

    cost = count(function, jnp.zeros((4, 4)), jnp.zeros((4, 4)))
    assert cost.by_kind == {**dict.fromkeys(flops.KINDS, 0), "elementwise": 16}


def test_a_carry_that_only_feeds_itself_is_dead():
    def body(carry, x):
        used, waiting, unused, idle = carry
        return (used + waiting, jnp.sin(waiting), jnp.tan(unused), idle), (used, jnp.exp(x))

    def function(x):
        carry, (trace, _) = jax.lax.scan(body, (x, x, x, x), jnp.zeros((6, 4)))
        return carry[0], trace

    cost = count(function, jnp.zeros(4))
    # the second carried value reaches the first one only a step later: it lives
    assert cost.by_kind["elementwise"] == 6 * 4
    assert cost.by_kind["transcendental"] == 6 * 4  # sin, neither tan nor exp


def test_what_the_condition_of_a_loop_needs_is_alive():
    def function(x):
        return jax.lax.while_loop(
            lambda c: c[1] < 1.0, lambda c: (c[0] + 1.0, jnp.sin(c[1]), jnp.tan(c[2])), (x, x, x)
        )[0]

    cost = count(function, jnp.zeros(()), while_steps=5)
    assert cost.by_kind["transcendental"] == 5
    assert cost.by_kind["elementwise"] == 5 + 6


def test_an_effect_keeps_its_operands_alive():
    def function(x):
        jax.debug.callback(lambda _: None, jnp.sin(x))
        return x

    cost = count(function, jnp.zeros(4))
    assert cost.by_kind["transcendental"] == 4
    assert cost.not_counted == {"debug_callback": 1}


def test_what_is_not_counted_has_a_name():
    def body(x, key):
        x = jnp.sort(x + jax.random.uniform(key, (4, 4))) + jnp.fft.fft(x).real
        return jnp.linalg.cholesky(x), None

    cost = count(lambda x, k: jax.lax.scan(body, x, k)[0], jnp.eye(4), jax.random.split(X_KEY, 3))
    expected = {"sort": 3, "random_bits": 3, "fft (complex)": 3, "cholesky": 3}
    assert expected.items() <= cost.not_counted.items()
    assert "reshape" not in cost.not_counted
    assert cost.data_movement["real"] == 3


X_KEY = jax.random.key(0)


def test_costs_add_and_multiply():
    cost = count(jnp.matmul, X, W)
    twice = cost + cost
    assert twice == cost * 2 == 2 * cost
    assert twice.macs == 240
    assert (cost * 0).flops == 0


# XLA, where there is no loop ----------------------------------------------------------------------


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID")(x))
        x = nn.tanh(nn.Dense(16)(x.reshape(len(x), -1)))
        return jax.nn.log_softmax(nn.Dense(4)(x))


def piece(name):
    """(function, args) of a program without loops and conversions."""
    net, x = Classifier(), normal(5, 15, 15, 3)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    params = jax.tree.map(lambda w: jnp.ones(w.shape), shapes)
    g = normal(5, 4)  # an argument: XLA simplifies arithmetic with constants

    def gradients(params, x, g):
        return jax.vjp(net.apply, params, x)[1](g)

    def gradient(params, x, g):
        return gradients(params, x, g)[0]

    def attention(q, k, v):
        return jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k), axis=-1) @ v

    qkv = (normal(2, 6, 4), normal(2, 7, 4), normal(2, 7, 3))
    return {
        "forward": (net.apply, (params, x)),
        "gradient": (gradient, (params, x, g)),
        "all gradients": (gradients, (params, x, g)),
        "two networks": (
            jax.vmap(gradient, in_axes=(0, None, None)),
            (jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params), x, g),
        ),
        "attention": (attention, qkv),
        "attention's gradients": (
            lambda g, *qkv: jax.vjp(attention, *qkv)[1](g),
            (normal(2, 6, 3), *qkv),
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["forward", "gradient", "all gradients", "two networks", "attention", "attention's gradients"],
)
def test_equal_to_xla_without_loops(name):
    function, args = piece(name)
    cost = count(function, *args)
    xla = jax.jit(function).lower(*args).cost_analysis()  # of the program before fusion
    assert cost.flops - cost.by_kind["transcendental"] == xla["flops"]
    assert cost.by_kind["transcendental"] == xla["transcendentals"]
    assert cost.warnings == ()


# whole training runs ------------------------------------------------------------------------------


def macs_of(*sizes):
    """MACs of one observation through dense layers of these sizes, and of the first of them."""
    return sum(a * b for a, b in itertools.pairwise(sizes)), sizes[0] * sizes[1]


def ppo_run(env_id, obs, outputs):
    """(train, expected MACs): a rollout, two value passes, and the epochs.

    A gradient step costs 3 forward passes a sample (itself, gradients of weights and of inputs)
    less the first layer's input gradient, which nobody needs. Values are computed from the finished
    rollout, V(obs) and V(final obs), so that the critic's part of acting is 2 passes a step.
    """
    config = ppo.Config(
        total_steps=3 * 8 * 16,
        num_envs=8,
        num_steps=16,
        num_epochs=5,
        num_minibatches=4,
        hidden=(24, 12),
    )
    actor, actor_first = macs_of(obs, 24, 12, outputs)
    critic, critic_first = macs_of(obs, 24, 12, 1)
    steps = 3 * 8 * 16
    learning = 3 * (actor + critic) - actor_first - critic_first
    macs = steps * (actor + 2 * critic) + steps * 5 * learning
    return ppo.make_train(config, *gymnax.make(env_id)), macs


def dqn_run(double):
    """(train, expected MACs): acting, and in a gradient step the values that the target needs."""
    config = dqn.Config(
        total_steps=3 * 8 * 16,
        num_envs=8,
        num_steps=16,
        train_every=2,
        num_gradient_steps=3,
        batch_size=20,
        buffer_size=100,
        learning_starts=0,
        double=double,
        hidden=(24, 12),
    )
    q, first = macs_of(4, 24, 12, 2)
    learning = 3 * q - first + (2 if double else 1) * q  # and Q', with Q of the next observation
    macs = 3 * 8 * 16 * q + 3 * 8 * 3 * 20 * learning
    return dqn.make_train(config, *gymnax.make("CartPole-v1")), macs


def sac_run():
    """(train, expected MACs): acting, and in a gradient step three passes of policy and critics.

    The target: one of each. The critics' loss: 3 of the critics less the first layer's input
    gradient. The policy's loss: 3 of the policy less the same, and of the critics the values and
    the gradients of inputs down to the action: their weights are not differentiated.
    """
    config = sac.Config(
        total_steps=3 * 8 * 16,
        num_envs=8,
        num_steps=16,
        train_every=2,
        num_gradient_steps=3,
        batch_size=20,
        buffer_size=100,
        learning_starts=0,
        hidden=(24, 12),
    )
    actor, actor_first = macs_of(3, 24, 12, 2)  # mean and deviation of one action
    critic, critic_first = macs_of(3 + 1, 24, 12, 1)
    target = actor + 2 * critic
    learning = 2 * (3 * critic - critic_first) + (3 * actor - actor_first) + 2 * 2 * critic
    weighing = 2  # the critics' loss by the batch's weights, and its gradient
    macs = 3 * 8 * 16 * actor + 3 * 8 * 3 * 20 * (target + learning + weighing)
    return sac.make_train(config, *gymnax.make("Pendulum-v1")), macs


RUNS = {
    "ppo, discrete": lambda: ppo_run("CartPole-v1", 4, 2),
    "ppo, real": lambda: ppo_run("Pendulum-v1", 3, 1),
    "dqn": lambda: dqn_run(double=False),
    "dqn, double": lambda: dqn_run(double=True),
    "sac": sac_run,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_run_equals_its_closed_form(name):
    train, macs = RUNS[name]()
    cost = count(train, jax.random.key(0))
    assert cost.macs == macs
    assert cost.warnings == ()
    assert cost.flops > 2 * macs  # activations, losses, Adam, the environment
    xla = jax.jit(train).lower(jax.random.key(0)).cost_analysis()
    assert xla["flops"] < macs / 3  # what XLA says of a program with loops


def test_chunks_of_a_run_add_up():
    train, _ = RUNS["ppo, discrete"]()
    state = jax.eval_shape(train.init, jax.random.key(0))
    parts = count(train.init, jax.random.key(0)) + train.num_updates * count(train.update, state)
    whole = count(train, jax.random.key(0))
    assert parts.macs == whole.macs
    # the metrics of every update are outputs of both; nothing else differs
    assert parts.flops == pytest.approx(whole.flops, rel=1e-3)
