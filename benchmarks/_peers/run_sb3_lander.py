"""Stable-Baselines3's side of `benchmarks.lunar_lander_sb3`, in its environment.

    python -m benchmarks._peers.run_sb3_lander \
        '{"seed": 0, "num_envs": 16, "total_steps": 1000000, "out": FILE, "ppo": {...}}'

Trains PPO in Gymnasium's LunarLander-v3, writes the policy network's weights and how it scored in
100 further episodes there to `out`, and prints JSON: versions, score, seconds.
"""

# pyright: reportMissingImports=false

import json
import sys
import time

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv


def main(settings: dict) -> dict:
    """Train, evaluate, write."""
    torch.set_num_threads(1)  # a small network: more threads only wait for each other
    began = time.perf_counter()
    env = make_vec_env(
        "LunarLander-v3",
        settings["num_envs"],
        seed=settings["seed"],
        env_kwargs={"render_mode": None},  # the default makes particles for pictures: slow
        vec_env_cls=DummyVecEnv,
    )
    agent = PPO("MlpPolicy", env, seed=settings["seed"], device="cpu", **settings["ppo"])
    agent.learn(settings["total_steps"])
    train_s = time.perf_counter() - began
    fresh = make_vec_env("LunarLander-v3", 8, seed=1_000_000, env_kwargs={"render_mode": None})
    returns, _ = evaluate_policy(agent, fresh, 100, return_episode_rewards=True)
    layers = [m for m in agent.policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    layers.append(agent.policy.action_net)
    arrays = {}
    for i, layer in enumerate(layers):
        arrays[f"w{i}"] = layer.weight.detach().numpy().T.copy()  # (inputs, outputs)
        arrays[f"b{i}"] = layer.bias.detach().numpy()
    result = {
        "stable_baselines3": stable_baselines3.__version__,
        "gymnasium": gymnasium.__version__,
        "torch": torch.__version__,
        "total_steps": agent.num_timesteps,
        "train_s": round(train_s, 1),
        "return_mean_100": float(np.mean(returns)),
        "activation": type(agent.policy.mlp_extractor.policy_net[1]).__name__.lower(),
        **{key: settings[key] for key in ("seed", "num_envs", "ppo")},
    }
    np.savez_compressed(settings["out"], about=json.dumps(result), **arrays)
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
