"""What the evaluation while training costs: the run with it, at the default interval, and without.

    python -m benchmarks.eval_cost --json benchmarks/results/eval_cost.json

Both are the scripts' own programs at the preset's settings, run in alternation after compiling, and
evaluated at the same places. The ratio is of CPU seconds, of all threads, so that other work on the
machine counts little; medians over the repeats. Compiling the evaluation comes besides, once a run.
"""

import dataclasses
import importlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from train import _cli, _run


@dataclass(frozen=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...] = (
        *("ppo:MicroRacer-v0", "ppo:CartPole-v1", "dqn:CartPole-v1", "sac:Pendulum-v1"),
        *("q_learning:MarsRover-v0", "reinforce:MarsRover-v0"),
    )
    """agent:environment each, at the settings of the preset."""
    num_seeds: int = 4
    """Agents side by side; the scripts' default is 4."""
    repeats: int = 3
    """Runs of each kind, in alternation."""
    json: Path | None = None
    """Write the results there as well."""


def measure(case: str, options: Options) -> dict[str, Any]:
    """Time whole runs of one agent on one environment."""
    from train import _envs

    name, _, env_id = case.partition(":")
    agent = importlib.import_module(f"jaxrl.agents.{name}")
    argv = ["--env", env_id, "--num-seeds", str(options.num_seeds)]
    settings, config = _cli.parse(agent, argv)
    setup = _envs.make_env(env_id, **_cli.parse_pairs("env_kwargs", settings.env_kwargs))
    params = _envs.with_train_params(
        setup.params, _cli.parse_pairs("train_params", settings.train_params)
    )
    setup = dataclasses.replace(setup, params=params)
    train = agent.make_train(config, setup.env, params)
    run = _run.Run(agent, settings, config, setup, train, Path(), "")
    sizes = _run.chunk_sizes(train.num_updates)
    programs = _run.compile_run(run, sizes)
    shapes = jax.eval_shape(jax.vmap(train.init), _run.seed_keys(settings.seeds))
    began = time.process_time()
    _run.compile_curve(run, shapes)
    compile_cpu_s = time.process_time() - began
    timed = {with_it: [] for with_it in (True, False)}
    for _ in range(options.repeats):
        for with_it in timed:
            timed[with_it].append(time_run(run, programs, sizes, with_it))
    cpu, wall = ({k: [t[i] for t in v] for k, v in timed.items()} for i in (0, 1))
    evaluations = timed[True][0][2]
    without = statistics.median(cpu[False])
    ratios = [a / b for a, b in zip(cpu[True], cpu[False], strict=True)]
    return {
        "case": case,
        "env_steps_of_a_seed": train.total_steps,
        "evaluations": evaluations,
        "cpu_s_without": without,
        "cpu_s_with": statistics.median(cpu[True]),
        "cpu_ratio": statistics.median(ratios),
        "wall_ratio": statistics.median(wall[True]) / statistics.median(wall[False]),
        "compile_cpu_s": compile_cpu_s,
    }


def time_run(
    run: _run.Run, programs: _run.Programs, sizes: list[int], with_it: bool
) -> tuple[float, float, int]:
    """Run once, reading metrics a chunk late as the scripts do: CPU s, wall s, evaluations."""
    assert programs.init is not None
    assert programs.evaluate is not None
    state = jax.block_until_ready(programs.init(_run.seed_keys(run.options.seeds)))
    cpu, wall = time.process_time(), time.perf_counter()
    first, waiting, evaluations = 0, None, 0
    for size in sizes:
        state, metrics = programs.chunks[size](state)
        jax.device_get(waiting)
        waiting = [metrics]
        if with_it and _run.is_due(run, _run.eval_every(run), first, first + size):
            waiting.append(programs.evaluate(state))
            evaluations += 1
        first += size
    jax.device_get(waiting)
    jax.block_until_ready(state)
    return time.process_time() - cpu, time.perf_counter() - wall, evaluations


def main(options: Options) -> None:
    """Measure and print."""
    rows = []
    print(f"{'case':26} {'CPU s without':>13} {'with':>8} {'ratio':>6} {'wall':>6} {'compile':>8}")
    for case in options.cases:
        row = measure(case, options)
        rows.append(row)
        print(
            f"{case:26} {row['cpu_s_without']:13.1f} {row['cpu_s_with']:8.1f} "
            f"{row['cpu_ratio']:6.3f} {row['wall_ratio']:6.3f} {row['compile_cpu_s']:8.1f}",
            flush=True,
        )
    if options.json is not None:
        result = {"machine": _run.machine(), "repeats": options.repeats, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
