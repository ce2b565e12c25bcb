"""How cost grows, and how near the machine's limit it is.

    python -m benchmarks.growth --json benchmarks/results/growth.json \
        --plot docs/growth.png --roofline docs/roofline.png

Growth: seconds of a vector step against the number of environments (1 to 65,536), of a PPO update
against environments, seeds and network width. The knee is where the fixed part of the cost equals
the growing part, n* = a / b of t = a + b n (of widths t = a + b w^2): below it more costs next to
nothing, above it costs in proportion.

Roofline: FLOPs of each agent's update and each environment's step (jaxrl.cost, loops counted),
bytes its kernels read and write (`benchmarks._hlo`), beside what this machine reaches at most: a
large matrix product, a sum of two arrays from memory and from the cache. The limit of a program is
the larger of its FLOPs at the peak rate and its bytes at the rate of the cache; what neither
explains is small kernels, one after the other, whose number and mean length are given.

A size is left out if it would not fit into the time left.
"""

import functools
import json
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
from scipy.optimize import nnls

from benchmarks import _hlo
from jaxrl.agents import dqn, ppo, sac
from jaxrl.cost import flops
from train._envs import make_env
from train._run import machine

SIZES = tuple(4**k for k in range(9))  # 1 to 65,536
SEEDS = (1, 4, 16, 64, 256)
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
ENVS = ("CartPole-v1", "Pendulum-v1", "MarsRover-v0", "MicroRacer-v0", "LunarLander-v3")
ENV_KWARGS = {"MicroRacer-v0": {"num_tracks": 64}}
PARTS = ("roofline", "envs", "ppo_envs", "seeds", "width")


@dataclass
class Options:
    """Command line."""

    parts: tuple[str, ...] = PARTS
    """What to measure."""
    envs: tuple[str, ...] = ENVS
    """Environments of the part "envs"."""
    minutes: float = 10.0
    """Time for everything."""
    json: Path | None = None
    """Where to write the numbers; parts that are not measured are kept."""
    plot: Path | None = None
    """PNG of the growth."""
    roofline: Path | None = None
    """PNG of the roofline."""


@dataclass
class Program:
    """A compiled program that goes on from where it ended: state -> state."""

    run: Any
    state: Any
    compile_s: float
    function: Callable[[Any], Any]

    def __call__(self) -> None:
        """Run once."""
        self.state = jax.block_until_ready(self.run(self.state))

    def seconds(self, least: float = 0.3, calls: int = 3) -> float:
        """Fastest of some calls, after one; of one alone if it is long."""
        self()
        times: list[float] = []
        while len(times) < calls or sum(times) < least:
            started = time.perf_counter()
            self()
            times.append(time.perf_counter() - started)
            if sum(times) > 4.0:
                break
        return min(times)


def program(function: Callable[[Any], Any], state: Any) -> Program:
    """Compile `function(state) -> state`."""
    started = time.perf_counter()
    run = jax.jit(function).lower(state).compile()
    return Program(run, state, time.perf_counter() - started, function)


def stepping(env_id: str, num_envs: int) -> tuple[Program, int]:
    """Steps of an environment with random actions; and how many in a call."""
    setup = _setup(env_id)
    env, params = setup.env, setup.params
    space = env.action_space(params)
    num_steps = int(np.clip(100_000 // num_envs, 1, 500))

    def one(state: Any, _: None) -> tuple[Any, None]:
        key, env_state = state
        key, key_act, key_env = jax.random.split(key, 3)
        action = jax.vmap(space.sample)(jax.random.split(key_act, num_envs))
        keys = jax.random.split(key_env, num_envs)
        out = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, env_state, action, params)
        return (key, out[1]), None

    keys = jax.random.split(jax.random.key(0), num_envs)
    env_state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)[1]
    state = (jax.random.key(1), env_state)
    return program(lambda s: jax.lax.scan(one, s, length=num_steps)[0], state), num_steps


@functools.cache
def _setup(env_id: str) -> Any:
    return make_env(env_id, **ENV_KWARGS.get(env_id, {}))


def updates(agent: Any, config: Any, env_id: str, seeds: int = 1, num_updates: int = 1) -> Program:
    """Updates of a learner, the run not yet begun."""
    setup = _setup(env_id)
    train = agent.make_train(config, setup.env, setup.params)
    init: Any = train.init

    def run(state: Any) -> Any:
        return train.run(state, num_updates)[0]

    key = jax.random.key(0)
    if seeds > 1:
        init, run, key = jax.vmap(init), jax.vmap(run), jax.random.split(key, seeds)
    return program(run, jax.jit(init)(key))


def ppo_config(**changes: Any) -> ppo.Config:
    """PPO of the README's CartPole, 4 environments x 128 steps, without its normalisers."""
    config: dict[str, Any] = {"num_envs": 4, "num_steps": 128, "normalize_obs": False}
    config |= {"normalize_reward": False, **changes}
    config["total_steps"] = 10_000 * config["num_envs"] * config["num_steps"]
    return ppo.Config(**config)


# growth -------------------------------------------------------------------------------------------


def knee(sizes: list[float], seconds: list[float]) -> dict[str, float | None]:
    """Fit t = a + b n, a and b >= 0, to relative errors; the knee is at n = a / b.

    None where the largest n adds less than a hundredth to the fixed part.
    """
    n, t = np.array(sizes, float), np.array(seconds, float)
    (a, b), _ = nnls(np.stack([1 / t, n / t], 1), np.ones_like(t))
    return {"fixed_s": a, "each_s": b, "knee": a / b if b * n.max() > 0.01 * a else None}


def grow(
    sizes: tuple[int, ...], make: Callable[[int], tuple[Program, int]], deadline: float, power: int
) -> dict[str, Any]:
    """Measure `make(size) -> (program, parts of a call)`; stop where time would run out."""
    rows: list[dict[str, float]] = []
    for size in sizes:
        # the next size costs up to 4 times as much in running, and as much in compiling
        cost = 5 * 4 * rows[-1]["seconds"] * rows[-1]["parts"] + rows[-1]["all_s"] if rows else 0.0
        if time.monotonic() + cost > deadline:
            break
        began = time.perf_counter()
        made, parts = make(size)
        seconds = made.seconds() / parts
        rows.append(
            {
                "size": size,
                "seconds": seconds,
                "parts": parts,
                "compile_s": made.compile_s,
                "all_s": time.perf_counter() - began,
            }
        )
        print(
            f"    {size:,}: {seconds * 1e6:,.1f} us, compiled in {made.compile_s:.1f} s", flush=True
        )
    result: dict[str, Any] = {"rows": rows}
    if len(rows) >= 3:
        result |= knee([r["size"] ** power for r in rows], [r["seconds"] for r in rows])
        if result["knee"] is not None:
            result["knee"] **= 1 / power
    return result


def growth(part: str, options: Options, deadline: float) -> dict[str, Any]:
    """Measure one part."""
    found: dict[str, Any] = {}
    if part == "envs":
        share = (deadline - time.monotonic()) / len(options.envs)
        for i, env_id in enumerate(options.envs):
            print(f"  {env_id}, environments", flush=True)
            end = deadline - share * (len(options.envs) - 1 - i)
            found[env_id] = grow(SIZES, functools.partial(stepping, env_id), end, 1)
        return found
    makers: dict[str, tuple[tuple[int, ...], Callable[[int], Program], int]] = {
        "ppo_envs": (
            SIZES,
            lambda n: updates(ppo, ppo_config(num_envs=n, num_steps=32), "CartPole-v1"),
            1,
        ),
        "seeds": (SEEDS, lambda n: updates(ppo, ppo_config(), "CartPole-v1", n), 1),
        "width": (
            WIDTHS,
            lambda n: updates(ppo, ppo_config(hidden=(n, n)), "CartPole-v1"),
            2,
        ),
    }
    sizes, make, power = makers[part]
    print(f"  PPO, CartPole-v1, {part}", flush=True)
    return grow(sizes, lambda n: (make(n), 1), deadline, power)


# roofline -----------------------------------------------------------------------------------------


def fastest(function: Callable[..., Any], *args: Any, repeats: int = 7) -> float:
    """Seconds of the fastest call of a compiled function."""
    run = jax.jit(function).lower(*args).compile()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - started)
    return min(times)


def peaks() -> dict[str, float]:
    """What the machine reaches: FLOP/s, bytes/s from memory and from the cache."""
    rates = []
    for size in (512, 1024, 2048):
        x = jnp.ones((size, size))
        rates.append(2 * size**3 / fastest(lambda a: a @ a, x))
    big = jnp.ones(2**25)  # 128 MB

    def triad(a: jax.Array, b: jax.Array, times: int) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, a: 0.5 * a + b, a)  # in place: no new pages

    short, long = (fastest(functools.partial(triad, times=n), big, big) for n in (1, 5))
    memory = 3 * big.nbytes * 4 / (long - short)
    small = jnp.ones(2**13)  # 32 kB; a loop inside, so that the start does not count

    def many(a: jax.Array, times: int) -> jax.Array:
        # a slice that moves keeps XLA from doing all additions in one pass
        return jax.lax.fori_loop(
            0, times, lambda i, a: a + jax.lax.dynamic_slice(table, (i % 8,), a.shape), a
        )

    table = jnp.ones(2**13 + 8)
    short, long = (fastest(functools.partial(many, times=n), small) for n in (1000, 11_000))
    cache = 3 * small.nbytes * 10_000 / (long - short)
    return {
        "flops_per_s": max(rates),
        "memory_bytes_per_s": memory,
        "cache_bytes_per_s": cache,
    }


def subjects() -> dict[str, Callable[[], tuple[Program, int]]]:
    """Programs of the roofline, each with the parts of a call."""
    one = functools.partial(lambda *args, **kw: (updates(*args, **kw), 1))
    dqn_config = dqn.Config(
        total_steps=10_000_000, num_envs=10, num_steps=50, num_gradient_steps=5, batch_size=100,
        buffer_size=50_000, learning_starts=400, dueling=True, activation="silu",
    )  # fmt: skip
    sac_config = sac.Config(
        total_steps=10_000_000, num_envs=1, num_steps=50, num_gradient_steps=1, batch_size=256,
        learning_starts=40, normalize_obs=True, activation="silu",
    )  # fmt: skip
    found: dict[str, Callable[[], tuple[Program, int]]] = {
        "PPO, CartPole, 4 x 128": lambda: one(ppo, ppo_config(), "CartPole-v1"),
        "PPO, CartPole, 4 x 128, 16 seeds": lambda: one(ppo, ppo_config(), "CartPole-v1", 16),
        "PPO, CartPole, 1024 x 32, (256, 256)": lambda: one(
            ppo, ppo_config(num_envs=1024, num_steps=32, hidden=(256, 256)), "CartPole-v1"
        ),
        "PPO, MicroRacer, 64 x 128": lambda: one(ppo, ppo_config(num_envs=64), "MicroRacer-v0"),
        "DQN, CartPole": lambda: one(dqn, dqn_config, "CartPole-v1"),
        "SAC, Pendulum": lambda: one(sac, sac_config, "Pendulum-v1"),
    }
    for env_id in ("CartPole-v1", "MicroRacer-v0", "LunarLander-v3"):
        found[f"{env_id.split('-')[0]}, 1,024 environments"] = functools.partial(
            stepping, env_id, 1024
        )
    return found


def roofline(deadline: float) -> dict[str, Any]:
    """Measure the peaks, and where each program stands."""
    top = peaks()
    print("  peaks:", {name: f"{value:.3g}" for name, value in top.items()}, flush=True)
    rows = []
    for name, make in subjects().items():
        if time.monotonic() > deadline:
            break
        made, parts = make()
        seconds = made.seconds() / parts
        work = _hlo.count(made.run.as_text())
        cost = flops.count(made.function, made.state)
        row = {
            "program": name,
            "seconds": seconds,
            "flops": cost.flops / parts,
            "layer_flops": cost.layer_flops / parts,
            "bytes": work.bytes / parts,
            "kernels": work.kernels / parts,
            "lower_bound": bool(work.unknown_loops or cost.warnings),
        }
        rows.append(row | limits(row, top))
        print(f"  {sentence(rows[-1])}", flush=True)
    return {"peaks": top, "rows": rows}


def limits(row: dict[str, Any], top: dict[str, float]) -> dict[str, Any]:
    """Rates reached, the least time the machine allows, and what sets it."""
    least = {
        "arithmetic": row["flops"] / top["flops_per_s"],
        "bytes": row["bytes"] / top["cache_bytes_per_s"],
    }
    bound = max(least, key=lambda name: least[name])
    return {
        "flops_per_s": row["flops"] / row["seconds"],
        "bytes_per_s": row["bytes"] / row["seconds"],
        "flops_per_byte": row["flops"] / max(row["bytes"], 1),
        "kernel_us": 1e6 * row["seconds"] / max(row["kernels"], 1),
        "least_s": least,
        "bound": bound,
        "part_of_limit": least[bound] / row["seconds"],
    }


def sentence(row: dict[str, Any]) -> str:
    """One row in words."""
    at_least = "at least " if row["lower_bound"] else ""
    return (
        f"{row['program']}: {row['seconds'] * 1e6:,.0f} us; {at_least}"
        f"{row['flops_per_s'] / 1e9:.2f} GFLOP/s, {row['bytes_per_s'] / 1e9:.2f} GB/s, "
        f"{row['kernels']:,.0f} kernels of {row['kernel_us']:.2f} us; "
        f"nearest limit: {row['bound']} ({row['part_of_limit']:.0%} of the time)"
    )


# showing ------------------------------------------------------------------------------------------

NAMES = {
    "ppo_envs": "PPO on CartPole, update of 32 steps, environments",
    "seeds": "PPO on CartPole, update of 4 x 128 steps, seeds",
    "width": "PPO on CartPole, update of 4 x 128 steps, width of both layers",
}


def curves(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All curves by name."""
    found = {f"{env}, step, environments": c for env, c in result.get("envs", {}).items()}
    return found | {text: result[part] for part, text in NAMES.items() if part in result}


def markdown(result: dict[str, Any]) -> str:
    """Tables of what was measured."""
    lines = [
        "| what grows | from .. to | fixed [us] | each more [ns], of widths squared | knee at |",
        "|---" * 5 + "|",
    ]
    for name, curve in curves(result).items():
        if "knee" in curve:
            sizes = [int(r["size"]) for r in curve["rows"]]
            at = f"{curve['knee']:,.0f}" if curve["knee"] else "none: nothing grows"
            lines.append(
                f"| {name} | {sizes[0]:,} .. {sizes[-1]:,} | {curve['fixed_s'] * 1e6:,.0f} |"
                f" {curve['each_s'] * 1e9:,.1f} | {at} |"
            )
    if "roofline" in result:
        top = result["roofline"]["peaks"]
        lines += [
            f"\nThis machine at most: {top['flops_per_s'] / 1e9:.0f} GFLOP/s, "
            f"{top['memory_bytes_per_s'] / 1e9:.1f} GB/s from memory, "
            f"{top['cache_bytes_per_s'] / 1e9:.0f} GB/s from the cache.\n",
            "| program | time [us] | GFLOP/s | GB/s | FLOP/byte | kernels | us each | limit |",
            "|---" * 8 + "|",
        ]
        for r in result["roofline"]["rows"]:
            mark = ">= " if r["lower_bound"] else ""
            us = r["seconds"] * 1e6
            lines.append(
                f"| {r['program']} | {us:,.0f} | {mark}{r['flops_per_s'] / 1e9:.2f} |"
                f" {mark}{r['bytes_per_s'] / 1e9:.2f} | {r['flops_per_byte']:.2f} |"
                f" {r['kernels']:,.0f} | {r['kernel_us']:.2f} |"
                f" {r['bound']}, {r['part_of_limit']:.0%} |"
            )
    return "\n".join(lines)


def draw_growth(result: dict[str, Any], path: Path) -> None:
    """Time for each environment, seed or unit of work against their number."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, dict[str, Any]]] = [
        ("environments, one step of all", "environments", result.get("envs", {})),
        ("PPO on CartPole, one update", "environments", {"32 steps": result.get("ppo_envs")}),
        ("PPO on CartPole, one update", "seeds", {"4 x 128": result.get("seeds")}),
        ("PPO on CartPole, one update", "width of the layers", {"4 x 128": result.get("width")}),
    ]
    fig = Figure(figsize=(11, 7), layout="constrained")
    for ax, (title, what, lines) in zip(fig.subplots(2, 2).flat, panels, strict=True):
        for name, curve in lines.items():
            if not curve or not curve["rows"]:
                continue
            sizes = np.array([r["size"] for r in curve["rows"]], float)
            times = np.array([r["seconds"] for r in curve["rows"]])
            (line,) = ax.loglog(sizes, 1e3 * times, "o-", label=name, markersize=3)
            if curve.get("knee"):
                power = 2 if what.startswith("width") else 1
                at = curve["fixed_s"] + curve["each_s"] * curve["knee"] ** power
                ax.plot(curve["knee"], 1e3 * at, "x", color=line.get_color(), markersize=9)
        ax.set(xlabel=f"{what} (x: knee)", ylabel="time [ms]", title=title)
        ax.grid(alpha=0.3)
        if any(lines.values()):
            ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def draw_roofline(found: dict[str, Any], path: Path) -> None:
    """FLOP/s against FLOPs per byte, under the machine's limits."""
    from matplotlib.figure import Figure

    top = found["peaks"]
    fig = Figure(figsize=(8, 5.5), layout="constrained")
    ax = fig.subplots()
    x = np.logspace(-2, 2.5, 200)
    for name in ("cache", "memory"):
        roof = np.minimum(top["flops_per_s"], x * top[f"{name}_bytes_per_s"])
        ax.loglog(x, roof / 1e9, label=f"limit, data from the {name}")
    for i, r in enumerate(found["rows"]):
        label = f"{r['program']} ({r['bound']}, {r['part_of_limit']:.0%})"
        marker = "^" if r["lower_bound"] else "o"
        ax.plot(r["flops_per_byte"], r["flops_per_s"] / 1e9, marker, label=label, color=f"C{2 + i}")
    ax.set(
        xlabel="FLOPs for each byte that a kernel reads or writes",
        ylabel="GFLOP/s",
        title="Roofline (triangles: lower bounds, loops of unknown length)",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)


def main(options: Options) -> int:
    """Measure, print, write, draw; the exit code is 2 for wrong input."""
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        print(f"parts: {unknown[0]!r} must be one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    began = time.monotonic()
    result: dict[str, Any] = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    result["machine"] = machine()
    parts = [part for part in PARTS if part in options.parts]
    for i, part in enumerate(parts):
        print(part, flush=True)
        now = time.monotonic()
        left = began + 60.0 * options.minutes - now
        # environments are half of it; what a part does not use goes to the next
        weights = [3 if name == "envs" else 1 for name in parts[i:]]
        deadline = now + left * weights[0] / sum(weights)
        result[part] = roofline(deadline) if part == "roofline" else growth(part, options, deadline)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{markdown(result)}\n\n{time.monotonic() - began:.0f} s")
    if options.plot:
        draw_growth(result, options.plot)
    if options.roofline and "roofline" in result:
        draw_roofline(result["roofline"], options.roofline)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
