"""What is made of trained policies: an evaluation, its table and its file, the learning curve."""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import trim_mean

from jaxrl import rollout
from jaxrl.sharding import SpreadTrain
from jaxrl.sinks import episode_mean

if TYPE_CHECKING:
    from train._envs import EnvSetup

Rows = dict[str, np.ndarray]  # each (num_seeds, num_episodes)


def evaluate(
    setup: "EnvSetup", act: Callable[..., jax.Array], policies: Any, seed: int, num_episodes: int
) -> Rows:
    """Run every policy, most likely actions, on the same episodes; one entry a policy and episode.

    `policies` has a leading axis of policies; `act(policy, obs)` is pure. Columns: return,
    discounted_return (0.99), length [steps], terminated, truncated, the scalars of the last info.
    """
    program, params, keys = evaluation(setup, act, seed, num_episodes)
    return rows_of(jax.device_get(program(policies, params, keys)))


def compile_evaluation(
    setup: "EnvSetup",
    act: Callable[..., jax.Array],
    shapes: Any,
    seed: int,
    num_episodes: int,
    spread: SpreadTrain,
) -> Callable[[Any], dict[str, jax.Array]]:
    """Compile `evaluate` for policies of these shapes, spread as their seeds are.

    The result stays on the devices, on every one of them.
    """
    over_episodes, params, keys = episodes_of(setup, act, seed, num_episodes)
    params, keys = spread.on_every_device((params, keys))
    program = jax.jit(
        spread.each(over_episodes, num_shared=2),
        in_shardings=(spread.by_lane, spread.everywhere, spread.everywhere),
        out_shardings=spread.everywhere,
    )
    compiled = program.lower(shapes, params, keys).compile()
    return lambda policies: rows_of(
        compiled(jax.device_put(policies, spread.by_lane), params, keys)
    )


def evaluation(
    setup: "EnvSetup", act: Callable[..., jax.Array], seed: int, num_episodes: int
) -> tuple[Any, Any, jax.Array]:
    """Return (program, params, keys) of `evaluate`: the jitted `program(policies, params, keys)`.

    Policies differ, the other two arguments belong to the episodes.
    """
    over_episodes, params, keys = episodes_of(setup, act, seed, num_episodes)
    return jax.jit(jax.vmap(over_episodes, in_axes=(0, None, None))), params, keys


def episodes_of(
    setup: "EnvSetup", act: Callable[..., jax.Array], seed: int, num_episodes: int
) -> tuple[Callable[[Any, Any, jax.Array], rollout.Episodes], Any, jax.Array]:
    """Return (`run(policy, params, keys)`, params, keys): the episodes of one policy."""
    params, axes = setup.draw_params(seed, num_episodes)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0xE7A1), seed), num_episodes)

    def one(policy: Any, params: Any, key: jax.Array) -> rollout.Episodes:
        episodes = rollout.evaluate(
            setup.env, params, lambda obs, _: act(policy, obs), key, num_episodes=1
        )
        return jax.tree.map(lambda x: x[0], episodes)

    return jax.vmap(one, in_axes=(None, axes, 0)), params, keys


def rows_of(episodes: rollout.Episodes) -> dict[str, Any]:
    """The columns of `evaluate` from the episodes of all policies."""
    rows: dict[str, Any] = {
        "return": episodes.returns,
        "discounted_return": episodes.discounted_returns,
        "length": episodes.lengths,
        "terminated": episodes.terminated,
        "truncated": episodes.truncated,
    }
    for name, value in episodes.info.items():
        if name not in rows and getattr(value, "ndim", 0) == 2:
            rows[name] = value
    return rows


def stack(policies: Sequence[Any]) -> Any:
    """Give single policies a common leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *policies)


def aggregate(rows: Rows, lane: int, endings: dict[int, str]) -> dict[str, Any]:
    """Sum up the episodes of one policy; None where there is nothing to average."""
    returns = rows["return"][lane].astype(np.float64)
    length = rows["length"][lane]
    stats: dict[str, Any] = {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_iqm": float(trim_mean(returns, 0.25)),
        "discounted_return_mean": float(rows["discounted_return"][lane].mean(dtype=np.float64)),
        "length_mean": float(length.mean()),
        "success_rate": None,
        "success_length_mean": None,
    }
    if "success" in rows:
        success = rows["success"][lane].astype(bool)
        stats["success_rate"] = float(success.mean())
        stats["success_length_mean"] = float(length[success].mean()) if success.any() else None
    if "ending" in rows and endings:
        stats["endings"] = _count_endings(rows, lane, endings)
    return stats


def _count_endings(rows: Rows, lane: int, endings: dict[int, str]) -> dict[str, int]:
    ending = np.where(rows["truncated"][lane], -1, rows["ending"][lane])
    names = {**endings, -1: "time limit"}
    return {
        names[int(k)]: int(n) for k, n in zip(*np.unique(ending, return_counts=True), strict=True)
    }


def median(per_seed: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The median over seeds of every number; None where no seed has it."""
    result: dict[str, float | None] = {}
    for name, first in per_seed[0].items():
        if isinstance(first, dict) or name == "seed":
            continue
        values = [stats[name] for stats in per_seed if stats[name] is not None]
        result[name] = float(np.median(values)) if values else None
    return result


def best_lane(per_seed: Sequence[dict[str, Any]]) -> int:
    """The lane with the highest success rate; among equals, or without one, the highest return."""
    scores = [(s["success_rate"] or 0.0, s["return_mean"]) for s in per_seed]
    return max(range(len(scores)), key=scores.__getitem__)


def table(
    title: str, labels: Sequence[str], per_seed: Sequence[dict[str, Any]], middle: dict[str, Any]
) -> Table:
    """The evaluation for people: a row for each seed, and their median."""
    has_success = middle["success_rate"] is not None
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    heads = ["completed", "in steps"] if has_success else []
    for head in ["seed", *heads, "return ± std", "IQM", "discounted"]:
        result.add_column(head, justify="right", no_wrap=True)
    if not has_success:
        result.add_column("steps", justify="right", no_wrap=True)

    def add(label: str, stats: dict[str, Any], style: str = "") -> None:
        cells = [label]
        if has_success:
            completed = f"{100 * stats['success_rate']:.1f} %"
            cells += [completed, _number(stats["success_length_mean"], 0)]
        cells += [
            f"{_number(stats['return_mean'], 2)} ± {_number(stats['return_std'], 2)}",
            _number(stats["return_iqm"], 2),
            _number(stats["discounted_return_mean"], 2),
        ]
        if not has_success:
            cells.append(_number(stats["length_mean"], 0))
        result.add_row(*cells, style=style)

    for label, stats in zip(labels, per_seed, strict=True):
        add(label, stats)
    if len(per_seed) > 1:
        result.add_section()
        add("median", middle, "bold")
    return result


def print_endings(console: Console, per_seed: Sequence[dict[str, Any]]) -> None:
    """Say how the episodes of all seeds ended, where the environment tells."""
    total: Counter[str] = Counter()
    for stats in per_seed:
        total.update(stats.get("endings", {}))
    if total:
        parts = [f"{n} {name}" for name, n in total.most_common()]
        console.print(f"endings: {', '.join(parts)}", highlight=False, soft_wrap=True)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_episodes(path: Path, seeds: Sequence[int], rows: Rows) -> None:
    """Write one row for each seed and episode to a new file."""
    with path.open("x", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "episode", *rows])
        for lane, seed in enumerate(seeds):
            columns = [v[lane].astype(int) if v.dtype == bool else v[lane] for v in rows.values()]
            for i in range(len(columns[0])):
                writer.writerow([seed, i, *(f"{c[i]:.9g}" for c in columns)])


def learning_curve(
    path: Path, title: str, seeds: Sequence[int], metrics: Rows, steps_per_update: int
) -> None:
    """Draw return and success rate over environment steps: every seed thin, their median thick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    panels = {"episode_return": "return of an episode"}
    if "success_rate" in metrics:
        panels = {
            "success_rate": "episodes completed [%]",
            "episode_length": "steps of an episode, completed or not",
            **panels,
        }
    num_updates = metrics["num_episodes"].shape[1]
    window = max(1, num_updates // 50)
    steps = np.arange(1, num_updates + 1) * steps_per_update
    figure = Figure(figsize=(5.2 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axes, (name, label) in zip(all_axes, panels.items(), strict=True):
        scale = 100.0 if name == "success_rate" else 1.0
        curves = scale * smooth(metrics, name, window)
        for i, curve in enumerate(curves):
            axes.plot(
                steps, curve, lw=0.9, alpha=0.7, color="tab:blue", label=None if i else "each seed"
            )
        if len(seeds) > 1:
            known = np.isfinite(curves).any(axis=0)
            middle = np.full(num_updates, np.nan)
            middle[known] = np.nanmedian(curves[:, known], axis=0)
            axes.plot(steps, middle, lw=2.5, color="black", label=f"median of {len(seeds)} seeds")
        axes.set_xlabel("environment steps of a seed")
        axes.set_ylabel(label)
        axes.set_xlim(0, steps[-1])
        if name == "success_rate":
            axes.set_ylim(-2, 102)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(seeds) > 1:
        all_axes[0].legend(frameon=False)
    unit = "an update" if window == 1 else f"{window} updates"
    told = f"episodes that ended while training, mean over {unit}"
    # a single panel is too narrow for one line
    figure.suptitle(f"{title}\n{told}" if len(panels) == 1 else f"{title}: {told}", fontsize=11)
    figure.savefig(path, dpi=130)


def smooth(metrics: Rows, name: str, window: int) -> np.ndarray:
    """Mean of an episode metric over the last `window` updates, each episode counted once.

    (num_seeds, num_updates) -> the same; NaN until the first episode ends, then the last known.
    """
    num_updates = metrics[name].shape[1]
    result = np.full(metrics[name].shape, np.nan)
    for i in range(num_updates):
        part = slice(max(0, i + 1 - window), i + 1)
        mean = episode_mean(
            {name: metrics[name][:, part], "num_episodes": metrics["num_episodes"][:, part]}, name
        )
        result[:, i] = np.where(np.isnan(mean) & (i > 0), result[:, i - 1], mean)
    return result
