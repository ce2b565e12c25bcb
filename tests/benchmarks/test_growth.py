"""Bytes and kernels of programs by hand and beside XLA's own count; the knee of a known curve."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _hlo, growth


def compiled(function, *args, **kwargs):
    return jax.jit(function, **kwargs).lower(*args).compile()


def test_without_loops_the_bytes_are_xlas():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 32))
    program = compiled(lambda x, w: (jnp.tanh(x @ w).sum(0), x * 2 + 1), x, w)
    theirs = program.cost_analysis()["bytes accessed"]
    assert _hlo.count(program.as_text()).bytes == pytest.approx(theirs, rel=0.01)


def test_a_loop_counts_as_often_as_it_runs():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))

    def work(times):
        def body(x, _):
            return jnp.tanh(x @ w), None

        return _hlo.count(compiled(lambda x: jax.lax.scan(body, x, length=times)[0], x).as_text())

    three, hundred = work(3), work(100)
    # an iteration reads x and w and writes the product, reads that and writes its tanh
    least = 4 * (3 * x.size + w.size)
    assert (hundred.bytes - three.bytes) / 97 >= least
    assert (hundred.bytes - three.bytes) / 97 <= 2 * least
    assert (hundred.kernels - three.kernels) % 97 == 0
    assert 2 * 97 <= hundred.kernels - three.kernels <= 8 * 97
    assert hundred.unknown_loops == 0


def test_a_slice_moves_what_it_takes_and_an_update_what_it_writes():
    buffer, row = jnp.ones((10_000, 16)), jnp.ones((1, 16))
    taken = compiled(lambda b, i: b[i].sum(0), buffer, jnp.arange(32))
    assert _hlo.count(taken.as_text()).bytes <= 4 * (2 * 32 * 16 + 32 + 16)

    def write(buffer, i, row):
        return jax.lax.dynamic_update_slice(buffer, 2 * row, (i, 0))

    put = compiled(write, buffer, 3, row, donate_argnums=0)
    assert _hlo.count(put.as_text()).bytes <= 4 * (2 * 16 + 2)


def test_a_loop_of_unknown_length_is_told():
    program = compiled(lambda x: jax.lax.while_loop(lambda x: x < 10, lambda x: x * 2, x), 1.0)
    assert _hlo.count(program.as_text()).unknown_loops == 1
    with pytest.raises(ValueError, match="no ENTRY"):
        _hlo.count("nothing")


def test_the_knee_of_a_known_curve():
    sizes = [1.0, 4.0, 16.0, 64.0, 256.0]
    found = growth.knee(sizes, [8e-3 + 2e-3 * n for n in sizes])
    assert found["knee"] == pytest.approx(4.0)
    assert growth.knee(sizes, [5e-3] * 5)["knee"] is None  # nothing grows


def test_the_limit_is_the_larger_of_arithmetic_and_bytes():
    top = {"flops_per_s": 100.0, "cache_bytes_per_s": 10.0}
    row = {"seconds": 4.0, "flops": 100.0, "bytes": 20.0, "kernels": 5.0}
    found = growth.limits(row, top)  # 1 s of arithmetic, 2 s of bytes
    assert (found["bound"], found["part_of_limit"]) == ("bytes", 0.5)
    assert found["flops_per_s"] == 25.0
    assert growth.limits({**row, "flops": 300.0}, top)["bound"] == "arithmetic"
