"""Train REINFORCE with Monte-Carlo rollouts: `python -m train.reinforce --env CartPole-v1`.

Everything lands in runs/<name>/, see `train._run`; the tuned settings are in `train._presets`.
"""

import sys
from collections.abc import Sequence

from jaxrl.agents import reinforce
from train import _run


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    return _run.main(reinforce, argv)


if __name__ == "__main__":
    sys.exit(main())
