"""Train Stable-Baselines3's PPO in Gymnasium's LunarLander-v3 and keep the policy's weights.

    python -m benchmarks.lunar_lander_sb3

Done once: `benchmarks/data/lunar_lander_sb3.npz` is what `benchmarks.lunar_lander_transfer` lets
fly here. The settings are those that RL Baselines3 Zoo tuned, for 0.6 of its million steps.
Stable-Baselines3 is installed into an environment of its own (network needed the first time; with
the torch of some indices it takes several GB) and knows nothing of our environment.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks._peers import install, process

WEIGHTS = Path(__file__).parent / "data" / "lunar_lander_sb3.npz"
ZOO = {  # rl-baselines3-zoo, hyperparams/ppo.yml, LunarLander-v3
    "n_steps": 1024,
    "batch_size": 64,
    "gae_lambda": 0.98,
    "gamma": 0.999,
    "n_epochs": 4,
    "ent_coef": 0.01,
}


@dataclass
class Options:
    """Command line."""

    out: Path = WEIGHTS
    """File of the weights; an existing one is not replaced."""
    seed: int = 0
    """Of the training."""
    total_steps: int = 600_000
    """Environment steps of the training."""
    peers: Path = install.CACHE
    """Folder for the environments of other libraries."""


def load(path: Path = WEIGHTS) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what is known of a trained network and its weights, {"w0": (inputs, outputs), ...}."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("about"))), arrays


def act(weights: dict[str, np.ndarray], obs: np.ndarray) -> np.ndarray:
    """The network's most likely actions (n,) for observations (n, 8); tanh between layers."""
    num_layers = len(weights) // 2
    for i in range(num_layers):
        obs = obs @ weights[f"w{i}"] + weights[f"b{i}"]
        obs = np.tanh(obs) if i < num_layers - 1 else obs
    return obs.argmax(-1).astype(np.int32)


def main(options: Options) -> None:
    """Install, train, write, tell.

    Raises:
        FileExistsError: the weights are there already.
        InstallError, RunError: it could not be installed, or the training failed.
    """
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists: give another --out")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": options.seed,
        "num_envs": 16,
        "total_steps": options.total_steps,
        "out": str(options.out.absolute()),
        "ppo": ZOO,
    }
    python = install.python("sb3", options.peers)
    result = process.run(python, "benchmarks._peers.run_sb3_lander", settings, 4 * 3600.0)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
