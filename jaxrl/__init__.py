"""jaxrl: reinforcement learning environments and learners that compile into one JAX program."""

__version__ = "0.1.0"
