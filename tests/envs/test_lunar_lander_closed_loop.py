"""LunarLander beside Gymnasium itself: the same seeds, the same controller, each its own physics.

`python -m benchmarks.lunar_lander_parity` does the same with more seeds.
"""

import numpy as np
import pytest

from jaxrl.envs import LanderEnding

pytest.importorskip("Box2D", reason="Box2D is not installed (pip install gymnasium[box2d])")
from benchmarks.lunar_lander_parity import compare, fly_ours, fly_theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of pygame and of SWIG
@pytest.mark.parametrize("continuous", [False, True])
def test_landings_are_gymnasiums(continuous):
    seeds = np.arange(10_000, 10_100)
    theirs = fly_theirs(seeds, continuous)
    ours = fly_ours(seeds, continuous, "exact")
    row = compare(theirs, ours)
    assert np.mean(theirs["ending"] == LanderEnding.LANDED) > 0.85
    assert row["same_outcome"] >= (0.99 if continuous else 0.94), row
    if continuous:
        assert abs(row["return_difference"]) <= 1.0, row
        assert row["same_length"] >= 0.9, row
    else:
        assert abs(row["landed_difference"]) <= 0.06, row  # 2 points of 1,000 seeds
        assert abs(row["return_difference"]) <= 16.0, row
