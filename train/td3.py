"""Train TD3: `python -m train.td3 --env Pendulum-v1 --num-seeds 4`.

Everything lands in runs/<name>/, see `train._run`; the tuned settings are in `train._presets`.
"""

import sys
from collections.abc import Sequence

from jaxrl.agents import td3
from train import _run


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    return _run.main(td3, argv)


if __name__ == "__main__":
    sys.exit(main())
