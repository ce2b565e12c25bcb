"""Stable-Baselines3 or SBX trains in Gymnasium: `python -m benchmarks._peers.run_sb3 JSON`.

A run may stop before its end (`stop_at`): the rest is then extrapolated by the pace of the second
half of what was run, and the agent is not evaluated. Of PPO both halves must be whole rollouts, or
the learning between them is missed. One thread: a small network is faster so.
"""

# pyright: reportMissingImports=false

import json
import sys
import time
from typing import Any

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from benchmarks._peers import measure


class Clock(BaseCallback):
    """Notes when which step was done; stops at a step."""

    def __init__(self, first: int, last: int):
        super().__init__()
        self.first, self.last = first, last
        self.at: dict[int, tuple[float, float]] = {}  # step -> seconds, CPU seconds

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.first and not self.at:
            self.at[self.num_timesteps] = time.perf_counter(), time.process_time()
        if self.num_timesteps < self.last:
            return True
        self.at[self.num_timesteps] = time.perf_counter(), time.process_time()
        return False


def make_agent(settings: dict[str, Any], env: Any) -> Any:
    """Build the agent that `settings` name: library, algorithm, hidden, activation, kwargs."""
    widths = settings["hidden"]
    if settings["library"] == "sbx":
        import flax.linen as nn
        import sbx as library

        act: Any = getattr(nn, settings["activation"])
    else:
        library: Any = stable_baselines3
        act = {"tanh": torch.nn.Tanh, "silu": torch.nn.SiLU, "relu": torch.nn.ReLU}[
            settings["activation"]
        ]
    q_only = settings["algorithm"] == "DQN"
    actor_critic = {"pi": widths, "vf": widths, "qf": widths}
    if settings["algorithm"] == "PPO":
        del actor_critic["qf"]
    else:
        del actor_critic["vf"]
    policy: dict[str, Any] = {
        "net_arch": widths if q_only else actor_critic,
        "activation_fn": act,
    }
    kwargs = dict(settings["kwargs"])
    if settings["library"] == "sb3":
        kwargs["device"] = "cpu"
    return getattr(library, settings["algorithm"])(
        "MlpPolicy", env, seed=settings["first_seed"], policy_kwargs=policy, **kwargs
    )


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train, and evaluate (20 episodes, actions drawn; DQN's best) if the run is whole."""
    torch.set_num_threads(1)

    def make(num_envs: int, seed: int) -> Any:
        return make_vec_env(settings["env"], num_envs, seed=seed, vec_env_cls=DummyVecEnv)

    env = make(settings["num_envs"], settings["first_seed"])
    if settings["normalize_obs"]:
        rewards = settings.get("normalize_reward", False)
        gamma = settings["kwargs"].get("gamma", 0.99)
        env = VecNormalize(env, norm_obs=True, norm_reward=rewards, gamma=gamma)
    agent, making_s, _ = measure.timed(lambda: make_agent(settings, env))
    total = settings["total_steps"]
    stop_at = min(settings.get("stop_at") or total, total)
    clock = Clock(stop_at // 2, stop_at)
    _, seconds, cpu = measure.timed(lambda: agent.learn(total, callback=clock))
    done = agent.num_timesteps
    if stop_at < total:
        (first, begin), (last, end) = clock.at.items()
        left = (total - done) / (last - first)
        seconds += left * (end[0] - begin[0])
        cpu += left * (end[1] - begin[1])
    peak = measure.peak_mb()
    returns = []
    if stop_at >= total:
        fresh = make(4, 1_000_000 + settings["first_seed"])
        if settings["normalize_obs"]:
            fresh = VecNormalize(fresh, training=False, norm_obs=True, norm_reward=False)
            fresh.obs_rms = env.obs_rms
        best = settings["algorithm"] == "DQN"
        returns = [float(np.mean(evaluate_policy(agent, fresh, 20, deterministic=best)[0]))]
    packages = ["stable-baselines3", "gymnasium", "torch"]
    packages += ["sbx-rl", "jax"] if settings["library"] == "sbx" else []
    return {
        "making_s": making_s,  # the agent's networks; compiling, in SBX, is within the run
        "run_s": [seconds],
        "run_cpu_s": [cpu],
        "steps_run": done,
        "returns": [returns],
        "peak_mb": peak,
        "versions": measure.versions(*packages),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
