"""A flag for XLA that keeps compiled training programs from hanging on CPU."""

import importlib.metadata
import os
import warnings

import jax

_FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"


def avoid_cpu_deadlock() -> None:
    """Append to XLA_FLAGS what jax 0.10 needs to finish vmapped training programs on CPU.

    Its CPU backend runs independent parts of a program at once, and parts that wait for each other
    can fill all threads: the program then waits for ever, without using a core (seen with 4 seeds
    of PPO on two CPU devices; another library's programs hang on one). With the flag they run in
    order. A value that the user has set is left alone; other versions of jax are too, because XLA
    aborts on a flag that it does not know.

    Warns:
        RuntimeWarning: JAX has been used before on this CPU (importing gymnax is enough), so that
            XLA has read its flags already.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG in flags or not importlib.metadata.version("jaxlib").startswith("0.10."):
        return
    os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=false".strip()
    if _jax_is_in_use() and jax.default_backend() == "cpu":
        warnings.warn(
            "jaxrl was imported after JAX had been used (importing gymnax is enough): with jax "
            "0.10 training programs can hang on CPU. Import jaxrl first, or set the environment "
            f"variable XLA_FLAGS=--{_FLAG}=false",
            RuntimeWarning,
            stacklevel=3,
        )


def _jax_is_in_use() -> bool:
    """Whether JAX has chosen its devices: then it refuses another number of them."""
    number = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_num_cpu_devices", 1 if number != 1 else 2)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", number)
    return False
