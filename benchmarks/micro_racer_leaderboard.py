"""MicroRacer's leaderboard: every agent at the original's budget, at its peak, and its frontier.

    python -m benchmarks.micro_racer_leaderboard

Every agent of the original's field trains with its settings of `train/_presets.py`: those for the
original's budget of 50,000 environment steps, then those for the budget where it peaks. The
last row's agent is also paid for lap time, which the original's reward pays only through the
discount. All seeds of a row are one compiled program; all policies then drive the same tracks,
which neither training nor the choice of any setting has seen, with all difficulties on, most likely
actions, at most 1,000 steps, and are paid as in the original. The frontier trains one more agent of
each kind for each pair gamma:time_cost, side by side.

Beside them stand the original's published agents as measured in the original environment on 400
tracks, and the training speeds of its programs (the specification of the port, section 10).

The table of `docs/micro_racer.md`, its plot and the JSON come from this command. Seconds are those
of all seeds of a row together: `wall_s` of the training, compiling apart, `cpu_s` of all cores.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxrl import spaces
from jaxrl.checks import check_count, check_real
from jaxrl.envs import Ending
from train import _cli, _envs, _presets, _report, _run

ENV = "MicroRacer-v0"
RESULTS = Path(__file__).parent / "results" / "micro_racer_leaderboard.json"
PLOT = Path(__file__).parents[1] / "docs" / "micro_racer_leaderboard.png"


@dataclass(frozen=True)
class Published:
    """An agent of the original, in the original environment: 400 laps, at most 1,000 steps each."""

    success_rate: float
    return_mean: float
    discounted_return_mean: float
    success_length_mean: float
    steps_per_s: str = ""  # of its training program, environment steps


PUBLISHED = {
    "ddpg": Published(0.920, 6.18, 0.88, 730, "12 to 16"),
    "ppo": Published(0.838, 5.37, 0.61, 804),
    "td3": Published(0.730, 5.30, 0.67, 898),
    "dsac": Published(0.422, 3.05, 0.65, 564),
    "sac": Published(0.168, 3.82, 0.59, 619, "71"),
    "ddpg_parameter_noise": Published(0.025, -0.18, 0.21, 437),
}
LABELS = {
    "ddpg": "DDPG",
    "ddpg_parameter_noise": "DDPG, parameter noise",
    "ppo": "PPO",
    "td3": "TD3",
    "dsac": "DSAC",
    "sac": "SAC",
}
COLOURS = dict(zip(LABELS, ("C0", "C9", "C3", "C2", "C1", "C4"), strict=True))
RACE = "race"  # the name of the row that is paid for lap time

ORIGINAL_BUDGET = 50_000
PEAK_BAR = (0.95, 600.0)  # completed at least, steps of a lap at most
BEST_BAR = (0.98, 480.0)
AIM = (0.99, 430.0)


@dataclass(frozen=True)
class Entry:
    """A row to train: who, with what, and what is swept over its agents."""

    name: str  # of LABELS, or RACE
    kind: str  # "50k", "peak", "race", "frontier"
    agent: str  # module of jaxrl.agents
    preset: _presets.Preset
    sweep: tuple[tuple[float, float], ...] = ()  # (gamma, time_cost) of each agent


@dataclass(frozen=True)
class Options:
    """Command line."""

    agents: tuple[str, ...] = tuple(LABELS)
    """Who takes part."""
    kinds: tuple[str, ...] = ("50k", "peak", "race", "frontier")
    """What to train: at the original's budget, at the peak's, for lap time, the frontier."""
    num_seeds: int = 5
    """Agents of a row."""
    total_steps: int | None = None
    """Environment steps of every agent of every row; by default those of the settings."""
    frontier: tuple[str, ...] = ("0.98:0", "0.985:0", "0.99:0", "0.995:0", "0.9975:0")
    """Pairs gamma:time_cost, one agent each."""
    episodes: int = 512
    """Unseen tracks to evaluate on, the same for all."""
    eval_seed: int = 1
    """Which tracks: settings were chosen on those of seeds 0 and 7."""
    resume: bool = False
    """Keep the rows of the file that were trained with the same settings and judged alike."""
    json: Path | None = RESULTS
    """File to write the numbers to, after every row."""
    plot: Path | None = PLOT
    """PNG to draw."""


def entries(options: Options) -> list[Entry]:
    """Return the rows that the options ask for, in the order of the table."""
    found = []
    for kind in options.kinds:
        if kind == RACE:
            agent, preset = _presets.MICRO_RACER_RACE
            if agent in options.agents:
                found.append(Entry(RACE, kind, agent, preset))
            continue
        for name in options.agents:
            agent = name.partition("_")[0]
            table = _presets.MICRO_RACER_50K if kind == "50k" else _presets.MICRO_RACER_PEAK
            sweep = pairs(options.frontier) if kind == "frontier" else ()
            found.append(Entry(name, kind, agent, table[name], sweep))
    return found


def pairs(texts: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """Read ("0.99:0.005", ...) as ((0.99, 0.005), ...).

    Raises:
        ValueError: a text is not gamma:time_cost, or a number is out of its range.
    """
    found = []
    for text in texts:
        try:
            gamma, time_cost = map(float, text.split(":"))
        except ValueError:
            raise ValueError(
                f"frontier: {text!r} must be gamma:time_cost, e.g. 0.99:0.005"
            ) from None
        check_real("gamma", gamma, 0.0, 1.0)
        check_real("time_cost", time_cost, 0.0, 1.0)
        found.append((gamma, time_cost))
    return tuple(found)


def settings(entry: Entry, options: Options) -> dict[str, Any]:
    """Return all that decides what a row will say, as JSON takes it."""
    config = config_of(entry, options)
    return {
        "name": entry.name,
        "kind": entry.kind,
        "agent": entry.agent,
        "config": {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
        },
        "train_params": entry.preset.train_params,
        "env_kwargs": entry.preset.env_kwargs,
        "sweep": [list(pair) for pair in entry.sweep],
        "num_seeds": len(entry.sweep) or options.num_seeds,
        "episodes": options.episodes,
        "eval_seed": options.eval_seed,
    }


def config_of(entry: Entry, options: Options) -> Any:
    """The learner's settings of a row, shortened if the options say so."""
    module = importlib.import_module(f"jaxrl.agents.{entry.agent}")
    config = module.Config(**entry.preset.config)
    if options.total_steps is None:
        return config
    changes = {"total_steps": options.total_steps}
    if hasattr(config, "learning_starts"):  # a short run must still learn
        changes["learning_starts"] = min(config.learning_starts, options.total_steps // 4)
    return dataclasses.replace(config, **changes)


def train_and_evaluate(entry: Entry, setup: _envs.EnvSetup, options: Options) -> dict[str, Any]:
    """Train the agents of a row side by side, let them drive; return the row.

    `per_seed` has what `train._report.aggregate` gives and the mean speed; the row itself the
    medians over seeds.
    """
    module = importlib.import_module(f"jaxrl.agents.{entry.agent}")
    config = config_of(entry, options)
    params = _envs.with_train_params(setup.params, entry.preset.train_params)

    sweep = entry.sweep or ((config.gamma, float(params.time_cost)),) * options.num_seeds
    gammas, time_costs = jnp.asarray(sweep, jnp.float32).T
    # the agents of a sweep differ in one thing alone: seed 0 for all
    seeds = [0] * len(sweep) if entry.sweep else list(range(options.num_seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])

    def train(gamma: jax.Array, time_cost: jax.Array, key: jax.Array) -> Any:
        mine = dataclasses.replace(config, gamma=gamma)
        law = dataclasses.replace(params, time_cost=time_cost)
        state, _ = module.make_train(mine, setup.env, law)(key)
        return module.get_policy(state)

    began, row_began = time.perf_counter(), cpu_seconds()
    compiled = jax.jit(jax.vmap(train)).lower(gammas, time_costs, keys).compile()
    compile_s = time.perf_counter() - began
    began, cpu_began = time.perf_counter(), cpu_seconds()
    policies = jax.block_until_ready(compiled(gammas, time_costs, keys))
    wall_s, cpu_s = time.perf_counter() - began, cpu_seconds() - cpu_began

    act = module.make_act(config, *spaces.read(setup.env, setup.params))
    began = time.perf_counter()
    rows = _report.evaluate(setup, act, policies, options.eval_seed, options.episodes)
    eval_s = time.perf_counter() - began
    speeds = mean_speeds(rows, setup.params)
    per_seed = [
        {
            "seed": seed,
            "gamma": sweep[lane][0],
            "time_cost": sweep[lane][1],
            **_report.aggregate(rows, lane, setup.endings),
            "speed_mean": float(speeds[lane]),
        }
        for lane, seed in enumerate(seeds)
    ]
    env_steps = module.make_train(config, setup.env, params).total_steps
    return {
        **settings(entry, options),
        "env_steps": env_steps,
        "compile_s": compile_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "eval_s": eval_s,
        "row_cpu_s": cpu_seconds() - row_began,  # compiling and evaluating included
        "steps_per_s": env_steps * len(seeds) / wall_s,
        **_report.median(per_seed),
        "per_seed": per_seed,
    }


def cpu_seconds() -> float:
    """Seconds of CPU that this process has used so far, all cores together."""
    used = os.times()
    return used.user + used.system


def mean_speeds(rows: _report.Rows, params: Any) -> np.ndarray:
    """Distance over time of all episodes of each policy, (num_policies,), in the track's units.

    The return is the distance, with the price of a failure where there was one; the last step of a
    failed episode moves nobody.
    """
    failed = rows["ending"] > int(Ending.COMPLETED)
    distance = rows["return"].astype(np.float64) - failed * float(params.failure_reward)
    steps = rows["length"] - failed
    return distance.sum(1) / (float(params.dt) * np.maximum(steps.sum(1), 1))


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the rows against what was asked for: what, whether it is met, by how much."""
    found = []

    def judge(what: str, row: dict[str, Any], completed: float, steps: float) -> None:
        length = row["success_length_mean"]
        reached = f"{100 * row['success_rate']:.1f} % in {_whole(length)} steps"
        found.append({"bar": what, "met": reaches(row, completed, steps), "reached": reached})

    for row in rows:
        if row["kind"] == "50k":  # the laps of all seeds: a median would forgive those that fail
            namesake, mine = PUBLISHED[row["name"]].success_rate, mean_rate(row)
            what = f"{LABELS[row['name']]} at 50k: more than {100 * namesake:.1f} %"
            reached = f"{100 * mine:.1f} %, median {100 * row['success_rate']:.1f} %"
            found.append({"bar": what, "met": mine > namesake, "reached": reached})
    for row in rows:
        if row["kind"] == "peak":
            judge(f"{LABELS[row['name']]} at its peak: {_bar(PEAK_BAR)}", row, *PEAK_BAR)
    finals = [row for row in rows if row["kind"] in ("peak", RACE)]
    if finals:
        for what, (completed, steps) in (("the best", BEST_BAR), ("the aim", AIM)):
            row = nearest(finals, completed, steps)
            judge(f"{what}: {_bar((completed, steps))} ({title(row)})", row, completed, steps)
    return found


def mean_rate(row: dict[str, Any]) -> float:
    """Share of the laps that all seeds of a row together complete."""
    return float(np.mean([seed["success_rate"] for seed in row["per_seed"]]))


def reaches(row: dict[str, Any], completed: float, steps: float) -> bool:
    """Whether a row completes as many laps in as few steps."""
    length = row["success_length_mean"]
    return length is not None and row["success_rate"] >= completed and length <= steps


def nearest(rows: Sequence[dict[str, Any]], completed: float, steps: float) -> dict[str, Any]:
    """Return the row that meets a bar by most, or misses it by least: 1 % of laps as 1 % of steps.

    Rows without a completed lap are infinitely far away.
    """

    def margin(row: dict[str, Any]) -> float:
        length = row["success_length_mean"]
        if length is None:
            return -np.inf
        return min((row["success_rate"] - completed) * 100, (1 - length / steps) * 100)

    return max(rows, key=margin)


def _bar(bar: tuple[float, float]) -> str:
    return f"{100 * bar[0]:.0f} % in {bar[1]:.0f} steps"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def title(row: dict[str, Any]) -> str:
    """What a row is called in table and plot."""
    if row["name"] != RACE:
        return LABELS[row["name"]]
    return f"{LABELS[row['agent']]}, paid for lap time"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The leaderboard: medians over seeds, their mean completion, the published originals."""
    lines = [
        "| agent | env steps | completed (seeds) | mean | return | steps of a lap | mean speed | "
        "wall [s] | CPU [s] | steps/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, head in (("50k", "at the original's budget"), ("peak", "at its peak"), (RACE, "")):
        for row in (r for r in rows if r["kind"] == kind):
            rates = [100 * seed["success_rate"] for seed in row["per_seed"]]
            cells = [
                f"{title(row)}{', ' if head else ''}{head}",
                f"{row['env_steps']:,}",
                f"{100 * row['success_rate']:.1f} % ({min(rates):.1f} to {max(rates):.1f})",
                f"{100 * mean_rate(row):.1f} %",
                f"{row['return_mean']:.2f}",
                _whole(row["success_length_mean"]),
                f"{row['speed_mean']:.3f}",
                f"{row['wall_s']:.0f}",
                f"{row['cpu_s']:.0f}",
                f"{row['steps_per_s']:,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for name, theirs in PUBLISHED.items():
        cells = [f"original: {LABELS[name]}", "50,000" if name != "ppo" else "600 episodes"]
        cells += [f"{100 * theirs.success_rate:.1f} %", "", f"{theirs.return_mean:.2f}"]
        cells += [f"{theirs.success_length_mean:.0f}", "", "", "", theirs.steps_per_s]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def frontier_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the frontier: an agent a row, completed in steps for each pair; empty if none."""
    chosen = [row for row in rows if row["kind"] == "frontier"]
    if not chosen:
        return ""
    heads = [
        f"gamma {s['gamma']:g}" + (f", time {s['time_cost']:g}" if s["time_cost"] else "")
        for s in chosen[0]["per_seed"]
    ]
    lines = [f"| agent | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for row in chosen:
        cells = [
            f"{100 * s['success_rate']:.1f} % in {_whole(s['success_length_mean'])}"
            for s in row["per_seed"]
        ]
        lines.append(f"| {title(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Completion against steps per lap, left at 50,000 steps, right at the peaks; up and left wins.

    Every seed a small dot, medians large; the frontier a line; the originals squares.
    """
    halves = {"left": ("50k",), "right": ("peak", "frontier", RACE)}
    shown = {half: k for half, k in halves.items() if any(r["kind"] in k for r in rows)}
    figure = Figure(figsize=(6.2 * max(1, len(shown)), 5.6), layout="constrained")
    panels = dict(zip(shown, np.ravel(figure.subplots(1, max(1, len(shown)))), strict=False))
    for half, axes in panels.items():
        kinds = shown[half]
        for row in (r for r in rows if r["kind"] in kinds):
            seeds = [s for s in row["per_seed"] if s["success_length_mean"] is not None]
            x = [s["success_length_mean"] for s in seeds]
            y = [100 * s["success_rate"] for s in seeds]
            colour = COLOURS.get(row["name"], "black")
            if row["kind"] == "frontier":
                order = np.argsort(x)
                x, y = np.asarray(x)[order], np.asarray(y)[order]
                axes.plot(x, y, lw=1, marker=".", ms=4, color=colour, alpha=0.6)
                continue
            axes.scatter(x, y, s=12, color=colour, alpha=0.5)
            if x:
                marker = "*" if row["kind"] == RACE else "o"
                size = 150 if row["kind"] == RACE else 60
                label = title(row)
                point = (np.median(x), np.median(y))
                axes.scatter(*point, s=size, marker=marker, color=colour, label=label, zorder=4)
        axes.set_xlabel("steps per completed lap")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="center left")
    if "left" in panels:
        _draw_published(panels["left"])
    if "right" in panels:
        _draw_bars(panels["right"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_published(left: Any) -> None:
    for name, theirs in PUBLISHED.items():
        point = (theirs.success_length_mean, 100 * theirs.success_rate)
        left.scatter(*point, s=40, marker="s", color=COLOURS[name], alpha=0.4)
        left.annotate(
            f"original {LABELS[name]}",
            point,
            xytext=(5, -10),
            textcoords="offset points",
            fontsize=7,
            color="0.4",
        )
    left.set_ylim(-2, 102)
    left.set_ylabel("laps completed [%]")
    left.set_title("50,000 environment steps; squares: the original's agents", fontsize=10)


def _draw_bars(right: Any) -> None:
    for completed, steps in (PEAK_BAR, BEST_BAR, AIM):
        right.plot([300, steps, steps], [100 * completed, 100 * completed, 102], color="0.7", lw=1)
    right.set_ylim(85, 100.5)
    right.set_xlim(380, 760)
    right.set_ylabel("laps completed [%]")
    right.set_title("at the peak; lines: frontiers; grey: the bars", fontsize=10)


def main(options: Options) -> dict[str, Any]:
    """Train, evaluate, print, write after every row; return the numbers."""
    kept = earlier_rows(options)
    make = SetupMaker()
    wanted = entries(options)
    judged = {"episodes": options.episodes, "eval_seed": options.eval_seed}
    # what drove the same tracks stays, what is asked for until its turn comes: a run stopped in the
    # middle loses no row
    found = {(row["kind"], row["name"]): row for row in kept if judged.items() <= row.items()}
    rows, result = list(found.values()), dict[str, Any]()
    for entry in wanted:
        row = find_row(kept, settings(entry, options))
        if row is None:
            row = train_and_evaluate(entry, make(entry.preset.env_kwargs), options)
        found.pop((entry.kind, entry.name), None)  # to the end, in the order of the table
        found[entry.kind, entry.name] = row
        rows = list(found.values())
        print(
            f"{row['kind']:9s} {title(row):28s} {100 * row['success_rate']:5.1f} % in "
            f"{_whole(row['success_length_mean'])} steps; {row['env_steps']:,} env steps, compiled "
            f"in {row['compile_s']:.0f} s, trained in {row['wall_s']:.0f} s",
            flush=True,
        )
        result = {
            "machine": _run.machine(),
            "command": "python -m benchmarks.micro_racer_leaderboard "
            f"--kinds {' '.join(options.kinds)} --agents {' '.join(options.agents)}",
            "wall_s": sum(r["compile_s"] + r["wall_s"] + r["eval_s"] for r in rows),
            "cpu_s": sum(r["row_cpu_s"] for r in rows),
            "bars": bars(rows),
            "rows": rows,
            "published": {name: dataclasses.asdict(theirs) for name, theirs in PUBLISHED.items()},
        }
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{markdown(rows)}\n\n{frontier_markdown(rows)}\n")
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['reached']}")
    print(f"{result['wall_s']:.0f} s in all, {result['cpu_s']:.0f} s of CPU")
    if options.plot:
        draw(rows, options.plot)
    return result


class SetupMaker:
    """Environments by their arguments, each made once."""

    def __init__(self) -> None:
        self._made: dict[str, _envs.EnvSetup] = {}

    def __call__(self, kwargs: dict[str, Any]) -> _envs.EnvSetup:
        """Make it, or return what was made before."""
        key = json.dumps(kwargs, sort_keys=True)
        if key not in self._made:
            self._made[key] = _envs.make_env(ENV, **kwargs)
        return self._made[key]


def earlier_rows(options: Options) -> list[dict[str, Any]]:
    """The rows of the file, where they are wanted and there are any.

    Raises:
        ValueError: the file holds no leaderboard.
    """
    if not options.resume or options.json is None or not options.json.exists():
        return []
    try:
        return list(json.loads(options.json.read_text())["rows"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"json = {str(options.json)!r} holds no leaderboard to resume: remove it, or leave "
            "--resume away"
        ) from None


def find_row(rows: Sequence[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The row that was trained with these settings, see `settings`; None if there is none."""
    for row in rows:
        if all(name in row and row[name] == value for name, value in wanted.items()):
            return row
    return None


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Check the command line, then return what to do.

    Raises:
        ValueError: wrong input, in one sentence.
    """
    prog = "python -m benchmarks.micro_racer_leaderboard"
    options: Options = _cli.read(Options, argv, prog=prog, description=__doc__, default=Options())
    for name, chosen, known in (
        ("agents", options.agents, LABELS),
        ("kinds", options.kinds, ("50k", "peak", RACE, "frontier")),
    ):
        for one in chosen:
            if one not in known:
                raise ValueError(f"{name}: {one!r} must be one of {', '.join(known)}")
    check_count("num_seeds", options.num_seeds)
    check_count("episodes", options.episodes)
    if options.episodes > _cli.MAX_EPISODES:
        raise ValueError(f"episodes = {options.episodes} must be <= {_cli.MAX_EPISODES}")
    check_count("eval_seed", options.eval_seed, minimum=0)
    if options.total_steps is not None:
        check_count("total_steps", options.total_steps, minimum=4)
    pairs(options.frontier)
    earlier_rows(options)
    if not entries(options):
        raise ValueError(
            f"agents = {options.agents} with kinds = {options.kinds} leave no row to train"
        )

    def run() -> int:
        main(options)
        return 0

    return run


def cli(argv: Sequence[str]) -> int:
    """Measure as the command line says; return the exit code (2: wrong input)."""
    return _cli.exit_code(lambda: prepare(argv))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
