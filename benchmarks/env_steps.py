"""Environment steps per second of MicroRacer, automatic resets included.

    python -m benchmarks.env_steps --json benchmarks/results/env_steps.json

Two drivers: random actions (an episode lasts 13 steps, so resets count) and a hand-written pilot
that steers to the longest ray (an episode lasts 550 steps, nine in ten are completed, rays are
long). One compiled program scans `vmap(env.step)`; compiling is timed apart, the median of several
runs is given.

What limits it, on 2 CPU cores with 1024 environments: the lidar, 19 rays with 14 samples on
average, three quarters of the step. A sample is one gather of a 32-bit word, half a nanosecond to
three, as the words lie in the cache or not; the rest is arithmetic on 8 lanes. Most rays end within
the first 16 samples, which all take; the others are then gathered into shorter arrays
(`_lidar._continue`), or a batch would pay for its longest ray, 60 to 120 samples. With few
environments the cost is that of starting dozens of kernels a step.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl.envs import MicroRacer
from train._run import machine

# The original on one core, as its specification gives it (section 10): whole laps, random.
ORIGINAL = {"pilot": 2_840, "random": 104}


@dataclass
class Options:
    """Command line."""

    num_envs: tuple[int, ...] = (1, 64, 1024, 16384)
    """Numbers of environments side by side."""
    num_tracks: int = 256
    """Tracks in the bank."""
    num_repeats: int = 5
    """Runs of which the median is given."""
    seconds: float = 1.0
    """Aim for the length of a run."""
    json: Path | None = None
    """Where to write the numbers."""


def pilot(obs: jax.Array) -> jax.Array:
    """Steer to the longest ray, drive as fast as it is long: compact obs (5,) -> action (2,)."""
    direction, longest, speed = obs[0], obs[2], obs[4]
    target = jnp.clip(2.2 * longest, 0.15, 0.36)
    most = jnp.minimum(np.pi / 6, 1.741 * 0.04 / jnp.maximum(speed, 1e-3))
    return jnp.clip(jnp.stack([(target - speed) / 0.004, -direction / most]), -1.0, 1.0)


def make_run(env, num_envs, num_steps, driver):
    """Return run(params, state, obs, key) -> (state, obs, number of episodes that ended)."""

    def run(params, state, obs, key):
        def step(carry, key):
            state, obs, num_ended = carry
            key_act, key_env = jax.random.split(key)
            if driver == "random":
                action = jax.random.uniform(key_act, (num_envs, 2), minval=-1.0)
            else:
                action = jax.vmap(pilot)(obs)
            keys = jax.random.split(key_env, num_envs)
            obs, state, _, terminated, truncated, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                keys, state, action, params
            )
            return (state, obs, num_ended + jnp.sum(terminated | truncated)), None

        keys = jax.random.split(key, num_steps)
        return jax.lax.scan(step, (state, obs, jnp.int32(0)), keys)[0]

    return run


def measure(env, params, num_envs, driver, options):
    """Steps per second and what belongs to it, as a dict."""
    key = jax.random.key(0)
    keys = jax.random.split(key, num_envs)
    obs, state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)

    def compiled(num_steps):
        run = jax.jit(make_run(env, num_envs, num_steps, driver))
        start = time.perf_counter()
        run = run.lower(params, state, obs, key).compile()
        return run, time.perf_counter() - start

    def timed(run, state, obs, key):
        start = time.perf_counter()
        out = jax.block_until_ready(run(params, state, obs, key))
        return time.perf_counter() - start, out

    num_steps = 200
    run, compile_seconds = compiled(num_steps)
    _, (state, obs, _) = timed(run, state, obs, key)
    seconds, (state, obs, _) = timed(run, state, obs, key)
    num_steps = max(200, int(num_steps * options.seconds / seconds))
    run, compile_seconds = compiled(num_steps)
    rates, num_ended = [], 0
    for i in range(options.num_repeats):
        seconds, (state, obs, ended) = timed(run, state, obs, jax.random.key(1 + i))
        rates.append(num_envs * num_steps / seconds)
        num_ended += int(ended)
    num_all = num_envs * num_steps * options.num_repeats
    return {
        "num_envs": num_envs,
        "driver": driver,
        "steps_per_second": round(float(np.median(rates))),
        "slowest": round(min(rates)),
        "fastest": round(max(rates)),
        "compile_seconds": round(compile_seconds, 2),
        "steps_per_episode": round(num_all / max(num_ended, 1), 1),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // num_envs,
        "times_original": round(float(np.median(rates)) / ORIGINAL[driver]),
    }


def main(options: Options) -> list[dict]:
    """Measure, print a Markdown table, write JSON if asked."""
    start = time.perf_counter()
    env = MicroRacer(num_tracks=options.num_tracks)
    params = jax.block_until_ready(env.default_params)
    bank_seconds = time.perf_counter() - start
    bank_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params.tracks))
    print(
        f"bank: {options.num_tracks} tracks, {bank_bytes / 1e6:.0f} MB,"
        f" drawn in {bank_seconds:.1f} s with compiling\n"
    )
    print("| envs | driver | steps/s (median) | slowest .. fastest | steps per episode |", end="")
    print(" compile [s] | times the original |\n|" + "---|" * 7)
    rows = []
    for num_envs in options.num_envs:
        for driver in ("random", "pilot"):
            row = measure(env, params, num_envs, driver, options)
            rows.append(row)
            print(
                f"| {num_envs:,} | {driver} | {row['steps_per_second']:,} |"
                f" {row['slowest']:,} .. {row['fastest']:,} | {row['steps_per_episode']} |"
                f" {row['compile_seconds']} | {row['times_original']} |",
                flush=True,
            )
    print(f"\nstate: {rows[0]['state_bytes']} bytes per environment")
    if options.json:
        result = {
            "machine": machine(),
            "bank": {"tracks": options.num_tracks, "bytes": bank_bytes, "seconds": bank_seconds},
            "original_steps_per_second": ORIGINAL,
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
