"""Settings found to work, by agent and environment; what is not named keeps its default."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Overrides of an agent's Config, arguments of the environment, its parameters in training."""

    config: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    train_params: dict[str, Any] = field(default_factory=dict)


LUNAR_LANDER_PPO = {
    "total_steps": 999_424,  # 244 updates
    "num_envs": 32,
    "num_steps": 128,
    "num_minibatches": 16,
    "learning_rate": 1e-3,
    "gamma": 0.999,  # an episode lasts 200 to 300 steps, and what counts comes at its end
    "gae_lambda": 0.98,
}
PPO = {
    "MicroRacer-v0": Preset(
        {
            "total_steps": 4_194_304,  # 512 updates
            "num_envs": 64,
            "num_steps": 128,
            "num_minibatches": 8,
            "learning_rate": 1e-3,
            "gamma": 0.9975,  # 0.99 buys speed with crashes: benchmarks/micro_racer_frontier.py
            "gae_lambda": 0.98,
            "activation": "relu",
        },
        train_params={"failure_reward": -20.0},  # likewise; the evaluation keeps the -3
    ),
    "CartPole-v1": Preset(
        {
            "total_steps": 499_712,  # 976 updates
            "num_envs": 4,
            "num_steps": 128,
            "learning_rate": 2.5e-4,
            "ent_coef": 0.01,
        }
    ),
    "Pendulum-v1": Preset(
        {
            "total_steps": 262_144,  # 128 updates
            "num_envs": 8,
            "num_steps": 256,
            "num_epochs": 10,
            "num_minibatches": 16,
            "learning_rate": 1e-3,
            "gamma": 0.95,
        }
    ),
    "LunarLander-v3": Preset(LUNAR_LANDER_PPO | {"ent_coef": 0.01}),
    # at rest both engines must be off for 25 steps on end: noise there, not everywhere, has to go;
    # nearer rewards count more, or some seeds hover: landing is as good a little later
    "LunarLanderContinuous-v3": Preset(
        LUNAR_LANDER_PPO | {"gamma": 0.995, "state_dependent_std": True, "initial_log_std": -0.5}
    ),
}

Q_LEARNING = {
    "MarsRover-v0": Preset({"total_steps": 40_000, "gamma": 0.9}),  # 100 updates
    "FrozenLake-misc": Preset(
        {
            "total_steps": 1_024_000,  # 320 updates
            "num_envs": 64,
            "learning_rate_power": 0.6,  # the goal is found late: the beginning must be forgotten
            "epsilon_end": 0.3,  # less leaves entries unlearnt; Q-learning is off-policy
        }
    ),
}

REINFORCE = {
    "CartPole-v1": Preset(
        {
            "total_steps": 51_200,  # 100 updates; rollouts simulate about 2 million steps more
            "num_envs": 16,
            "num_steps": 32,
            "num_states": 128,
            "num_rollouts": 2,
            "max_rollout_steps": 100,
            "max_grad_norm": 0.1,
        }
    ),
    "MarsRover-v0": Preset(
        {
            "total_steps": 51_200,  # 200 updates
            "num_envs": 16,
            "num_steps": 16,
            "num_states": 128,
            "num_rollouts": 2,
            "gamma": 0.9,
            "hidden": (32,),
        },
        env_kwargs={"start": "uniform"},  # every state is to be visited
    ),
}

DQN = {
    # all transitions are kept: a policy at 500 fills a smaller replay with its own successes and
    # forgets how to come back; with the last 50,000 and three steps one seed in twenty ends there
    "CartPole-v1": Preset(
        {
            "total_steps": 300_000,  # 300 updates
            "num_envs": 8,
            "num_steps": 125,
            "batch_size": 128,
            "buffer_size": 300_000,
            "learning_starts": 2_000,
            "learning_rate": 1e-3,
            "anneal_learning_rate": True,
            "epsilon_fraction": 0.3,
            "tau": 0.05,
            "dueling": True,
            "n_step": 10,
            "adam_eps": 1e-4,
        }
    ),
    "LunarLander-v3": Preset(
        {
            "total_steps": 500_000,  # 250 updates
            "num_envs": 16,
            "num_steps": 125,
            "num_gradient_steps": 3,
            "batch_size": 128,
            "buffer_size": 100_000,
            "learning_starts": 5_000,
            "learning_rate": 1e-3,
            "anneal_learning_rate": True,
            "epsilon_fraction": 0.2,
            "epsilon_end": 0.02,
            "tau": 0.01,
            "n_step": 3,
        }
    ),
}

# of SAC, TD3, DDPG and DSAC alike: at 30,000 steps all four reach about -148 on Pendulum
OFF_POLICY = {
    "Pendulum-v1": Preset(
        {
            "total_steps": 30_000,  # 30 updates
            "num_envs": 4,
            "num_steps": 250,
            "num_gradient_steps": 1,
            "batch_size": 128,
            "buffer_size": 30_000,
            "learning_rate": 2e-3,
            "gamma": 0.98,
            "tau": 0.02,
        }
    ),
}

# of SAC, TD3 and DDPG. What matters is 10 steps of rewards: with 3 or 5 most seeds of TD3 hover to
# the end and see no landing. The discount: sinking costs at once, by its velocity, what the way
# down gives back in 44 steps, so 0.98 and less keep it hovering; at 0.999 more seeds fail
LANDER_REPLAY = {
    "total_steps": 300_000,  # 150 updates
    "num_envs": 16,
    "num_steps": 125,
    "num_gradient_steps": 8,
    "batch_size": 64,
    "buffer_size": 300_000,
    "learning_starts": 8_000,
    "learning_rate": 1e-3,
    "anneal_learning_rate": True,
    "gamma": 0.9975,
    "tau": 0.02,
    "n_step": 10,
}

# of SAC, TD3, DDPG and DSAC alike. Two seeds of TD3 complete 78 to 92 % with the original's five
# numbers, 33 to 94 % with all rays, 95 to 98 % with all rays normalised, as the smallest readings
# decide. The car costs next to nothing beside the learner: 16 of its steps for a gradient step
RACER_REPLAY = {
    "total_steps": 640_000,  # 40 updates
    "num_envs": 128,
    "num_steps": 125,
    "num_gradient_steps": 8,
    "batch_size": 128,
    "buffer_size": 256_000,
    "learning_starts": 16_000,
    "learning_rate": 1e-3,
    "anneal_learning_rate": True,
    "tau": 0.01,
    "n_step": 3,
    "normalize_obs": True,
}
RACER_LIDAR = {"observation": "lidar"}
# a car that crawls can weave at no risk, and whole seeds stay there, to the time limit: in training
# the law asks for a lap of 1,100 steps. One that holds a speed of 0.2 completes 97 % of tracks
NO_CRAWLING = {"min_speed": 0.15, "initial_speed_min": 0.17}

# benchmarks/micro_racer_leaderboard.py, at the original's budget: a gradient step for each step of
# the environment, and little time to forget a crash
REPLAY_50K = {
    "total_steps": 50_000,
    "num_envs": 8,
    "num_steps": 125,
    "num_gradient_steps": 8,
    "batch_size": 128,
    "buffer_size": 50_000,
    "learning_starts": 1_000,
    "learning_rate": 5e-4,
    "anneal_learning_rate": True,
    "tau": 0.01,
}
CRASH_50K = {"failure_reward": -10.0}
LIDAR_50K = {**REPLAY_50K, "n_step": 3, "normalize_obs": True}
MICRO_RACER_50K: dict[str, Preset] = {
    # half a gradient step: with a whole one policies get worse again from the 20,000th step on
    # (92 to 85 % of laps, eight seeds), with a quarter two seeds of eight race and crash; so does
    # one of five with 8 cars and batches of 256
    "ddpg": Preset(
        {
            **LIDAR_50K,
            "num_envs": 40,
            "num_steps": 50,  # 25 updates
            "num_gradient_steps": 20,
            "batch_size": 512,
            "exploration_noise": 0.35,
        },
        RACER_LIDAR,
        {"failure_reward": -8.0, **NO_CRAWLING},
    ),
    "ddpg_parameter_noise": Preset(
        {**REPLAY_50K, "noise": "parameter", "layer_norm": True}, train_params=CRASH_50K
    ),
    "ppo": Preset(
        {
            "total_steps": 50_000,  # 25 updates
            "num_envs": 40,
            "num_steps": 50,
            "num_epochs": 10,
            "num_minibatches": 10,
            "learning_rate": 1e-3,
            "activation": "relu",
        },
        RACER_LIDAR,
        {"failure_reward": -6.0, **NO_CRAWLING},
    ),
    # with a noise of 0.1 a seed in four learns to race and crash
    "td3": Preset(
        {**LIDAR_50K, "gamma": 0.98, "exploration_noise": 0.35},
        RACER_LIDAR,
        {"failure_reward": -4.0, **NO_CRAWLING},
    ),
    "dsac": Preset({**REPLAY_50K, "initial_alpha": 0.02, "min_std": 0.3}, train_params=CRASH_50K),
    "sac": Preset({**REPLAY_50K, "initial_alpha": 0.02}, train_params=CRASH_50K),
}
# at the peak: the defaults of the scripts, but for PPO
MICRO_RACER_PEAK: dict[str, Preset] = {
    # between a noise of 0.1 with a crash of 6, fast, and 0.3 with 8, 96 % in 665 steps
    "ddpg": Preset(
        {**RACER_REPLAY, "exploration_noise": 0.15},
        RACER_LIDAR,
        {"failure_reward": -7.0, **NO_CRAWLING},
    ),
    "ddpg_parameter_noise": Preset(
        {**RACER_REPLAY, "noise": "parameter", "layer_norm": True},
        RACER_LIDAR,
        {"failure_reward": -10.0, **NO_CRAWLING},
    ),
    # by the original's five numbers, as the script's default drives, 95 to 96 % in 609 to 625
    "ppo": Preset(
        {**PPO["MicroRacer-v0"].config, "gamma": 0.99},
        RACER_LIDAR,
        {"failure_reward": -16.0, **NO_CRAWLING},
    ),
    "td3": Preset(RACER_REPLAY, RACER_LIDAR, {"failure_reward": -10.0, **NO_CRAWLING}),
    # a single critic: at 0.985 and less it races and crashes
    "dsac": Preset(
        {**RACER_REPLAY, "initial_alpha": 0.02, "min_std": 0.3},
        RACER_LIDAR,
        {"failure_reward": -8.0, **NO_CRAWLING},
    ),
    # at 0.99 with a crash at 10 careful, 98 % in 650 steps
    "sac": Preset(
        {**RACER_REPLAY, "initial_alpha": 0.02, "gamma": 0.98},
        RACER_LIDAR,
        {"failure_reward": -5.0},
    ),
}
# the fastest, paid for lap time, with the whole lidar: a step further than 0.985, 8 and 0.006,
# which completes 97.3 % in 507 steps; nearer horizons with dearer crashes, 0.97 and 0.98 with 12 to
# 16, 96 % in 515 to 523 (one agent each). Half the steps, 64 cars and one deviation for all that is
# seen: 95.4 % in 512. A larger bank is no use: unseen tracks are completed as often as its own
MICRO_RACER_RACE: tuple[str, Preset] = (
    "ppo",
    Preset(
        {
            "total_steps": 8_388_608,  # 256 updates
            "num_envs": 256,
            "num_steps": 128,
            "num_minibatches": 16,
            "learning_rate": 1e-3,
            "gamma": 0.985,
            "gae_lambda": 0.98,
            "activation": "relu",
            "state_dependent_std": True,
        },
        RACER_LIDAR,
        {"failure_reward": -6.0, "time_cost": 0.007, **NO_CRAWLING},
    ),
)

PRESETS: dict[str, dict[str, Preset]] = {
    "ppo": PPO,
    "reinforce": REINFORCE,
    "dqn": DQN,
    "sac": {
        **OFF_POLICY,
        # at a temperature of 1 to begin with, a seed of eight hovered to the end; likewise at a
        # discount of 0.995, with which most land sooner. Twice the others' gradient steps: sooner
        # and more alike. Ten steps of rewards are those of the policy that took them: without the
        # oldest transitions 276 instead of 271; with the last 200,000 seven seeds reach 282 and one
        # hovers, with 100,000 some crash
        "LunarLanderContinuous-v3": Preset(
            {
                **LANDER_REPLAY,
                "total_steps": 500_000,  # 250 updates
                "num_gradient_steps": 16,
                "initial_alpha": 0.1,
            }
        ),
        "MicroRacer-v0": MICRO_RACER_PEAK["sac"],
    },
    "td3": {
        **OFF_POLICY,
        "LunarLanderContinuous-v3": Preset(LANDER_REPLAY),
        "MicroRacer-v0": MICRO_RACER_PEAK["td3"],
    },
    "ddpg": {
        **OFF_POLICY,
        "LunarLanderContinuous-v3": Preset(LANDER_REPLAY),
        "MicroRacer-v0": MICRO_RACER_PEAK["ddpg"],
    },
    "dsac": {**OFF_POLICY, "MicroRacer-v0": MICRO_RACER_PEAK["dsac"]},
    "q_learning": Q_LEARNING,
}
DEFAULT_ENVS = {
    "dqn": "CartPole-v1",
    "q_learning": "MarsRover-v0",
}  # of the agents that cannot take the scripts' own


def find(agent: str, env_id: str) -> Preset:
    """The preset of an agent on an environment; an empty one where there is none."""
    return PRESETS.get(agent, {}).get(env_id, Preset())
