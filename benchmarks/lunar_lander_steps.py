"""Steps per second of LunarLander beside the originals: random actions, automatic resets.

    python -m benchmarks.lunar_lander_steps --json benchmarks/results/lunar_lander_steps.json
    python -m benchmarks.lunar_lander_steps --envpool PYTHON   # of an environment with envpool

Gymnasium runs one environment, and a vector of 8; envpool (C++ Box2D) is not among the dependencies
(it pulls large packages): name the interpreter of an environment that has it, and its best of
several settings counts. All rows are measured in turns, so that they share the machine's moods.

What limits ours on a CPU: with random actions one lander in eleven is near the ground or at a joint
limit's edge and is gathered to be solved in full, the others cost a fifth of the time.
"""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl.envs import LunarLander
from train._run import machine

ENVPOOL = """
import sys, time, numpy as np, envpool
best = (0, "")
for num, batch, threads in ((1024, 1024, 2), (4096, 4096, 2), (64, 64, 2), (256, 64, 2)):
    try:
        env = envpool.make("LunarLander-v2", env_type="gymnasium", num_envs=num,
                           batch_size=batch, num_threads=threads)
    except Exception:
        continue
    env.async_reset()
    steps, start = 0, None
    rng = np.random.default_rng(0)
    while True:
        obs, reward, terminated, truncated, info = env.recv()
        env.send(rng.integers(0, 4, batch).astype(np.int32), info["env_id"])
        if start is None:
            start = time.perf_counter()
        else:
            steps += batch
        if time.perf_counter() - start > float(sys.argv[1]):
            break
    rate = steps / (time.perf_counter() - start)
    best = max(best, (rate, f"{num} envs, batch {batch}, {threads} threads"))
print(best[0], best[1])
"""


@dataclass
class Options:
    """Command line."""

    num_envs: tuple[int, ...] = (1, 64, 1024, 4096)
    """Numbers of environments side by side."""
    num_rounds: int = 3
    """Rounds through all rows; the median is given."""
    seconds: float = 2.0
    """Aim for the length of one measurement."""
    envpool: Path | None = None
    """Python interpreter of an environment with envpool."""
    json: Path | None = None
    """Where to write the numbers."""


def make_ours(num_envs: int, solver: str):
    """A function seconds -> steps per second, and what is known about it."""
    env = LunarLander(solver=solver)  # pyright: ignore[reportArgumentType]
    params = env.default_params

    def run(state, key):
        def step(state, key):
            key_act, key_env = jax.random.split(key)
            action = jax.random.randint(key_act, (num_envs,), 0, 4)
            keys = jax.random.split(key_env, num_envs)
            _, state, _, terminated, truncated, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                keys, state, action, params
            )
            return state, jnp.sum(terminated | truncated)

        state, ended = jax.lax.scan(step, state, jax.random.split(key, num_steps))
        return state, ended.sum()

    num_steps = max(20_000 // num_envs, 25)
    keys = jax.random.split(jax.random.key(0), num_envs)
    _, state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    compiled = jax.jit(run).lower(state, keys[0]).compile()
    about = {
        "compile_seconds": round(time.perf_counter() - begin, 1),
        "compile_cpu_seconds": round(time.process_time() - begin_cpu, 1),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // num_envs,
    }
    held = {"state": state, "key": jax.random.key(1)}
    for _ in range(max(100 // num_steps, 1)):  # out of the common start
        held["state"], _ = compiled(held["state"], held["key"])

    def measure(seconds: float) -> float:
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            held["key"], key = jax.random.split(held["key"])
            held["state"], _ = jax.block_until_ready(compiled(held["state"], key))
            steps += num_envs * num_steps
        return steps / (time.perf_counter() - begin)

    return measure, about


def make_gymnasium(num_envs: int):
    """The original: one environment, or a synchronous vector."""
    import gymnasium

    if num_envs == 1:
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

    else:
        vector = gymnasium.make_vec("LunarLander-v3", num_envs, vectorization_mode="sync")
        vector.reset(seed=0)
        actions = np.random.default_rng(0).integers(0, 4, (1000, num_envs))

        def measure(seconds: float) -> float:
            steps, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds:
                vector.step(actions[steps // num_envs % 1000])
                steps += num_envs
            return steps / (time.perf_counter() - begin)

    return measure, {}


def make_envpool(interpreter: Path):
    """envpool's best of several settings, in another process."""
    about: dict[str, str] = {}

    def measure(seconds: float) -> float:
        command = [str(interpreter), "-c", ENVPOOL, str(seconds)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rate, about["setting"] = out.split(maxsplit=1)
        about["setting"] = about["setting"].strip()
        return float(rate)

    return measure, about


def main(options: Options) -> list[dict]:
    """Measure, print a Markdown table, write JSON if asked."""
    rows = [("gymnasium", n, *make_gymnasium(n)) for n in (1, 8)]
    if options.envpool:
        rows.append(("envpool", 0, *make_envpool(options.envpool)))
    for solver in ("exact", "fast"):
        rows += [(solver, n, *make_ours(n, solver)) for n in options.num_envs]
    rates = [[] for _ in rows]
    for _ in range(options.num_rounds):
        for rate, (_, _, measure, _) in zip(rates, rows, strict=True):
            rate.append(measure(options.seconds))
    results = []
    print("| who | environments | steps/s (median) | slowest .. fastest | compile [s] |")
    print("|---|---|---|---|---|")
    for rate, (who, num_envs, _, about) in zip(rates, rows, strict=True):
        row = {
            "who": who,
            "num_envs": num_envs,
            "steps_per_second": round(float(np.median(rate))),
            "slowest": round(min(rate)),
            "fastest": round(max(rate)),
            **about,
        }
        results.append(row)
        print(
            f"| {who} | {num_envs or about.get('setting')} | {row['steps_per_second']:,} |"
            f" {row['slowest']:,} .. {row['fastest']:,} | {row.get('compile_seconds', '')} |"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"machine": machine(), "rows": results}, indent=1) + "\n"
        )
    return results


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
