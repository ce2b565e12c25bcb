"""Exact optimal Q of the Mars rover on a grid of discounts and misstep probabilities, in one call.

    python -m benchmarks.planning_grid --json benchmarks/results/planning_grid.json

Each point of the grid is a decision process of its own. Compiling is timed apart; the median of
several runs is given. The two solvers are compared with each other: neither knows the other.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl import planning
from jaxrl.envs import MarsRover
from train._run import machine

SOLVERS = {
    "policy iteration": planning.policy_iteration,
    "value iteration": planning.value_iteration,
}


@dataclass
class Options:
    """Command line."""

    size: int = 100
    """Discounts, and misstep probabilities: the grid has size * size points."""
    length: int = 6
    """States of the rover's line."""
    largest_gamma: float = 0.999
    """Discounts lie evenly between 0 and this."""
    num_repeats: int = 7
    """Runs of which the median is given."""
    json: Path | None = None
    """Where to write the numbers."""


def make_sweep(rover: MarsRover, solve: Any):
    """Return sweep(gammas (G,), missteps (M,)) -> planning.Solution, leading axes (G, M)."""
    params = rover.default_params

    def one(gamma: jax.Array, misstep_prob: jax.Array) -> planning.Solution:
        return solve(*rover.mdp(replace(params, misstep_prob=misstep_prob)), gamma)

    return jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None)))


def main(options: Options) -> list[dict[str, Any]]:
    """Measure, print a Markdown table, write JSON if asked."""
    rover = MarsRover(length=options.length, start="uniform")
    gammas = jnp.linspace(0.0, options.largest_gamma, options.size)
    missteps = jnp.linspace(0.0, 1.0, options.size)
    rows, tables = [], []
    print("| solver | seconds (median) | slowest | compile [s] | iterations, most |")
    print("|---|---|---|---|---|")
    for name, solve in SOLVERS.items():
        start = time.perf_counter()
        sweep = make_sweep(rover, solve).lower(gammas, missteps).compile()
        compile_seconds = time.perf_counter() - start
        seconds = []
        solution = sweep(gammas, missteps)
        for _ in range(options.num_repeats):
            start = time.perf_counter()
            solution = jax.block_until_ready(sweep(gammas, missteps))
            seconds.append(time.perf_counter() - start)
        tables.append(np.asarray(solution.q))
        row = {
            "solver": name,
            "seconds": round(float(np.median(seconds)), 4),
            "slowest": round(max(seconds), 4),
            "compile_seconds": round(compile_seconds, 2),
            "iterations": int(solution.num_iterations.max()),
        }
        rows.append(row)
        print(
            f"| {name} | {row['seconds']} | {row['slowest']} | {row['compile_seconds']} |"
            f" {row['iterations']} |",
            flush=True,
        )
    apart = float(np.abs(tables[0] - tables[1]).max())
    print(f"\n{options.size**2:,} problems of {options.length} states; largest difference of Q")
    print(f"between the solvers: {apart:.1e}")
    if options.json:
        result = {
            "machine": machine(),
            "size": options.size,
            "length": options.length,
            "largest_gamma": options.largest_gamma,
            "largest_difference": apart,
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
