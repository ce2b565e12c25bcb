"""What the evaluation while training costs, at the default interval, beside the training itself.

    python -m benchmarks.eval_cost --json benchmarks/results/eval_cost.json

Whole runs of the scripts' own programs at the preset's settings: what an evaluation costs depends
on how long the policy of that moment keeps an episode going. Within a run the chunks of training
and the evaluations between them are timed apart, each waited for. The cost is in CPU seconds, of
all threads, so that other work on the machine counts little; the median over the repeats. Compiling
the evaluation comes besides, once a run.
"""

import dataclasses
import importlib
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import tyro

from train import _cli, _devices, _run


@dataclass(frozen=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...] = (
        *("q_learning:MarsRover-v0", "reinforce:MarsRover-v0", "ppo:CartPole-v1"),
        *("dqn:CartPole-v1", "sac:Pendulum-v1", "sac:MicroRacer-v0", "ppo:MicroRacer-v0"),
        *("ppo:LunarLander-v3", "ppo:LunarLanderContinuous-v3"),
    )
    """agent:environment each, at the settings of the preset."""
    num_seeds: int = 4
    """Agents side by side; the scripts' default is 4."""
    repeats: int = 3
    """Most runs of each case."""
    seconds: float = 60.0
    """Time of a case after which it is not repeated once more."""
    json: Path | None = None
    """Write the results there as well, after each case."""


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
    spread = _devices.spread(settings, train, getattr(config, "num_envs", 1))
    run = _run.Run(agent, settings, config, setup, spread, Path(), "")
    sizes = _run.chunk_sizes(train.num_updates)
    programs = _run.compile_run(run, sizes)
    shapes = spread.shapes(_run.seed_keys(settings.seeds))
    began = time.process_time()
    _run.compile_curve(run, shapes)
    compile_cpu_s = time.process_time() - began
    runs, began = [], time.perf_counter()
    while not runs or (
        len(runs) < options.repeats and time.perf_counter() - began < options.seconds
    ):
        runs.append(time_run(run, programs, sizes))
    middle = statistics.median(r.eval_cpu_s / r.train_cpu_s for r in runs)
    return {
        "case": case,
        "num_seeds": options.num_seeds,
        "env_steps_of_a_seed": train.total_steps,
        "evaluations": runs[0].evaluations,
        "repeats": len(runs),
        "train_cpu_s": statistics.median(r.train_cpu_s for r in runs),
        "eval_cpu_s": statistics.median(r.eval_cpu_s for r in runs),
        "cost_percent": 100.0 * middle,
        "wall_percent": 100.0 * statistics.median(r.eval_s / r.train_s for r in runs),
        "episode_steps": runs[0].episode_steps,
        "compile_cpu_s": compile_cpu_s,
    }


@dataclass
class Timed:
    """One run: CPU and wall-clock seconds of training and of the evaluations."""

    train_cpu_s: float = 0.0
    train_s: float = 0.0
    eval_cpu_s: float = 0.0
    eval_s: float = 0.0
    evaluations: int = 0
    episode_steps: list[float] = field(default_factory=list)  # mean length, of each evaluation


def time_run(run: _run.Run, programs: _run.Programs, sizes: list[int]) -> Timed:
    """Run once, evaluating where the scripts do."""
    assert programs.init is not None
    assert programs.evaluate is not None
    keys = run.spread.on_every_device(_run.seed_keys(run.options.seeds))
    state = jax.block_until_ready(programs.init(keys))
    timed, first = Timed(), 0
    for size in sizes:
        cpu, wall = time.process_time(), time.perf_counter()
        state, metrics = programs.chunks[size](state)
        jax.block_until_ready(state)
        jax.device_get(metrics)
        timed.train_cpu_s += time.process_time() - cpu
        timed.train_s += time.perf_counter() - wall
        if _run.is_due(run, _run.eval_every(run), first, first + size):
            cpu, wall = time.process_time(), time.perf_counter()
            rows = jax.device_get(programs.evaluate(state))
            timed.eval_cpu_s += time.process_time() - cpu
            timed.eval_s += time.perf_counter() - wall
            timed.evaluations += 1
            timed.episode_steps.append(float(rows["length"].mean()))
        first += size
    return timed


def main(options: Options) -> None:
    """Measure and print."""
    rows = []
    print(f"{'case':32} {'training':>9} {'evaluation':>10} {'cost':>6} {'wall':>6} {'compile':>8}")
    for case in options.cases:
        row = measure(case, options)
        rows.append(row)
        print(
            f"{case:32} {row['train_cpu_s']:8.1f}s {row['eval_cpu_s']:9.2f}s "
            f"{row['cost_percent']:5.1f}% {row['wall_percent']:5.1f}% {row['compile_cpu_s']:7.1f}s",
            flush=True,
        )
        if options.json is not None:
            result = {"machine": _run.machine(), "rows": rows}
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
