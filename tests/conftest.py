"""Strict JAX for every test, and where the recordings of the original systems lie."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

DEFAULT_REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


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
