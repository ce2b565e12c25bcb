"""Whether two runs of a training script have left the same."""

import csv


def rows_of(path):
    """The rows of a metrics file, without the time."""
    with path.open(newline="") as file:
        return [{**row, "wall_s": ""} for row in csv.DictReader(file)]


def assert_same(a, b):
    """Metrics, evaluations and policies of two run folders are the same, bit for bit."""
    for name in ("metrics.csv", "evaluation_curve.csv"):
        rows = rows_of(a / name)
        assert rows
        assert rows == rows_of(b / name), name
    seeds = [path.name for path in (a / "policies").iterdir()]
    assert seeds
    for name in ("evaluation.csv", "policy.msgpack", *(f"policies/{seed}" for seed in seeds)):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
