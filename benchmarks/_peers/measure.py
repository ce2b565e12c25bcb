"""What the measuring processes share. Standard library at the top: every peer's Python reads it."""

import importlib.metadata
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """Most memory that this process has had so far, in MB (of 10^6 bytes)."""
    try:  # of this program alone: getrusage remembers what the process was before exec
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {name: importlib.metadata.version(name) for name in packages}


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Call; return its value, the seconds, and the CPU seconds of all threads of the process."""
    start, start_cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, time.perf_counter() - start, time.process_time() - start_cpu


def train_jax(
    train: Callable[[Any], Any],
    score: Callable[[Any, Any], Any],
    make_key: Callable[[int], Any],
    num_seeds: int,
    num_runs: int,
    first_seed: int,
    build: Callable[[Any], Callable[[Any], Any]] | None = None,
    compiled_then: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compile a whole training run once, run it `num_runs` times, then evaluate each.

    Args:
        train: `train(key) -> what was trained`.
        score: `score(trained, key) -> ()` mean return of an evaluation, not timed.
        make_key: a key from an integer.
        num_seeds: agents trained side by side.
        num_runs: runs of the compiled program.
        first_seed: of the first run; the next are those after it.
        build: `build(keys) -> run`, what compiles the run of keys (num_seeds,), or of a single key,
            if not `jax.jit` of `train` under `jax.vmap`.
        compiled_then: called after compiling, and timed as part of it.

    Compiling is from the Python function to the executable: tracing, lowering, XLA. A run ends when
    all it returns is there. The memory is the process's, evaluation not yet compiled.
    """
    import jax
    import numpy as np

    def key(run: int) -> Any:
        root = make_key(first_seed + run)
        return root if num_seeds == 1 else jax.random.split(root, num_seeds)

    if num_seeds > 1:
        train, score = jax.vmap(train), jax.vmap(score)

    def compile_run() -> Callable[[Any], Any]:
        compiled = build(key(0)) if build else jax.jit(train).lower(key(0)).compile()
        compiled_then()
        return compiled

    compiled, compile_s, compile_cpu_s = timed(compile_run)
    run_s, run_cpu_s, trained = [], [], []
    for run in range(num_runs):
        keys = jax.block_until_ready(key(run))
        result, seconds, cpu = timed(lambda: jax.block_until_ready(compiled(keys)))  # noqa: B023
        run_s.append(seconds)
        run_cpu_s.append(cpu)
        trained.append(result)
    peak = peak_mb()
    score = jax.jit(score)
    returns = [np.ravel(score(trained[run], key(1000 + run))).tolist() for run in range(num_runs)]
    return {
        "compile_s": compile_s,
        "compile_cpu_s": compile_cpu_s,
        "run_s": run_s,
        "run_cpu_s": run_cpu_s,
        "returns": returns,
        "peak_mb": peak,
    }
