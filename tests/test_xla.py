"""The flag against the CPU deadlock of jax 0.10: set on import, said where it comes too late."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"
pytestmark = pytest.mark.skipif(
    not importlib.metadata.version("jaxlib").startswith("0.10."), reason="only jax 0.10 needs it"
)


def run(code: str, flags: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if flags is not None:
        environment["XLA_FLAGS"] = flags
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )


SHOW = "import jaxrl, os; print(os.environ['XLA_FLAGS'])"


def test_importing_jaxrl_sets_the_flag_and_keeps_the_users():
    done = run(SHOW)
    assert done.stdout.strip() == f"--{FLAG}=false"
    assert "RuntimeWarning" not in done.stderr
    other = "--xla_force_host_platform_device_count=1"
    assert run(SHOW, flags=other).stdout.strip() == f"{other} --{FLAG}=false"


def test_a_value_set_by_the_user_stays():
    assert run(SHOW, flags=f"--{FLAG}=true").stdout.strip() == f"--{FLAG}=true"


def test_too_late_is_said():
    done = run("import jax.numpy as jnp; jnp.zeros(1); import jaxrl")
    assert "RuntimeWarning: jaxrl was imported after JAX had been used" in done.stderr
