"""How far a run is: a live bar in a terminal, else a line every ten seconds."""

import math
import time
from typing import Self

import numpy as np
import rich.progress
from rich.console import Console

from jaxrl.sinks import Chunk, episode_mean


class Progress:
    """A sink that shows steps per second, mean return, completion rate and the time left.

    It draws when a chunk arrives and has no thread of its own: meanwhile the next chunk runs.
    """

    def __init__(self, console: Console, num_updates: int):
        """Show `num_updates` updates on `console`."""
        self.console = console
        self.num_updates = num_updates
        self.every_s = 0.25 if console.is_terminal else 10.0
        self.last_shown = time.perf_counter()
        self.means: dict[str, float] = {}  # the last known, over seeds
        columns = (
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.percentage:3.0f} %  {task.description}"),
        )
        self.bar = rich.progress.Progress(
            *columns, console=console, auto_refresh=False, disable=not console.is_terminal
        )
        self.task = self.bar.add_task("", total=num_updates)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.refresh()
        self.bar.stop()

    def __call__(self, chunk: Chunk) -> None:
        """Take a chunk; draw if it is time to."""
        for name in ("episode_return", "success_rate"):
            if name in chunk.metrics:
                values = episode_mean(chunk.metrics, name)
                if np.isfinite(values).any():
                    self.means[name] = float(np.nanmean(values))
        now = time.perf_counter()
        is_last = chunk.last_update == self.num_updates
        if now - self.last_shown < self.every_s and not is_last:
            return
        self.last_shown = now
        text = self.describe(chunk)
        if self.console.is_terminal:
            self.bar.update(self.task, completed=chunk.last_update, description=text)
            self.bar.refresh()
        else:
            share = 100 * chunk.last_update / self.num_updates
            self.console.print(f"{share:3.0f} %  {text}", highlight=False, soft_wrap=True)

    def describe(self, chunk: Chunk) -> str:
        """One line: steps, speed, return, completion, time left."""
        env_steps = chunk.last_update * chunk.steps_per_update
        all_steps = env_steps * len(chunk.seeds)
        left_s = chunk.wall_s / chunk.last_update * (self.num_updates - chunk.last_update)
        parts = [f"{short(all_steps)} steps", f"{short(all_steps / chunk.wall_s)} steps/s"]
        if "episode_return" in self.means:
            parts.append(f"return {self.means['episode_return']:.2f}")
        if "success_rate" in self.means:
            parts.append(f"completed {100 * self.means['success_rate']:.0f} %")
        parts.append(f"{clock(left_s)} left")
        return "  ".join(parts)


def short(number: float) -> str:
    """1234567 -> "1.23M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """75.2 -> "1:16" (rounded up); an hour and more as "1:00:05"."""
    whole = math.ceil(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
