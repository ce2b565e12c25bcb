"""The learners, one file each. Every module has `Config`, `make_train`, `get_policy`, `make_act`."""

NAMES = ("ppo",)
