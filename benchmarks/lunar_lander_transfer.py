"""Do policies transfer between our LunarLander and Gymnasium's? Both ways, on paired episodes.

    python -m benchmarks.lunar_lander_transfer --json benchmarks/results/lunar_lander_transfer.json

From ours to Gymnasium: PPO (discrete and continuous) and DQN are trained here with their presets,
unless their run folders are in `--runs` already, and saved. The first seeds' policies are read back
from their files by `jaxrl.load_policy` and flown in Gymnasium as they are. From Gymnasium to ours:
the network that Stable-Baselines3 trained there (`benchmarks.lunar_lander_sb3`).

Each policy flies the same episodes in both: terrain, push and noise are those that Gymnasium draws
for a seed. The difference is therefore paired; +- is its standard error over the seeds, of the mean
over policies.
"""

import functools
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import jaxrl
from benchmarks import lunar_lander_sb3
from benchmarks.lunar_lander_parity import fly_ours, fly_theirs
from jaxrl.envs import LanderEnding
from jaxrl.policy import read_policy
from train._run import machine

TRAINED_HERE = {  # folder: agent, environment
    "ppo": ("ppo", "LunarLander-v3"),
    "dqn": ("dqn", "LunarLander-v3"),
    "ppo_continuous": ("ppo", "LunarLanderContinuous-v3"),
}

Flown = dict[str, np.ndarray]  # return, length, ending, each (num_policies, num_episodes)


@dataclass
class Options:
    """Command line."""

    runs: Path = Path("runs/lunar_lander_transfer")
    """Folder of the training runs; what is missing there is trained."""
    num_seeds: int = 8
    """Seeds to train, where training is needed."""
    num_policies: int = 4
    """Seeds whose policies fly, the first of each run."""
    num_episodes: int = 400
    """Paired episodes of each policy."""
    first_seed: int = 500_000
    """Of the episodes; the others follow."""
    json: Path | None = None
    """Where to write the numbers."""


def trained(name: str, options: Options) -> list[Path]:
    """The policy files of a run, one a seed, the first few; trains where there is none.

    Raises:
        RuntimeError: the training failed.
    """
    agent, env_id = TRAINED_HERE[name]
    if not (options.runs / name / "policy.msgpack").exists():
        script = importlib.import_module(f"train.{agent}")
        argv = ["--env", env_id, "--num-seeds", str(options.num_seeds), "--eval-episodes", "100"]
        argv += ["--runs-dir", str(options.runs), "--name", name, "--no-animate"]
        if script.main(argv):
            raise RuntimeError(f"training {name} failed")
    files = sorted((options.runs / name / "policies").glob("seed_*.msgpack"))
    return files[: options.num_policies]


def fly(
    acts: list[Callable[[np.ndarray], np.ndarray]], continuous: bool, seeds: np.ndarray
) -> tuple[Flown, Flown]:
    """Fly policies in Gymnasium and here, the same functions of NumPy arrays in both."""
    theirs = [fly_theirs(seeds, continuous, act) for act in acts]
    ours = [fly_ours(seeds, continuous, "exact", act) for act in acts]
    theirs, ours = ({k: np.stack([f[k] for f in all_]) for k in all_[0]} for all_ in (theirs, ours))
    return theirs, ours


def fly_saved(files: list[Path], seeds: np.ndarray) -> tuple[Flown, Flown]:
    """Fly saved policies of one agent."""
    continuous = read_policy(files[0]).env == "LunarLanderContinuous-v3"
    return fly([jaxrl.load_policy(file) for file in files], continuous, seeds)


def fly_sb3(seeds: np.ndarray) -> tuple[Flown, Flown]:
    """Fly the network that Stable-Baselines3 trained in Gymnasium."""
    _, weights = lunar_lander_sb3.load()
    return fly([functools.partial(lunar_lander_sb3.act, weights)], False, seeds)


def compare(theirs: Flown, ours: Flown) -> dict[str, Any]:
    """Means in both, the paired difference with its standard error, and every policy's own."""
    difference = ours["return"] - theirs["return"]
    root = np.sqrt(difference.shape[1])
    mean = {"gymnasium": theirs["return"].mean(), "ours": ours["return"].mean()}
    per_policy = np.stack([theirs["return"].mean(1), ours["return"].mean(1)])
    off = (per_policy[1] - per_policy[0]) / np.abs(per_policy[0])
    return {
        "num_policies": len(difference),
        "num_episodes": difference.shape[1],
        **{f"return_{where}": float(value) for where, value in mean.items()},
        "difference": float(difference.mean()),
        "standard_error": float(difference.mean(0).std() / root),
        "relative_difference": float((mean["ours"] - mean["gymnasium"]) / abs(mean["gymnasium"])),
        "greatest_relative_difference": float(np.abs(off).max()),
        "landed_gymnasium": float((theirs["ending"] == LanderEnding.LANDED).mean()),
        "landed_ours": float((ours["ending"] == LanderEnding.LANDED).mean()),
        "length_gymnasium": float(theirs["length"].mean()),
        "length_ours": float(ours["length"].mean()),
        "same_outcome": float((theirs["ending"] == ours["ending"]).mean()),
        "per_policy": [
            {"return_gymnasium": float(a), "return_ours": float(b)} for a, b in per_policy.T
        ],
    }


def main(options: Options) -> dict[str, Any]:
    """Train what is missing, fly, print a Markdown table, write JSON if asked."""
    seeds = np.arange(options.first_seed, options.first_seed + options.num_episodes)
    flights: dict[str, Callable[[], tuple[Flown, Flown]]] = {
        f"{name}, trained here": lambda name=name: fly_saved(trained(name, options), seeds)
        for name in TRAINED_HERE
    }
    flights["Stable-Baselines3's ppo, trained in Gymnasium"] = lambda: fly_sb3(seeds)
    results = {}
    print("| policy | return, Gymnasium / ours | difference | relative | landed | same outcome |")
    print("|---|---|---|---|---|---|")
    for name, fly in flights.items():
        began = time.perf_counter()
        row = compare(*fly())
        row["seconds"] = round(time.perf_counter() - began, 1)
        results[name] = row
        print(
            f"| {name} ({row['num_policies']}) "
            f"| {row['return_gymnasium']:.1f} / {row['return_ours']:.1f} "
            f"| {row['difference']:+.1f} +- {row['standard_error']:.1f} "
            f"| {row['relative_difference']:+.1%}, at most "
            f"{row['greatest_relative_difference']:.1%} of one policy "
            f"| {row['landed_gymnasium']:.3f} / {row['landed_ours']:.3f} "
            f"| {row['same_outcome']:.3f} |",
            flush=True,
        )
    if options.json:
        result = {
            "machine": machine(),
            "first_seed": options.first_seed,
            "stable_baselines3": lunar_lander_sb3.load()[0],
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
