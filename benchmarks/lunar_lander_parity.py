"""LunarLander in closed loop beside Gymnasium: same terrain, push and noise, Gymnasium's heuristic.

    python -m benchmarks.lunar_lander_parity --json benchmarks/results/lunar_lander_parity.json

Each seed is flown twice, once by Gymnasium with Box2D and once here; both are steered by the same
controller from their own observations. Touch-down is chaotic, so single episodes part; what must
agree is how often they land, what they earn and how long they take.
"""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl.envs import LanderEnding, LunarLander
from jaxrl.envs.lunar_lander import observation, start, terrain
from train._run import machine

MAX_STEPS = 1000


@dataclass
class Options:
    """Command line."""

    num_seeds: int = 1200
    """Paired episodes, discrete and as many continuous."""
    first_seed: int = 0
    """The others follow."""
    solver: Literal["exact", "fast"] = "exact"
    """Which solver is compared."""
    json: Path | None = None
    """Where to write the numbers."""


def draws(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What Gymnasium draws after `reset(seed=seed)`: heights (12,) in [0, 1), force (2,) [N], noise
    (MAX_STEPS, 2) in [-1, 1] of the steps after the reset's own.
    """
    from gymnasium.utils import seeding

    rng, _ = seeding.np_random(int(seed))
    heights = rng.uniform(0, 1, 12)
    force = rng.uniform(-1000, 1000, 2)
    return heights, force, rng.uniform(-1, 1, (MAX_STEPS + 1, 2))[1:]


def controller(obs: jax.Array, *, continuous: bool) -> jax.Array:
    """Gymnasium's heuristic: an observation (8,) -> an action."""
    touching = (obs[6] > 0) | (obs[7] > 0)
    angle_wanted = jnp.clip(0.5 * obs[0] + obs[2], -0.4, 0.4)
    turn = 0.5 * (angle_wanted - obs[4]) - obs[5]
    lift = 0.5 * (0.55 * jnp.abs(obs[0]) - obs[1]) - 0.5 * obs[3]
    turn = jnp.where(touching, 0.0, turn)
    lift = jnp.where(touching, -0.5 * obs[3], lift)
    if continuous:
        return jnp.clip(jnp.stack([20 * lift - 1, -20 * turn]), -1.0, 1.0)
    action = jnp.where(turn < -0.05, 3, jnp.where(turn > 0.05, 1, 0))
    return jnp.where((lift > jnp.abs(turn)) & (lift > 0.05), 2, action).astype(jnp.int32)


def fly_theirs(
    seeds: np.ndarray,
    continuous: bool,
    act: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Gymnasium's episodes: return, length, ending, each (num_seeds,).

    Steered by its heuristic, or by `act(obs (n, 8)) -> action (n, ...)` of all episodes at once.
    """
    import gymnasium
    from gymnasium.envs.box2d.lunar_lander import heuristic

    envs = [gymnasium.make("LunarLander-v3", continuous=continuous) for _ in seeds]
    obs = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)])
    total, length, last = np.zeros(len(seeds)), np.zeros(len(seeds), int), np.zeros(len(seeds), int)
    running = np.ones(len(seeds), bool)
    while running.any():
        actions = None if act is None else act(obs)
        for i in np.flatnonzero(running):
            action = heuristic(envs[i], obs[i]) if actions is None else actions[i]
            # as stored and as here: float32 actions
            action = np.asarray(action, np.float32) if continuous else int(action)
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            total[i], length[i] = total[i] + float(reward), length[i] + 1
            running[i] = not (terminated or truncated)
            if terminated:
                last[i] = _ending(envs[i].unwrapped)
    return {"return": total, "length": length, "ending": last}


def _ending(bare: Any) -> LanderEnding:
    """How an episode of Gymnasium's terminated."""
    if not bare.lander.awake:
        return LanderEnding.LANDED
    return LanderEnding.CRASHED if bare.game_over else LanderEnding.OUT_OF_VIEW


def fly_ours(
    seeds: np.ndarray,
    continuous: bool,
    solver: str,
    act: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The same episodes here, steered alike."""
    params = LunarLander().default_params
    heights, force, noise = (np.stack(a) for a in zip(*map(draws, seeds), strict=True))
    noise = np.swapaxes(noise, 0, 1).astype(np.float32)

    def begin(u, force):
        state = start(terrain(u, params), force, jnp.zeros(2, jnp.int32), params)
        return state, observation(state.world)

    first, obs = jax.jit(jax.vmap(begin))(
        jnp.asarray(heights, jnp.float32), jnp.asarray(force, jnp.float32)
    )
    if act is None:
        act = jax.jit(jax.vmap(functools.partial(controller, continuous=continuous)))
    step, state, over = _stepper(continuous, solver), first, jnp.zeros(len(seeds), bool)
    total, length, last = np.zeros(len(seeds)), np.zeros(len(seeds), int), np.zeros(len(seeds), int)
    for t in range(MAX_STEPS):
        running = ~np.asarray(over)
        if not running.any():
            break
        state, obs, over, reward, ending = step(state, over, first, act(np.asarray(obs)), noise[t])
        total += np.asarray(reward, np.float64)
        length += running
        last += np.asarray(ending)
    return {"return": total, "length": length, "ending": last}


@functools.cache  # compiled once for all policies
def _stepper(continuous: bool, solver: str) -> Callable[..., Any]:
    env = LunarLander(continuous=continuous, solver=solver)  # pyright: ignore[reportArgumentType]
    params = env.default_params

    def one(state, over, first, action, noise):
        _, state, reward, ended, info = env.step_with(state, action, noise, params)
        # a lander that has ended waits in the air, where it costs little
        ended = over | ended
        state = jax.tree.map(lambda a, b: jnp.where(ended, a, b), first, state)
        reward = jnp.where(over, 0.0, reward)
        return state, observation(state.world), ended, reward, jnp.where(over, 0, info["ending"])

    return jax.jit(jax.vmap(one))


def compare(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of both, paired differences with their standard errors, and how many agree."""
    root = np.sqrt(len(ours["return"]))
    landed = [(flown["ending"] == LanderEnding.LANDED).astype(float) for flown in (theirs, ours)]
    differences = {
        "return": ours["return"] - theirs["return"],
        "landed": landed[1] - landed[0],
        "length": (ours["length"] - theirs["length"]).astype(float),
    }
    out: dict[str, float] = {
        "same_outcome": float(np.mean(theirs["ending"] == ours["ending"])),
        "same_length": float(np.mean(theirs["length"] == ours["length"])),
    }
    for name, values in (
        ("return", [theirs["return"], ours["return"]]),
        ("landed", landed),
        ("length", [theirs["length"], ours["length"]]),
    ):
        out[f"{name}_gymnasium"] = float(np.mean(values[0]))
        out[f"{name}_ours"] = float(np.mean(values[1]))
        out[f"{name}_difference"] = float(np.mean(differences[name]))
        out[f"{name}_standard_error"] = float(np.std(differences[name]) / root)
    return out


def main(options: Options) -> dict[str, dict[str, float]]:
    """Fly, print a Markdown table, write JSON if asked."""
    seeds = np.arange(options.first_seed, options.first_seed + options.num_seeds)
    results = {}
    print("| actions | same outcome | same length | return, theirs / ours | landed | length |")
    print("|---|---|---|---|---|---|")
    for continuous in (False, True):
        begin = time.perf_counter()
        theirs = fly_theirs(seeds, continuous)
        between = time.perf_counter()
        ours = fly_ours(seeds, continuous, options.solver)
        row = compare(theirs, ours)
        row["seconds_gymnasium"] = round(between - begin, 1)
        row["seconds_ours"] = round(time.perf_counter() - between, 1)
        name = "continuous" if continuous else "discrete"
        results[name] = row
        cells = [
            f"{row[f'{q}_gymnasium']:.{d}f} / {row[f'{q}_ours']:.{d}f}"
            f" (+- {row[f'{q}_standard_error']:.{d}f})"
            for q, d in (("return", 1), ("landed", 4), ("length", 1))
        ]
        print(
            f"| {name} | {row['same_outcome']:.3f} | {row['same_length']:.3f} | "
            + " | ".join(cells)
            + " |",
            flush=True,
        )
    if options.json:
        result = {
            "machine": machine(),
            "num_seeds": options.num_seeds,
            "first_seed": options.first_seed,
            "solver": options.solver,
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
