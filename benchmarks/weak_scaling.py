"""Weak scaling, simulated: 1, 2, 4 processes of one run on this machine, each with the same work.

    python -m benchmarks.weak_scaling

Every process is `python -m train.ppo` with a CPU core of its own as long as there are enough, on
loopback (gloo). Spread over the processes are, in turn, seeds, which never talk to each other, and
the environments of one seed, whose gradients are summed after every minibatch. Time is that of the
training loop, compiling and evaluation left out; of several repeats the fastest. With more
processes than cores the ideal is the speed of that many cores: what is missing then is the cost of
the processes, not of a network, of which loopback tells nothing.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    processes: tuple[int, ...] = (1, 2, 4)
    """How many processes, in turn; 1 must be the first."""
    env: str = "CartPole-v1"
    """Environment, at the settings of its preset for PPO."""
    num_envs: int = 64
    """Environments of a process."""
    num_steps: int = 128
    """Steps of each environment between two updates."""
    num_updates: int = 150
    """Updates of every run."""
    repeats: int = 1
    """Runs of each kind, in alternation; the fastest counts."""
    json: Path | None = ROOT / "benchmarks" / "results" / "weak_scaling.json"
    """Where the results go."""


def main(options: Options) -> int:
    """Measure, print the table, write the results; return the exit code."""
    if options.processes[:1] != (1,) or any(n < 1 for n in options.processes):
        print("error: processes must begin with 1: the others are compared with it")
        return 2
    cores = sorted(os.sched_getaffinity(0))
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for spread in ("seeds", "environments"):
                for n in options.processes:
                    place = Path(folder) / f"{spread}-{n}-{repeat}"
                    summary = measure(options, spread, n, place, cores)
                    runs.setdefault((spread, n), []).append(summary)
                    print(f"{spread}, {n}: {summary['steps_per_s']:,.0f} steps/s", flush=True)
    rows = []
    for (spread, n), summaries in runs.items():
        best = max(summaries, key=lambda s: s["steps_per_s"])
        alone = max(s["steps_per_s"] for s in runs[spread, 1])
        rows.append(
            {
                "spread": spread,
                "processes": n,
                "env_steps": best["env_steps_total"],
                "run_s": best["run_s"],
                "steps_per_s": best["steps_per_s"],
                "speedup": best["steps_per_s"] / alone,
                "efficiency": best["steps_per_s"] / alone / min(n, len(cores)),
            }
        )
    print(table(rows, len(cores)))
    if options.json is not None:
        settings = {k: v for k, v in dataclasses.asdict(options).items() if k != "json"}
        one = runs["seeds", 1][0]
        machine = {k: one[k] for k in ("jax", "jaxrl", "python", "platform", "backend")}
        result = {"machine": machine, "cores": len(cores), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(
    options: Options, spread: str, num_processes: int, folder: Path, cores: list[int]
) -> dict[str, Any]:
    """Train with so many processes; return the summary of the run.

    Raises:
        RuntimeError: a process failed; with what it said.
    """
    over_seeds = spread == "seeds"
    num_envs = options.num_envs * (1 if over_seeds else num_processes)
    argv = {
        "env": options.env,
        "num-seeds": num_processes if over_seeds else 1,
        "seed-devices": num_processes if over_seeds else 1,
        "env-devices": 1 if over_seeds else num_processes,
        "num-envs": num_envs,
        "num-steps": options.num_steps,
        "total-steps": num_envs * options.num_steps * options.num_updates,
        "eval-every": 0,
        "eval-episodes": 1,
        "runs-dir": folder,
        "name": "run",
    }
    command = [sys.executable, "-m", "train.ppo", "--no-progress", "--no-animate"]
    command += [x for name, value in argv.items() for x in (f"--{name}", str(value))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i in range(num_processes):
        more = ["--coordinator", coordinator, "--num-processes", str(num_processes)]
        more += ["--process-id", str(i)]
        processes.append(
            subprocess.Popen(
                [*command, *(more if num_processes > 1 else [])],
                cwd=ROOT,
                env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
                preexec_fn=pin(cores[i % len(cores)]),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return json.loads((folder / "run" / "summary.json").read_text())


def pin(core: int) -> Callable[[], None]:
    """Return what gives a new process one core."""
    return lambda: os.sched_setaffinity(0, {core})


def table(rows: list[dict[str, Any]], num_cores: int) -> str:
    """The results as Markdown."""
    lines = [
        f"| spread over processes | processes | steps/s | speedup | of {num_cores} cores at best |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['spread']} | {row['processes']} | {row['steps_per_s']:,.0f} "
            f"| {row['speedup']:.2f} | {100 * row['efficiency']:.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
