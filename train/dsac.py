"""Train DSAC: `python -m train.dsac --env Pendulum-v1 --num-seeds 4`.

Everything lands in runs/<name>/, see `train._run`; the tuned settings are in `train._presets`.
"""

import sys
from collections.abc import Sequence

from jaxrl.agents import dsac
from train import _run


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    return _run.main(dsac, argv)


if __name__ == "__main__":
    sys.exit(main())
