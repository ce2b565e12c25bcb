"""jaxrl: reinforcement learning environments and learners that compile into one JAX program."""

__version__ = "0.1.0"

from jaxrl.policy import load_policy as load_policy
