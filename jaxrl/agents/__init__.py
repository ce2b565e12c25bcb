"""The learners, one file each: `Config`, `make_train`, `get_policy`, `make_act`."""

NAMES = ("ppo", "reinforce", "dqn", "sac", "td3", "ddpg", "dsac", "q_learning")
