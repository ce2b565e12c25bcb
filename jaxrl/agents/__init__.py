"""The learners, one file each: `Config`, `make_train`, `get_policy`, `make_act`."""

NAMES = ("ppo", "dqn", "q_learning")
