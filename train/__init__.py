"""Scripts that train, evaluate and show agents: `python -m train.ppo --help`."""
