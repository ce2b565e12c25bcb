"""jaxrl: reinforcement learning environments and learners that compile into one JAX program.

Import it before the first JAX array is made: on jax 0.10 it sets a flag, see `jaxrl._xla`.
"""

__version__ = "0.1.0"

from jaxrl._xla import avoid_cpu_deadlock as _avoid_cpu_deadlock

_avoid_cpu_deadlock()

from jaxrl.policy import load_policy as load_policy  # noqa: E402  (the flag comes first)
