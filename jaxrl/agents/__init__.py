"""The learners, one file each: `Config`, `make_train`, `get_policy`, `make_act`."""

NAMES = ("ppo", "reinforce", "dqn", "q_learning")
