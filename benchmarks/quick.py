"""Has anything become slower? Our main programs against a fixed kernel, in under two minutes.

    python -m benchmarks.quick           # compare with benchmarks/results/quick.json
    python -m benchmarks.quick --save    # make what is measured now the baseline

Each program is timed in turns with a reference kernel that never changes (a scan of small matrix
products, tanh and threefry draws, what the programs are made of), and its time is given as a
multiple of the kernel's: that number hardly depends on the machine or on what else it does. More
than 20 % above the baseline is flagged, and the exit code is 1. No test: timings may deceive. Like
the training scripts it uses one thread.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from jaxrl.agents import dqn, ppo, sac
from train import _devices

BASELINE = Path(__file__).parent / "results" / "quick.json"
SLOWER = 1.2  # flagged above this


@dataclass
class Options:
    """Command line."""

    save: bool = False
    """Write the baseline."""
    only: tuple[str, ...] = ()
    """Programs to measure; by default all."""
    rounds: int = 12
    """Turns; of each program and of the kernel the fastest counts."""
    json: Path = BASELINE
    """File of the baseline."""


def reference() -> Callable[[], Any]:
    """Build the kernel. Never change it: the baseline is in multiples of its time."""

    def body(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = jax.random.uniform(key, (64, 16), minval=-0.1, maxval=0.1)
        x = jnp.tanh(x @ w).at[:, :16].add(noise)
        return x, x[0, 0]

    w = jnp.eye(64) * 1.01 + 0.001
    x = jnp.full((64, 64), 0.1)
    keys = jax.random.split(jax.random.key(0), 2000)
    run = jax.jit(lambda: jax.lax.scan(body, x, keys)[1].sum()).lower().compile()
    return lambda: jax.block_until_ready(run())


def learner(agent: Any, config: Any, env_id: str, num_updates: int) -> Callable[[], Any]:
    """Updates of a learner, each call going on from where the last one ended."""
    from train._envs import make_env  # computes: after the threads are set

    setup = make_env(env_id)
    train = agent.make_train(config, setup.env, setup.params)
    state = jax.block_until_ready(jax.jit(train.init)(jax.random.key(0)))
    run = jax.jit(lambda state: train.run(state, num_updates)[0]).lower(state).compile()
    held = [state]

    def go() -> None:
        held[0] = jax.block_until_ready(run(held[0]))

    go()  # beyond the wait of the learners from replay
    return go


def stepping(name: str, num_envs: int, num_steps: int, **kwargs: Any) -> Callable[[], Any]:
    """Steps of an environment of `jaxrl.envs` with random actions, each call going on."""
    import jaxrl.envs

    env = getattr(jaxrl.envs, name)(**kwargs)
    params = env.default_params
    space = env.action_space(params)

    def one(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        key_act, key_env = jax.random.split(key)
        action = jax.vmap(space.sample)(jax.random.split(key_act, num_envs))
        keys = jax.random.split(key_env, num_envs)
        out = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, params)
        return out[1], out[2].sum()

    keys = jax.random.split(jax.random.key(0), num_envs)
    state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)[1]
    keys = jax.random.split(jax.random.key(1), num_steps)
    run = jax.jit(lambda state: jax.lax.scan(one, state, keys)[0]).lower(state).compile()
    held = [state]

    def go() -> None:
        held[0] = jax.block_until_ready(run(held[0]))

    for _ in range(max(1, 100 // num_steps)):  # out of the common start
        go()
    return go


PROGRAMS: dict[str, Callable[[], Callable[[], Any]]] = {
    "ppo": lambda: learner(
        ppo,
        ppo.Config(total_steps=512_000, num_envs=4, num_steps=128, normalize_obs=False),
        "CartPole-v1",
        50,
    ),
    "dqn": lambda: learner(
        dqn,
        dqn.Config(total_steps=1_000_000, num_envs=8, num_steps=250, learning_starts=1_000),
        "CartPole-v1",
        4,
    ),
    "sac": lambda: learner(
        sac,
        sac.Config(total_steps=1_000_000, num_steps=25, learning_starts=400),
        "Pendulum-v1",
        2,
    ),
    "micro_racer": lambda: stepping("MicroRacer", 1024, 100, num_tracks=16),
    "lunar_lander": lambda: stepping("LunarLander", 256, 50),
}


def measure(names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Time of each program, in multiples of the kernel's, with what it rests on."""
    kernel = reference()
    programs, compile_s = {}, {}
    for name in names:
        started = time.perf_counter()
        programs[name] = PROGRAMS[name]()
        compile_s[name] = time.perf_counter() - started
    kernel()
    times: dict[str, list[float]] = {name: [] for name in ("kernel", *names)}
    for _ in range(rounds):
        for name in names:
            for who, run in (("kernel", kernel), (name, programs[name])):
                started = time.perf_counter()
                run()
                times[who].append(time.perf_counter() - started)
    fastest = min(times["kernel"])
    return {
        name: {
            "ratio": round(min(times[name]) / fastest, 3),
            "seconds": round(min(times[name]), 4),
            "kernel_seconds": round(fastest, 4),
            "built_seconds": round(compile_s[name], 1),
        }
        for name in names
    }


def main(options: Options) -> int:
    """Measure, compare, print; the exit code is 1 if something is slower, 2 for wrong input."""
    unknown = sorted(set(options.only) - set(PROGRAMS))
    if unknown or options.rounds < 1:
        what = f"only: {unknown[0]!r}" if unknown else f"rounds = {options.rounds}"
        print(f"{what} must be {'of ' + ', '.join(PROGRAMS) if unknown else '>= 1'}")
        return 2
    _devices.use_one_thread()
    from train._run import machine

    names = list(options.only or PROGRAMS)
    began = time.perf_counter()
    found = measure(names, options.rounds)
    before = json.loads(options.json.read_text()) if options.json.exists() else {"programs": {}}
    slower = []
    print("| program | times the kernel | baseline | now / then | seconds | built in [s] |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        then = before["programs"].get(name, {}).get("ratio")
        change = row["ratio"] / then if then else None
        mark = " SLOWER" if change and change > SLOWER else ""
        slower += [name] if mark else []
        print(
            f"| {name} | {row['ratio']:.2f} | {f'{then:.2f}' if then else ''} |"
            f" {f'{change:.2f}' if change else ''}{mark} | {row['seconds']:.3f} |"
            f" {row['built_seconds']} |"
        )
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if slower:
        print(f"more than {SLOWER - 1:.0%} slower than the baseline: {', '.join(slower)}")
    if options.save:
        result = {"machine": machine(), "programs": {**before["programs"], **found}}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        return 0
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
