"""How often the while loops of a jaxpr go round: an interpreter that counts (see `flops`)."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# each is one call of one inner program with the same arguments and results
CALLS = frozenset(
    (
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "custom_vmap_call",
        "custom_lin",
        "shard_map",
    )
)

Loops = dict[int, tuple[Any, Any]]  # id of an equation -> (times it ran, iterations), int32 arrays


def measure(closed_jaxpr: ClosedJaxpr, args: Sequence[Any]) -> dict[int, Fraction]:
    """Run a jaxpr; the mean length of each of its while loops, by the id of its equation."""
    if not _while_loops(closed_jaxpr.jaxpr):
        return {}
    run = jax.jit(lambda *args: _evaluate(closed_jaxpr.jaxpr, closed_jaxpr.consts, args)[1])
    loops = jax.device_get(run(*args))
    return {
        key: Fraction(int(n), int(times)) if times else Fraction(0)
        for key, (times, n) in loops.items()
    }


def _while_loops(jaxpr: Jaxpr) -> list[int]:
    """The ids of all while equations of a jaxpr, those inside of others too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            found.append(id(eqn))
        for inner in _inner_jaxprs(eqn):
            found += _while_loops(_open(inner))
    return list(dict.fromkeys(found))


def _inner_jaxprs(eqn: JaxprEqn) -> list[Any]:
    """The programs that an equation runs and that `_evaluate` looks into."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return [params["jaxpr"]]
    if name == "while":
        return [params["cond_jaxpr"], params["body_jaxpr"]]
    if name == "cond":
        return list(params["branches"])
    inner = None if name == "shard_map" else inner_jaxpr(eqn)
    return [] if inner is None else [inner]


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], Loops]:
    """Evaluate a jaxpr and count the iterations of its while loops."""
    values: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )
    loops = _no_loops(jaxpr)

    def read(atom: Any) -> Any:
        return values[atom] if is_var(atom) else atom.val

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if _inner_jaxprs(eqn):
            outputs, inside = _run_inner(eqn, inputs)
            loops = _add_loops(loops, inside)
        elif eqn.primitive.name == "shard_map":
            raise ValueError("loops inside of a shard_map cannot be measured: give while_steps")
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars], loops


def _run_inner(eqn: JaxprEqn, inputs: list[Any]) -> tuple[Sequence[Any], Loops]:
    """Evaluate an equation with loops inside; counts of those that did not run are 0."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        body, n_consts, n_carry = params["jaxpr"], params["num_consts"], params["num_carry"]
        consts, carry = inputs[:n_consts], inputs[n_consts : n_consts + n_carry]

        def step(carry: Any, xs: Any) -> Any:
            values, loops = carry
            out, inside = _evaluate(body.jaxpr, body.consts, [*consts, *values, *xs])
            return (out[:n_carry], _add_loops(loops, inside)), out[n_carry:]

        (carry, loops), ys = jax.lax.scan(
            step,
            (carry, _no_loops(body.jaxpr)),
            inputs[n_consts + n_carry :],
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*carry, *ys], loops
    if name == "while":
        cond, body = params["cond_jaxpr"], params["body_jaxpr"]
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]

        def lanes(values: Any) -> Any:
            return _evaluate(cond.jaxpr, cond.consts, [*cond_consts, *values])[0][0]

        def iterate(state: Any) -> Any:
            values, loops, n = state
            out, inside = _evaluate(body.jaxpr, body.consts, [*body_consts, *values])
            on = lanes(values)
            if on.ndim:  # under vmap: leading axes are lanes, and those that have ended wait
                out = [
                    jax.lax.select(
                        jax.lax.broadcast_in_dim(on, new.shape, range(on.ndim)), new, old
                    )
                    for new, old in zip(out, values, strict=True)
                ]
            return out, _add_loops(loops, inside), n + 1

        start = list(inputs[n_cond + n_body :]), _no_loops(body.jaxpr), jnp.int32(0)
        values, loops, n = jax.lax.while_loop(lambda s: jnp.any(lanes(s[0])), iterate, start)
        return values, {**loops, id(eqn): (jnp.int32(1), n)}
    if name == "cond":
        branches = params["branches"]
        everything = {k: v for b in branches for k, v in _no_loops(b.jaxpr).items()}

        def branch(program: Any) -> Callable[..., Any]:
            def run(*operands: Any) -> Any:
                out, inside = _evaluate(program.jaxpr, program.consts, operands)
                return out, {**everything, **inside}

            return run

        return jax.lax.switch(inputs[0], [branch(b) for b in branches], *inputs[1:])
    inner = inner_jaxpr(eqn)
    consts = inner.consts if isinstance(inner, ClosedJaxpr) else []
    return _evaluate(_open(inner), consts, inputs)


def _open(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _no_loops(jaxpr: Jaxpr) -> Loops:
    return {key: (jnp.int32(0), jnp.int32(0)) for key in _while_loops(jaxpr)}


def _add_loops(a: Loops, b: Loops) -> Loops:
    return {**a, **{k: (a[k][0] + t, a[k][1] + n) if k in a else (t, n) for k, (t, n) in b.items()}}


def inner_jaxpr(eqn: JaxprEqn) -> Any:
    """The program that an equation calls once, or None."""
    if eqn.primitive.name not in CALLS:
        return None
    for value in eqn.params.values():
        if isinstance(value, Jaxpr | ClosedJaxpr):
            inner = _open(value)
            same = len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars)
            return value if same else None
    return None


def is_var(atom: Any) -> bool:
    """Whether an operand of a jaxpr is a variable, not a constant written in place."""
    return not isinstance(atom, Literal)
