"""Sinks write every number once, and tell NaN "nothing ended" from NaN "diverged"."""

import csv

import numpy as np
import pytest

from jaxrl import sinks
from jaxrl.sinks import Chunk


def chunk(first_update=0, **metrics):
    metrics = {name: np.asarray(value, np.float32) for name, value in metrics.items()}
    return Chunk((7, 8), first_update, 100, 1.5, metrics)


def test_episode_mean_counts_every_episode_once():
    metrics = chunk(
        num_episodes=[[1, 3], [0, 0]], episode_return=[[10, 2], [np.nan, np.nan]]
    ).metrics
    # seed 7: (1 * 10 + 3 * 2) / 4 = 4; seed 8: nothing ended
    assert sinks.episode_mean(metrics, "episode_return") == pytest.approx(
        [4.0, np.nan], nan_ok=True
    )


def test_csv_has_one_row_for_each_update_and_seed(tmp_path):
    with sinks.csv_sink(tmp_path / "m.csv") as sink:
        sink(chunk(0, loss=[[0.1, 0.2], [0.3, 0.4]], episode_return=[[1, np.nan], [2, 3]]))
        sink(chunk(2, loss=[[0.5], [0.6]], episode_return=[[4], [5]]))
    rows = list(csv.DictReader((tmp_path / "m.csv").read_text().splitlines()))
    assert [(int(r["update"]), int(r["seed"])) for r in rows] == [
        (u, s) for u in (1, 2, 3) for s in (7, 8)
    ]
    assert [int(r["env_steps"]) for r in rows] == [100, 100, 200, 200, 300, 300]
    losses = np.array([r["loss"] for r in rows], np.float32)
    assert (losses == np.array([0.1, 0.3, 0.2, 0.4, 0.5, 0.6], np.float32)).all()  # bit for bit
    assert [r["episode_return"] for r in rows] == ["1", "2", "", "3", "4", "5"]


def test_csv_never_writes_over_a_file(tmp_path):
    (tmp_path / "m.csv").write_text("mine")
    with pytest.raises(FileExistsError), sinks.csv_sink(tmp_path / "m.csv"):
        pass
    assert (tmp_path / "m.csv").read_text() == "mine"


def test_nothing_ended_is_not_divergence():
    good = chunk(num_episodes=[[0, 1], [0, 0]], episode_return=[[np.nan, 1], [np.nan, np.nan]])
    assert sinks.find_non_finite(good) is None


def test_divergence_is_found_where_it_began():
    bad = chunk(
        4,
        num_episodes=np.ones((2, 3)),
        value_loss=[[1, 1, np.nan], [1, np.inf, np.nan]],
        grad_norm=[[1, 1, 1], [1, 1, np.nan]],
    )
    assert sinks.find_non_finite(bad) == (8, 6, "value_loss")  # seed 8, the chunk's second update


def test_a_return_of_an_ended_episode_must_be_finite():
    bad = chunk(num_episodes=[[1], [1]], episode_return=[[1], [np.nan]])
    assert sinks.find_non_finite(bad) == (8, 1, "episode_return")
