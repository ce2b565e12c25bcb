"""Strict JAX for every test, and where the recordings of the original systems lie."""

from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

DEFAULT_REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


# The same examples in every run, so that CI does not flake; `--hypothesis-profile random` looks for
# others. A step of an environment may have to be compiled first: no deadline.
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile(
    "few", max_examples=6, derandomize=True, phases=[Phase.explicit, Phase.generate], **COMMON
)  # of a failure the first example; to shrink it takes minutes: `--hypothesis-profile many` does
settings.register_profile("many", max_examples=200, derandomize=True, **COMMON)
settings.register_profile("random", max_examples=200, print_blob=True, **COMMON)


def pytest_configure(config):
    if not config.getoption("--hypothesis-profile"):
        without_slow = config.getoption("markexpr") == "not slow"
        settings.load_profile("few" if without_slow else "many")


def pytest_addoption(parser):
    parser.addoption(
        "--reference",
        type=Path,
        default=DEFAULT_REFERENCE,
        help="folder with the recordings of the original systems (micro_racer.npz, ...)",
    )


@pytest.fixture(scope="session")
def reference_dir(request) -> Path:
    """The folder of recordings; tests that need it skip where it is absent."""
    folder = request.config.getoption("--reference")
    if not folder.is_dir():
        pytest.skip(f"no recordings of the original systems at {folder} (give --reference DIR)")
    return folder
