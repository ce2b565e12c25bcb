"""Where metrics go: a sink is a function that takes a `Chunk`; its context manager closes it.

Sinks run on the host, between compiled chunks of a run: nothing here is called from inside `jit`.
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """The metrics of some consecutive updates of all seeds."""

    seeds: tuple[int, ...]
    first_update: int  # updates before this chunk
    steps_per_update: int  # environment steps of one seed
    wall_s: float  # since the run began, when the chunk was read
    metrics: dict[str, np.ndarray]  # each (num_seeds, num_updates in the chunk)

    @property
    def num_updates(self) -> int:
        """Updates in the chunk."""
        return next(iter(self.metrics.values())).shape[1]

    @property
    def last_update(self) -> int:
        """Updates done at the end of the chunk, counted from 1."""
        return self.first_update + self.num_updates


Sink = Callable[[Chunk], None]

EPISODE_METRICS = ("episode_return", "episode_length", "success_rate")
"""Means over the episodes that ended in an update: NaN, meaning "none did", is not an error."""


def episode_mean(metrics: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Mean of an episode metric over a chunk, each *episode* counted once.

    (num_seeds, n) -> (num_seeds,); NaN for a seed with no ended episode.
    """
    count = metrics["num_episodes"]
    total = np.where(count > 0, metrics[name] * count, 0.0).sum(axis=1)
    num_episodes = count.sum(axis=1)
    return np.where(num_episodes > 0, total / np.maximum(num_episodes, 1), np.nan)


def find_non_finite(chunk: Chunk) -> tuple[int, int, str] | None:
    """Return (seed, update counted from 1, metric) of the first NaN or infinity, or None."""
    count = chunk.metrics.get("num_episodes")
    first = None
    for name, values in chunk.metrics.items():
        bad = ~np.isfinite(values)
        if name in EPISODE_METRICS and count is not None:
            bad &= count > 0
        for lane, update in np.argwhere(bad)[:, :2]:
            if first is None or update < first[0]:
                first = (int(update), int(lane), name)
    if first is None:
        return None
    update, lane, name = first
    return chunk.seeds[lane], chunk.first_update + update + 1, name


@contextmanager
def csv_sink(path: Path, append: bool = False) -> Iterator[Sink]:
    """Write one row for each update and seed to a new file; an empty cell is "no episode ended".

    Columns: seed, update (counted from 1), env_steps (of that seed so far), wall_s (when the row
    was written), then the metrics. What is written is flushed after each chunk. With `append` the
    file may be there, and goes on.
    """
    with path.open("a" if append else "x", newline="") as file:
        writer = csv.writer(file)

        def write(chunk: Chunk) -> None:
            if file.tell() == 0:
                writer.writerow(["seed", "update", "env_steps", "wall_s", *chunk.metrics])
            columns = [np.asarray(v, np.float64) for v in chunk.metrics.values()]
            for i in range(chunk.num_updates):
                update = chunk.first_update + i + 1
                head = [update, update * chunk.steps_per_update, f"{chunk.wall_s:.3f}"]
                for lane, seed in enumerate(chunk.seeds):
                    writer.writerow([seed, *head, *(_cell(v[lane, i]) for v in columns)])
            file.flush()

        yield write


def _cell(value: float) -> str:
    """Nine digits: a float32 comes back as it was."""
    return "" if math.isnan(value) else f"{value:.9g}"


def read_csv(
    path: Path, seeds: tuple[int, ...], steps_per_update: int, sizes: Iterable[int]
) -> list[Chunk]:
    """Read what `csv_sink` wrote, cut into chunks of `sizes` rows a seed.

    Raises:
        ValueError: these are not its rows.
    """
    with path.open(newline="") as file:
        rows = csv.reader(file)
        names = next(rows, [])[4:]
        table = [[float(cell) if cell else math.nan for cell in row] for row in rows]
    values = np.array(table, np.float64).reshape(-1, len(seeds), 4 + len(names))  # [row, seed]
    chunks, first = [], 0
    for size in sizes:
        part = values[first : first + size]
        updates = part[:, 0, 1]
        if len(part) < size or (part[:, :, 0] != np.array(seeds)).any():
            raise ValueError(f"{path} has not {first + size} rows for each of the seeds {seeds}")
        metrics = {n: part[:, :, 4 + i].T.astype(np.float32) for i, n in enumerate(names)}
        before = int(updates[0]) - 1
        chunks.append(Chunk(seeds, before, steps_per_update, float(part[-1, 0, 3]), metrics))
        first += size
    return chunks


@contextmanager
def tensorboard_sink(folder: Path, wall_s: float = 0.0) -> Iterator[Sink]:
    """Write one point, a mean, for each chunk, metric and seed; every seed is a TensorBoard run.

    A point's time is that of its chunk, in a run that began `wall_s` seconds ago.
    """
    from tensorboardX import SummaryWriter  # an extra: the library itself does without

    began = time.time() - wall_s
    with ExitStack() as stack:
        writers: dict[int, SummaryWriter] = {}

        def write(chunk: Chunk) -> None:
            for seed in chunk.seeds:
                if seed not in writers:
                    writers[seed] = stack.enter_context(SummaryWriter(str(folder / f"seed_{seed}")))
            env_steps = chunk.last_update * chunk.steps_per_update
            for name, values in chunk.metrics.items():
                mean = (
                    episode_mean(chunk.metrics, name)
                    if name in EPISODE_METRICS and "num_episodes" in chunk.metrics
                    else values.mean(axis=1)
                )
                for seed, value in zip(chunk.seeds, mean, strict=True):
                    if math.isfinite(value):
                        writers[seed].add_scalar(
                            name, float(value), env_steps, walltime=began + chunk.wall_s
                        )

        yield write
