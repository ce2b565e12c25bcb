"""Steps per second of LunarLander beside the originals: random actions, automatic resets.

    python -m benchmarks.lunar_lander_steps --json benchmarks/results/lunar_lander_steps.json

Gymnasium runs one environment and vectors of 8, in this process and in 8 others. envpool (C++
Box2D) is not among the dependencies, as it pulls large packages: it is installed into its own
environment (network needed the first time), and its best of several settings counts. All rows are
measured in turns, so that they share the machine's moods; medians are given. Compiling is apart.

Ours runs as a user would run it on several cores: the environments are sharded over as many CPU
devices (`jax.shard_map`; what one device does waits for no other).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import PartitionSpec

from benchmarks._peers import install, process
from jaxrl.envs import LunarLander
from train._run import machine

ENVPOOL = (1024, 4096, 64, [256, 64], [1024, 256])  # environments, and batches of some of them
DEVICES_FLAG = "xla_force_host_platform_device_count"


@dataclass
class Options:
    """Command line."""

    num_envs: tuple[int, ...] = (1, 64, 1024, 4096)
    """Numbers of environments side by side."""
    num_rounds: int = 5
    """Rounds through all rows; the median is given."""
    seconds: float = 2.0
    """Aim for the length of one measurement."""
    num_cores: int = 2
    """Cores: CPU devices for ours, threads of envpool. Ignored where JAX finds an accelerator."""
    solvers: tuple[str, ...] = ("exact", "fast")
    """Which of ours."""
    gymnasium: bool = True
    """Measure Gymnasium, too."""
    envpool: bool = True
    """Measure envpool, too."""
    peers: Path = install.CACHE
    """Folder for the environments of other libraries."""
    json: Path | None = None
    """Where to write the numbers."""


Row = tuple[str, Callable[[float], float], dict[str, Any]]


def ours(num_envs: int, solver: str) -> Row:
    """Compile; the row's function takes seconds and returns steps per second."""
    env = LunarLander(solver=solver)  # pyright: ignore[reportArgumentType]
    params = env.default_params
    num_devices = jax.device_count() if num_envs >= 64 else 1
    num_steps = max(50_000 // num_envs, 25)

    def run(state, key):
        """num_steps steps of one device's environments; key (1,)."""
        num = state.time.shape[0]

        def step(state, key):
            key_act, key_env = jax.random.split(key)
            action = jax.random.randint(key_act, (num,), 0, 4)
            keys = jax.random.split(key_env, num)
            _, state, _, terminated, truncated, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                keys, state, action, params
            )
            return state, jnp.sum(terminated | truncated)

        state, ended = jax.lax.scan(step, state, jax.random.split(key[0], num_steps))
        return state, ended.sum()[None]

    mesh = jax.make_mesh((num_devices,), ("env",), devices=jax.devices()[:num_devices])
    spec = PartitionSpec("env")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    place = jax.NamedSharding(mesh, spec)
    keys = jax.device_put(jax.random.split(jax.random.key(0), num_envs), place)
    _, state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)
    state = jax.device_put(state, place)
    keys = jax.device_put(jax.random.split(jax.random.key(1), num_devices), place)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    compiled = jax.jit(sharded).lower(state, keys).compile()
    about = {
        "num_envs": num_envs,
        "num_devices": num_devices,
        "compile_seconds": round(time.perf_counter() - begin, 1),
        "compile_cpu_seconds": round(time.process_time() - begin_cpu, 1),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // num_envs,
    }
    held = {"state": state, "count": 2}

    def go() -> None:
        key = jax.random.split(jax.random.key(held["count"]), num_devices)
        held["count"] += 1
        out = compiled(held["state"], jax.device_put(key, place))
        held["state"], _ = jax.block_until_ready(out)

    for _ in range(max(150 // num_steps, 1)):  # out of the common start
        go()

    def measure(seconds: float) -> float:
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            go()
            steps += num_envs * num_steps
        return steps / (time.perf_counter() - begin)

    return f"jaxrl, {solver}", measure, about


def gymnasium_single() -> Row:
    """The original, one environment."""
    import gymnasium

    env = gymnasium.make("LunarLander-v3")
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 4, 100_000)

    def measure(seconds: float) -> float:
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for action in actions[steps % 99_000 :][:500]:
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()
            steps += 500
        return steps / (time.perf_counter() - begin)

    return "Gymnasium", measure, {"num_envs": 1}


def gymnasium_vector(num_envs: int, mode: str) -> Row:
    """The original's vectors: "sync" or "async", a process each."""
    import gymnasium

    vector = gymnasium.make_vec("LunarLander-v3", num_envs, vectorization_mode=mode)
    vector.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 4, (1000, num_envs))

    def measure(seconds: float) -> float:
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            vector.step(actions[steps // num_envs % 1000])
            steps += num_envs
        return steps / (time.perf_counter() - begin)

    return f"Gymnasium, {mode} vector", measure, {"num_envs": num_envs}


def envpool(folder: Path, num_threads: int) -> Row:
    """envpool's best of several settings, in another process."""
    python = install.python("envpool", folder)
    about: dict[str, Any] = {"settings": []}
    settings = {"library": "envpool", "env": "LunarLander-v3", "num_envs": ENVPOOL}

    def measure(seconds: float) -> float:
        given = {**settings, "seconds": seconds, "threads": num_threads}
        limit = 60.0 + 10.0 * len(ENVPOOL) * seconds
        rates = process.run(python, "benchmarks._peers.run_stepping", given, limit)["rates"]
        best = max(rates, key=lambda name: rates[name])
        about["settings"].append(f"{best} environments, {num_threads} threads")
        return rates[best]

    return "envpool, best setting", measure, about


def main(options: Options) -> None:
    """Measure, print a Markdown table, write JSON if asked."""
    rows: list[Row] = []
    if options.envpool:
        rows.append(envpool(options.peers, options.num_cores))
    if options.gymnasium:  # before ours: its processes are forked, and JAX starts threads
        rows += [gymnasium_single(), gymnasium_vector(8, "sync"), gymnasium_vector(8, "async")]
    for solver in options.solvers:
        rows += [ours(num_envs, solver) for num_envs in options.num_envs]
    rates: list[list[float]] = [[] for _ in rows]
    for _ in range(options.num_rounds):
        for rate, (_, measure, _) in zip(rates, rows, strict=True):
            rate.append(measure(options.seconds))
    peer = float(np.median(rates[0])) if options.envpool else None
    results = []
    print(
        "| who | environments | steps/s (median) | slowest .. fastest | / envpool | compile [s] |"
    )
    print("|---|---|---|---|---|---|")
    for rate, (who, _, about) in zip(rates, rows, strict=True):
        median = float(np.median(rate))
        row = {
            "who": who,
            **about,
            "steps_per_second": round(median),
            "per_round": [round(r) for r in rate],
        }
        if peer:
            row["per_envpool"] = round(median / peer, 3)
        results.append(row)
        print(
            f"| {who} | {about.get('num_envs', '')} | {median:,.0f} |"
            f" {min(rate):,.0f} .. {max(rate):,.0f} | {row.get('per_envpool', '')} |"
            f" {about.get('compile_seconds', '')} |"
        )
    if options.json:
        result = {"machine": machine(), "num_cores": options.num_cores, "rows": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def run(options: Options) -> int:
    """`main` in a process in which JAX finds as many CPU devices as cores are wanted."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DEVICES_FLAG in flags:
        main(options)
        return 0
    flags = f"{flags} --{DEVICES_FLAG}={options.num_cores}".strip()
    command = [sys.executable, "-m", "benchmarks.lunar_lander_steps", *sys.argv[1:]]
    return subprocess.run(command, check=False, env={**os.environ, "XLA_FLAGS": flags}).returncode


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Options, description=__doc__)))
