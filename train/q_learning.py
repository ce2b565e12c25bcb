"""Train tabular Q-learning or SARSA: `python -m train.q_learning --env MarsRover-v0`.

Everything lands in runs/<name>/, see `train._run`; the tuned settings are in `train._presets`.
"""

import sys
from collections.abc import Sequence

from jaxrl.agents import q_learning
from train import _run


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    return _run.main(q_learning, argv)


if __name__ == "__main__":
    sys.exit(main())
