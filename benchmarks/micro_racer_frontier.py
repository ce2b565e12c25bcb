"""Safety against speed in MicroRacer: what the discount and the price of a crash buy.

    python -m benchmarks.micro_racer_frontier --json benchmarks/results/micro_racer_frontier.json \
        --plot docs/micro_racer_frontier.png

A lap pays its length, so speed is worth something only through the discount, and a crash costs its
penalty and what would have followed. Both are real numbers, so all settings and all seeds train in
one compiled program (`vmap` over the config and the environment's parameters). Every agent then
drives the same unseen tracks, deterministically, at most 1,000 steps, paid as in the original
(crash -3). Beside them: the published agents and hand-written pilots, as measured in the original
environment on 400 (120) tracks.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from jaxrl import spaces
from jaxrl.agents import ppo
from train import _envs, _presets, _report
from train._run import machine

# (completed, steps per completed lap, discounted return 0.99) in the original environment
PUBLISHED: dict[str, tuple[float, float, float | None]] = {
    "DDPG": (0.920, 730, 0.88),
    "PPO": (0.838, 804, 0.61),
    "TD3": (0.730, 898, 0.67),
    "DSAC": (0.422, 564, 0.65),
    "SAC": (0.168, 619, 0.59),
    "pilot": (0.948, 675, 0.94),
    "slow pilot": (0.967, 821, None),
    "fast pilot": (0.892, 489, 1.21),
    "reckless pilot": (0.567, 421, None),
}


DEFAULT = _presets.find("ppo", "MicroRacer-v0")


@dataclass
class Options:
    """Command line."""

    settings: tuple[str, ...] = (
        "0.98:-3",
        "0.99:-3",
        "0.995:-3",
        "0.99:-20",
        "0.9975:-20",
        "0.999:-20",
    )
    """Pairs gamma:failure_reward to train with."""
    num_seeds: int = 2
    """Agents per setting."""
    total_steps: int | None = None
    """Environment steps per agent; by default those of the preset."""
    episodes: int = 512
    """Unseen tracks to evaluate on."""
    json: Path | None = None
    """File to write the table to."""
    plot: Path | None = None
    """PNG to draw."""


def main() -> None:
    """Train, evaluate, print a table, write the files."""
    options = tyro.cli(Options, description=__doc__)
    pairs = [tuple(map(float, s.split(":"))) for s in options.settings]
    rows = train_and_evaluate(pairs, options)
    print(markdown(rows))
    if options.json:
        content = {"machine": machine(), "rows": rows, "published": PUBLISHED}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        draw(rows, options.plot)


def train_and_evaluate(pairs: list[tuple[float, ...]], options: Options) -> list[dict[str, Any]]:
    """Return one row a setting: medians over seeds of what `train._report.aggregate` gives."""
    setup = _envs.make_env("MicroRacer-v0")
    config = ppo.Config(**DEFAULT.config)
    if options.total_steps:
        config = dataclasses.replace(config, total_steps=options.total_steps)
    gammas, failures = jnp.asarray(pairs).T
    keys = jax.vmap(jax.random.key)(jnp.arange(options.num_seeds))

    def train(gamma: jax.Array, failure_reward: jax.Array, key: jax.Array) -> Any:
        params = setup.params.replace(failure_reward=failure_reward)
        state, _ = ppo.make_train(dataclasses.replace(config, gamma=gamma), setup.env, params)(key)
        return ppo.get_policy(state)

    over_seeds = jax.vmap(train, in_axes=(None, None, 0))
    policies = jax.jit(jax.vmap(over_seeds))(gammas, failures, keys_for(keys, len(pairs)))
    policies = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), policies)

    act = ppo.make_act(config, *spaces.read(setup.env, setup.params))
    result = _report.evaluate(setup, act, policies, 0, options.episodes)
    rows = []
    for i, (gamma, failure_reward) in enumerate(pairs):
        lanes = range(i * options.num_seeds, (i + 1) * options.num_seeds)
        per_seed = [_report.aggregate(result, lane, setup.endings) for lane in lanes]
        rows.append(
            {
                "gamma": gamma,
                "failure_reward": failure_reward,
                "total_steps": config.total_steps,
                **_report.median(per_seed),
                "per_seed": per_seed,
            }
        )
    return rows


def keys_for(keys: jax.Array, num_settings: int) -> jax.Array:
    """The same seeds for every setting: (num_settings, num_seeds)."""
    return jnp.broadcast_to(keys, (num_settings, *keys.shape))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the README: medians over seeds."""
    lines = [
        "| trained with | completed | steps per lap | discounted return (0.99) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| gamma {row['gamma']:g}, crash {row['failure_reward']:g} "
            f"| {100 * row['success_rate']:.1f} % | {row['success_length_mean']:.0f} "
            f"| {row['discounted_return_mean']:.2f} |"
        )
    for name, (completed, steps, discounted) in PUBLISHED.items():
        value = "" if discounted is None else f"{discounted:.2f}"
        lines.append(f"| original: {name} | {100 * completed:.1f} % | {steps:.0f} | {value} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Completion against steps per lap; up and to the left is better."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        x = [seed["success_length_mean"] for seed in row["per_seed"]]
        y = [100 * seed["success_rate"] for seed in row["per_seed"]]
        default = (row["gamma"], row["failure_reward"]) == (
            DEFAULT.config["gamma"],
            DEFAULT.train_params["failure_reward"],
        )
        colour = "tab:red" if default else "tab:blue"
        axes.scatter(x, y, s=14, color=colour, alpha=0.5, zorder=3)
        point = (float(np.median(x)), float(np.median(y)))
        axes.scatter(*point, s=60, color=colour, zorder=4)
        label = f"$\\gamma$ {row['gamma']:g}, crash {row['failure_reward']:g}"
        axes.annotate(
            label,
            point,
            xytext=(0, 8),
            textcoords="offset points",
            fontsize=8,
            rotation=70,  # the dots lie close together
            rotation_mode="anchor",
        )
    for name, (completed, steps, _) in PUBLISHED.items():
        axes.scatter(steps, 100 * completed, s=40, marker="s", color="0.5")
        axes.annotate(
            name,
            (steps, 100 * completed),
            xytext=(6, -10),
            textcoords="offset points",
            fontsize=8,
            color="0.4",
        )
    axes.axhline(95, color="0.8", lw=1, zorder=0)
    axes.axvline(480, color="0.8", lw=1, zorder=0)
    axes.set_xlabel("steps per completed lap")
    axes.set_ylabel("laps completed [%]")
    axes.set_ylim(35, 122)
    axes.set_yticks(range(40, 101, 10))
    axes.set_title(
        "MicroRacer, all difficulties on: PPO here (dots), the original's agents (squares)"
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
