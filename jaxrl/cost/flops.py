"""Exact multiply-accumulates and FLOPs of any JAX function, by walking its jaxpr.

    cost = count(train, jax.random.key(0))
    cost.flops, cost.macs, cost.by_kind, cost.layers, cost.not_counted, cost.warnings

The compiler's own figure, `compiled.cost_analysis()["flops"]`, counts the body of a loop once: of a
scan over 1000 steps it reports one. Here a `scan` counts its body times its length, `cond` its
dearest branch, a `while_loop`, whose length no program tells, as often as the caller says (once,
with a warning in the result, if he does not). What no output needs is not counted.

Conventions, in a program without loops those of XLA's own analysis:

- One multiply-accumulate (MAC) is two FLOPs. A product of matrices (b, m, k) x (b, k, n) has
  b m k n MACs; a convolution one for each output value, input channel of its group, and tap that
  falls on an input value. Taps on padding and on the zeros of a dilation are left out of `macs`
  and kept in `nominal_macs`, which of a strided layer's input gradient is several times too large.
- Elementwise operations (comparisons and selections too) and transcendental functions count one
  for each value of the result, a reduction of n values to m counts n - m.
- Only floating point is a FLOP. Integer and boolean arithmetic is counted apart, as `int_ops`;
  moving and converting data is nothing (`data_movement` names it). What is neither is listed by
  name in `not_counted`: sorting, factorisations, random bits, transforms, calls to the host.
- The program is counted as written: of what the compiler merges or moves out of a loop it knows
  nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxrl.checks import check_count
from jaxrl.cost._loops import inner_jaxpr, is_var, measure

KINDS = ("dot", "convolution", "elementwise", "transcendental", "reduction")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _names(
    "add add_any sub mul div rem max min neg abs sign floor ceil round clamp select_n square "
    "eq ne lt le gt ge eq_to lt_to le_to is_finite nextafter and or xor not shift_left "
    "shift_right_logical shift_right_arithmetic population_count clz mulhi"
)
_TRANSCENDENTAL = _names(
    "exp exp2 expm1 log log1p sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh "
    "sqrt rsqrt cbrt pow logistic erf erfc erf_inv lgamma digamma polygamma igamma igammac "
    "igamma_grad_a bessel_i0e bessel_i1e regularized_incomplete_beta zeta"
)
_REDUCTION = _names(
    "reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor argmax argmin"
)
_CUMULATIVE = _names("cumsum cumprod cummax cummin")
_WINDOWED = _names("reduce_window_sum reduce_window_max reduce_window_min")
_SCATTER = _names("scatter-add scatter-sub scatter-mul scatter-min scatter-max")
_DATA_MOVEMENT = _names(
    "reshape broadcast_in_dim transpose squeeze expand_dims slice dynamic_slice "
    "dynamic_update_slice gather scatter concatenate split pad rev iota copy copy_p tile empty "
    "empty2 convert_element_type bitcast_convert_type reduce_precision real imag complex "
    "stop_gradient device_put sharding_constraint mesh_cast reshard optimization_barrier name "
    "random_wrap random_unwrap random_clone create_token after_all axis_index pvary pcast "
    "layout_constraint platform_index stack unstack"
)


@dataclass(frozen=True)
class Layer:
    """A dense layer or convolution as the paper on alpha-FLOPs measures it: S, Cin, Cout, K.

    All in terms of the *forward* layer: its two gradients have the same S, Cin, Cout and K.
    """

    kind: str  # "dot" or "convolution"
    stage: str  # "forward", "input gradient" or "weight gradient"
    S: int  # positions of the output map times batch; of a dense layer its rows
    Cin: int  # input channels that one output value sees (of its group)
    Cout: int
    K1: int  # kernel height; 1 for a dense layer
    K2: int  # all other sides of the kernel, multiplied
    macs: int  # of one execution, without taps on padding or dilation
    nominal_macs: int  # with them, as a loop over all taps would do it
    name: str = ""  # where it is, from the modules and `jax.named_scope`s around it

    @property
    def forward_macs(self) -> int:
        """S Cin Cout K1 K2: the paper's count, that of the forward layer for its gradients too."""
        return self.S * self.Cin * self.Cout * self.K1 * self.K2


@dataclass(frozen=True)
class Cost:
    """What one call of a function costs; all numbers are exact Python integers."""

    by_kind: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """FLOPs of each kind: dot, convolution, elementwise, transcendental, reduction."""
    macs: int = 0
    """Multiply-accumulates of dots and convolutions: half of their FLOPs."""
    nominal_macs: int = 0
    """The same with every tap of every convolution, on padding and dilation too."""
    int_ops: int = 0
    """Integer and boolean operations: no FLOPs."""
    loop_steps: int = 0
    """Iterations of all loops, inner ones as often as they run: steps that wait for each other."""
    layers: dict[Layer, int] = field(default_factory=dict)
    """How often each dense layer and convolution is executed."""
    data_movement: dict[str, int] = field(default_factory=dict)
    """Operations without arithmetic, by name: executions."""
    not_counted: dict[str, int] = field(default_factory=dict)
    """Operations whose arithmetic is not counted, by name: executions."""
    warnings: tuple[str, ...] = ()
    """What makes the count uncertain."""

    @property
    def flops(self) -> int:
        """All floating point operations."""
        return sum(self.by_kind.values())

    @property
    def layer_flops(self) -> int:
        """FLOPs of dense layers and convolutions alone: 2 `macs`."""
        return 2 * self.macs

    def __add__(self, other: "Cost") -> "Cost":
        """Return the cost of doing both."""
        return _sum([(self, 1), (other, 1)])

    def __mul__(self, times: int) -> "Cost":
        """Return the cost of doing it `times` times."""
        return _sum([(self, times)])

    __rmul__ = __mul__


def count(
    function: Callable[..., Any], *args: Any, while_steps: int | Mapping[str, int] | None = None
) -> Cost:
    """Count what `function(*args)` computes, without running it; see `count_measured` too.

    Args:
        function: any function that `jax.make_jaxpr` can trace.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`s; what is static belongs into a
            `functools.partial` or a closure.
        while_steps: executions of the body of every `while_loop`, or those of the loops whose name
            (`jax.named_scope`) contains a key. A loop without a hint is counted once, and the
            result has a warning.

    Raises:
        ValueError: a hint is no count.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args), while_steps=while_steps)


def count_jaxpr(
    closed_jaxpr: ClosedJaxpr, *, while_steps: int | Mapping[str, int] | None = None
) -> Cost:
    """Count what a jaxpr computes for all of its outputs; see `count`."""
    hints = while_steps if isinstance(while_steps, Mapping) else {"": while_steps}
    for value in hints.values():
        if value is not None:
            check_count("while_steps", value, minimum=0)
    walker = _Walker({k: v for k, v in hints.items() if v is not None})
    jaxpr = closed_jaxpr.jaxpr
    return walker.walk(jaxpr, (True,) * len(jaxpr.outvars), "")[0]


def count_measured(function: Callable[..., Any], *args: Any) -> Cost:
    """Count `function(*args)`, every `while_loop` as long as it is in this one call.

    The function is compiled, with a counter in each loop, and run once. The result has a warning:
    with other arguments the loops may be longer or shorter. Numbers are rounded to whole ones, as
    a loop that runs several times has a mean length.

    Args:
        function: a function that `jax.jit` takes.
        args: its arguments; arrays, no shapes.

    Raises:
        ValueError: there is a loop beside a `shard_map`.
    """
    closed_jaxpr = jax.make_jaxpr(function)(*args)
    walker = _Walker({}, measure(closed_jaxpr, jax.tree.leaves(args)))
    jaxpr = closed_jaxpr.jaxpr
    cost = walker.walk(jaxpr, (True,) * len(jaxpr.outvars), "")[0]
    warnings = cost.warnings
    if walker.seen:
        warnings += (f"{len(walker.seen)} while loop(s) counted as long as they were in one call",)

    def whole(counts: dict[Any, Any]) -> dict[Any, int]:
        return {name: round(n) for name, n in counts.items()}

    return Cost(
        whole(cost.by_kind),
        round(cost.macs),
        round(cost.nominal_macs),
        round(cost.int_ops),
        round(cost.loop_steps),
        whole(cost.layers),
        whole(cost.data_movement),
        whole(cost.not_counted),
        warnings,
    )


def _sum(parts: Sequence[tuple[Cost, Any]]) -> Cost:
    """Add up costs, each times a number."""
    kinds, layers, moves, other = Counter(), Counter(), Counter(), Counter()
    macs = nominal = int_ops = loop_steps = 0
    warnings: dict[str, None] = {}  # in order, each once
    for cost, times in parts:
        if times == 0:
            continue
        macs += times * cost.macs
        nominal += times * cost.nominal_macs
        int_ops += times * cost.int_ops
        loop_steps += times * cost.loop_steps
        for total, part in (
            (kinds, cost.by_kind),
            (layers, cost.layers),
            (moves, cost.data_movement),
            (other, cost.not_counted),
        ):
            for name, n in part.items():
                total[name] += times * n
        warnings.update(dict.fromkeys(cost.warnings))
    return Cost(
        {kind: kinds[kind] for kind in KINDS},
        macs,
        nominal,
        int_ops,
        loop_steps,
        dict(layers),
        dict(moves),
        dict(other),
        tuple(warnings),
    )


Live = tuple[bool, ...]


class _Walker:
    """Walks a jaxpr from its results back: what is live is counted, what is dead is not."""

    def __init__(self, hints: Mapping[str, int], measured: Mapping[int, Fraction] | None = None):
        self.hints = hints
        self.measured = measured or {}  # id of an equation -> mean length of that loop
        self.seen: set[int] = set()  # while loops that live
        # the jaxpr is kept beside its result: an id is unique only among living objects
        self.known: dict[tuple[int, Live, str], tuple[Jaxpr, tuple[Cost, Live]]] = {}

    def walk(self, jaxpr: Jaxpr | ClosedJaxpr, live_out: Live, path: str) -> tuple[Cost, Live]:
        """Return the cost of the wanted outputs, and which inputs they need."""
        body: Jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
        key = (id(body), live_out, path)
        if key not in self.known:
            self.known[key] = body, self._walk(body, live_out, path)
        return self.known[key][1]

    def _walk(self, jaxpr: Jaxpr, live_out: Live, path: str) -> tuple[Cost, Live]:
        live = {v for v, on in zip(jaxpr.outvars, live_out, strict=True) if on and is_var(v)}
        parts = []
        for eqn in reversed(jaxpr.eqns):
            wanted = tuple(v in live for v in eqn.outvars)
            if not any(wanted) and not eqn.effects:
                continue
            cost, needs = self.equation(eqn, wanted, _join(path, eqn))
            parts.append((cost, 1))
            live.update(v for v, on in zip(eqn.invars, needs, strict=True) if on and is_var(v))
        return _sum(parts[::-1]), tuple(v in live for v in jaxpr.invars)

    def equation(self, eqn: JaxprEqn, wanted: Live, path: str) -> tuple[Cost, Live]:
        """Return the cost of one equation, and which of its operands are needed."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.scan(eqn, wanted, path)
        if name == "while":
            return self.while_loop(eqn, wanted, path)
        if name == "cond":
            options = [self.walk(branch, wanted, path) for branch in params["branches"]]
            dearest = max(options, key=lambda option: (option[0].flops, option[0].int_ops))[0]
            # the dearest is counted, the doubts of all are kept
            warnings = tuple(dict.fromkeys(w for cost, _ in options for w in cost.warnings))
            needs = tuple(any(each) for each in zip(*(live for _, live in options), strict=True))
            return _sum([(dearest, 1), (Cost(warnings=warnings), 1)]), (True, *needs)
        inner = inner_jaxpr(eqn)
        if inner is not None:
            cost, needs = self.walk(inner, wanted, path)
            times = params["mesh"].size if name == "shard_map" else 1  # the body is one device's
            return cost * times, needs
        return _count_equation(eqn, path), (True,) * len(eqn.invars)

    def scan(self, eqn: JaxprEqn, wanted: Live, path: str) -> tuple[Cost, Live]:
        """Body times length; a carried value lives if an output or the next step needs it."""
        body = eqn.params["jaxpr"]
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        carry, ys = wanted[:num_carry], wanted[num_carry:]
        while True:
            cost, needs = self.walk(body, carry + ys, path)
            grown = _either(carry, needs[num_consts : num_consts + num_carry])
            if grown == carry:
                length = eqn.params["length"]
                return _sum([(cost, length), (Cost(loop_steps=1), length)]), needs
            carry = grown

    def while_loop(self, eqn: JaxprEqn, wanted: Live, path: str) -> tuple[Cost, Live]:
        """Body and condition as often as hinted, or once with a warning."""
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond_cost, cond_needs = self.walk(params["cond_jaxpr"], (True,), path)
        carry = _either(wanted, cond_needs[n_cond:])
        while True:
            body_cost, body_needs = self.walk(params["body_jaxpr"], carry, path)
            grown = _either(carry, body_needs[n_body:])
            if grown == carry:
                break
            carry = grown
        hint = next((n for key, n in self.hints.items() if key in path), None)
        steps = self.measured.get(id(eqn), hint)
        self.seen.add(id(eqn))
        if steps is None:
            name = _place(path)[0]
            place = f"in {name}" if name else "without a name"
            doubt = Cost(
                warnings=(
                    f"a while loop ({place}, {len(eqn.outvars)} carried values) is counted once: "
                    "its length is known only when it runs; give while_steps",
                )
            )
            cost = _sum([(body_cost, 1), (cond_cost, 1), (doubt, 1), (Cost(loop_steps=1), 1)])
        else:
            step = Cost(loop_steps=1)
            cost = _sum([(body_cost, steps), (cond_cost, steps + 1), (step, steps)])
        return cost, cond_needs[:n_cond] + body_needs[:n_body] + carry


def _either(a: Live, b: Live) -> Live:
    return tuple(x or y for x, y in zip(a, b, strict=True))


def _join(path: str, eqn: JaxprEqn) -> str:
    """The names around an equation, those around the program that it stands in first."""
    name = str(getattr(eqn.source_info, "name_stack", ""))
    return f"{path}/{name}" if path and name else path or name


def _count_equation(eqn: JaxprEqn, path: str) -> Cost:
    """The cost of an equation without a program inside."""
    name = eqn.primitive.name
    out: Any = eqn.outvars[0].aval if eqn.outvars else None
    operands: list[Any] = [v.aval for v in eqn.invars]
    if name in _DATA_MOVEMENT:
        return Cost(data_movement={name: 1})
    if any(jnp.issubdtype(_dtype(x), jnp.complexfloating) for x in [*operands, out]):
        return Cost(not_counted={f"{name} (complex)": 1})
    if name == "dot_general":
        return _layer_cost(_dot(eqn, path), out)
    if name == "conv_general_dilated":
        return _layer_cost(_convolution(eqn, path), out)
    if name in _ELEMENTWISE:
        # the cases of a selection, not its condition; a comparison's operands, not its result
        return _arithmetic("elementwise", _size(out), operands[-1])
    if name == "integer_pow":
        return _arithmetic("elementwise", _size(out) * _multiplications(eqn.params["y"]), out)
    if name in _TRANSCENDENTAL:
        return _arithmetic("transcendental", _size(out), out)
    if name in _REDUCTION:
        return _arithmetic("reduction", _size(operands[0]) - _size(out), operands[0])
    if name in _CUMULATIVE:
        length = operands[0].shape[eqn.params["axis"]]
        return _arithmetic("reduction", _size(out) - _size(out) // max(length, 1), out)
    if name in _WINDOWED:
        window = math.prod(eqn.params["window_dimensions"])
        return _arithmetic("reduction", _size(out) * (window - 1), out)
    if name in _SCATTER:
        return _arithmetic("elementwise", _size(operands[-1]), operands[-1])
    return Cost(not_counted={name: 1})


def _dtype(aval: Any) -> Any:
    return getattr(aval, "dtype", jnp.int32)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _size(aval: Any) -> int:
    return math.prod(aval.shape)


def _arithmetic(kind: str, operations: int, aval: Any) -> Cost:
    """Operations of one kind if `aval` is real, else integer ones."""
    if jnp.issubdtype(_dtype(aval), jnp.floating):
        return Cost({**dict.fromkeys(KINDS, 0), kind: operations})
    return Cost(int_ops=operations)


def _multiplications(exponent: int) -> int:
    """Of x ** exponent by repeated squaring, and one division where it is negative."""
    n = abs(exponent)
    if n == 0:
        return 0
    return n.bit_length() - 1 + n.bit_count() - 1 + (exponent < 0)


def _layer_cost(layers: tuple[Layer, int], out: Any) -> Cost:
    """The cost of so many executions of a layer."""
    layer, times = layers
    macs, nominal = times * layer.macs, times * layer.nominal_macs
    if not jnp.issubdtype(_dtype(out), jnp.floating):
        return Cost(int_ops=2 * macs)
    by_kind = {**dict.fromkeys(KINDS, 0), layer.kind: 2 * macs}
    return Cost(by_kind, macs, nominal, layers={layer: times} if times else {})


def _place(path: str) -> tuple[str, bool]:
    """The name of a layer without the transformations around it; whether it is a gradient's."""
    return re.sub(r"\w+\(|\)", "", path), "transpose(" in path


def _dot(eqn: JaxprEqn, path: str) -> tuple[Layer, int]:
    """Read a product of matrices as dense layers, one for each element of its batch axes.

    Forward, x @ W: the rows of x are the positions. The gradients that JAX makes of it are
    recognised by their axes: g W^T contracts the last axis of both, x^T g the leading ones (rows).
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = (_shape(v) for v in eqn.invars)
    batch = math.prod(lhs[i] for i in lhs_batch)
    k = math.prod(lhs[i] for i in lhs_contract)
    m = math.prod(n for i, n in enumerate(lhs) if i not in (*lhs_contract, *lhs_batch))
    n = math.prod(n for i, n in enumerate(rhs) if i not in (*rhs_contract, *rhs_batch))
    name, is_gradient = _place(path)
    if not is_gradient:
        stage, s, c_in, c_out = "forward", m, k, n
    elif len(lhs) - 1 in lhs_contract or len(rhs) - 1 in rhs_contract:
        stage, s, c_in, c_out = "input gradient", m, n, k
    else:
        stage, s, c_in, c_out = "weight gradient", k, n, m
    return Layer("dot", stage, s, c_in, c_out, 1, 1, m * k * n, m * k * n, name), batch


def _convolution(eqn: JaxprEqn, path: str) -> tuple[Layer, int]:
    """Read a convolution as a layer of the paper; its gradients are convolutions as well.

    JAX writes the weight gradient with the roles of batch and channel exchanged: the kernel is the
    forward layer's output map, the output its kernel. The input gradient's own input is the forward
    output map, dilated by the stride.
    """
    params = eqn.params
    dims = params["dimension_numbers"]
    lhs, rhs = (_shape(v) for v in eqn.invars)
    out = _shape(eqn.outvars[0])
    in_map = [lhs[i] for i in dims.lhs_spec[2:]]
    kernel = [rhs[i] for i in dims.rhs_spec[2:]]
    out_map = [out[i] for i in dims.out_spec[2:]]
    taps = [
        _taps(*sizes)
        for sizes in zip(
            in_map,
            kernel,
            out_map,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ]
    batch, c_out, c_in = out[dims.out_spec[0]], out[dims.out_spec[1]], rhs[dims.rhs_spec[1]]
    pairs = batch * c_out * c_in  # of values that every tap multiplies
    macs = pairs * math.prod(taps)
    computed = pairs * math.prod(out_map) * math.prod(kernel)

    name, is_gradient = _place(path)
    stage, s, k = "forward", batch * math.prod(out_map), kernel
    if is_gradient and dims.lhs_spec[1] < dims.lhs_spec[0]:
        # rhs is the forward output's gradient: (batch, map, Cout); out is the kernel
        stage, k = "weight gradient", out_map
        s, c_in = rhs[dims.rhs_spec[1]] * math.prod(kernel), batch
    elif is_gradient:
        stage, s = "input gradient", batch * math.prod(in_map)
        groups = params["feature_group_count"]
        c_in, c_out = c_out // groups, c_in * groups
    k1, k2 = (k[0], math.prod(k[1:])) if k else (1, 1)
    return Layer("convolution", stage, s, c_in, c_out, k1, k2, macs, computed, name), 1


def _taps(
    size: int,
    kernel: int,
    out: int,
    stride: int,
    padding: tuple[int, int],
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """Pairs (output position, tap) of one axis that meet an input value, not padding or a gap."""
    last = (size - 1) * lhs_dilation
    total = 0
    for tap in range(kernel):
        first = tap * rhs_dilation - padding[0]
        for o in range(out):
            where = first + o * stride
            total += 0 <= where <= last and where % lhs_dilation == 0
    return total
