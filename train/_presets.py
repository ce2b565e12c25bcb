"""Settings found to work, by agent and environment; what is not named keeps its default."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Overrides of an agent's Config, arguments of the environment, its parameters in training."""

    config: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    train_params: dict[str, Any] = field(default_factory=dict)


PPO = {
    "MicroRacer-v0": Preset(
        {
            "total_steps": 4_000_000,
            "num_envs": 128,
            "num_steps": 128,
            "learning_rate": 1e-3,
            "gamma": 0.99,
        }
    ),
    "CartPole-v1": Preset(
        {
            "total_steps": 507_904,  # 248 updates
            "num_envs": 16,
            "num_steps": 128,
            "learning_rate": 2.5e-3,
        }
    ),
    "Pendulum-v1": Preset(
        {
            "total_steps": 1_015_808,  # 248 updates
            "num_envs": 32,
            "num_steps": 128,
            "num_epochs": 10,
            "learning_rate": 1e-3,
            "gamma": 0.95,
        }
    ),
}

PRESETS: dict[str, dict[str, Preset]] = {"ppo": PPO}


def find(agent: str, env_id: str) -> Preset:
    """The preset of an agent on an environment; an empty one where there is none."""
    return PRESETS.get(agent, {}).get(env_id, Preset())
