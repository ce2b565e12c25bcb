"""Sweeps: which settings, in which programs, how many agents at once, and what came out.

An agent to train is a lane: one setting with one seed. Settings that differ in real values alone
share a program, whose lanes are vmapped; sizes and switches change the program. Lanes go through
it in chunks that fit into memory, and every finished chunk is a file: what is there need not run
again.
"""

import dataclasses
import difflib
import itertools
import json
import math
import os
import time
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import bootstrap, trim_mean

from jaxrl import sinks, spaces
from jaxrl.replay import device_memory
from jaxrl.types import Train
from train import _cli, _devices, _memory, _report, _run

if TYPE_CHECKING:
    from train._envs import EnvSetup

MAX_LANES = 100_000
PARAMS = "params."  # prefix of names that are parameters of the environment in training
SCORES = {  # --score: the entry of an evaluation
    "return": "return_mean",
    "discounted_return": "discounted_return_mean",
    "success_rate": "success_rate",
}
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

Values = dict[str, float]  # of one setting, by name


class DoesNotFit(ValueError):
    """Not even one agent fits into memory."""


# what to try --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One real setting and what it is to take."""

    name: str
    kind: str  # "grid", "uniform" or "log_uniform"
    values: tuple[float, ...]  # the grid, or (low, high)


def parse_axes(
    config_class: Any, grid: Sequence[str], uniform: Sequence[str], log_uniform: Sequence[str]
) -> tuple[Axis, ...]:
    """Read name=1,2,3 of grids and name=low:high of ranges.

    Raises:
        ValueError: a name is no real setting or comes twice, a value is no number, a range is none.
    """
    reals, statics = fields(config_class)
    axes: list[Axis] = []
    for kind, pairs in (("grid", grid), ("uniform", uniform), ("log_uniform", log_uniform)):
        option = "--" + kind.replace("_", "-")
        between, example = (",", "1e-4,1e-3") if kind == "grid" else (":", "1e-4:1e-1")
        for pair in pairs:
            name, equals, text = pair.partition("=")
            if not equals or not text:
                raise ValueError(
                    f"{option}: {pair!r} must be name=value{between}value, e.g. "
                    f"learning_rate={example}"
                )
            if name in statics:
                raise ValueError(
                    f"{option}: {name} is a size or a switch, which changes the program: give "
                    f"--each {name}=VALUE {name}=VALUE"
                )
            check_name(option, name, reals)
            if name in (axis.name for axis in axes):
                raise ValueError(f"{option}: {name} is swept twice, give it once")
            values = tuple(_number(option, name, part) for part in text.split(between))
            check_values(option, kind, name, values)
            axes.append(Axis(name, kind, values))
    return tuple(axes)


def check_name(option: str, name: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `name` is one of the settings that an option takes."""
    if name in known or (name.startswith(PARAMS) and option != "--each"):
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"{option}: {name!r} is not a setting that it takes: {guess}there are {', '.join(known)}"
    )


def check_values(option: str, kind: str, name: str, values: tuple[float, ...]) -> None:
    """Raise ValueError unless the values of an axis are a grid, or the ends of a range."""
    if kind == "grid":
        if len(set(values)) < len(values):
            raise ValueError(f"{option}: {name} has a value twice, in {values}")
        return
    if len(values) != 2 or not values[0] < values[1]:
        shown = ":".join(f"{v:g}" for v in values)
        raise ValueError(f"{option}: {name} = {shown} must be low:high with low < high")
    if kind == "log_uniform" and values[0] <= 0:
        raise ValueError(
            f"{option}: {name} = {values[0]:g}:{values[1]:g} must begin above 0, as its logarithm "
            "is uniform: give --uniform or a higher end"
        )


def parse_each(config_class: Any, pairs: Sequence[str]) -> dict[str, list[Any]]:
    """Read ("hidden=64,64", "hidden=128", "num_envs=8") as the alternatives of each name.

    Raises:
        ValueError: a name is no size or switch, or a value is not of its type, or comes twice.
    """
    reals, statics = fields(config_class)
    types = typing.get_type_hints(config_class)
    each: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text:
            raise ValueError(f"--each: {pair!r} must be name=value, e.g. hidden=64,64")
        if name in reals:
            raise ValueError(
                f"--each: {name} is a real setting, which can share a program: give --grid "
                f"{name}=VALUE,VALUE"
            )
        check_name("--each", name, statics)
        value = _static(name, text, types[name])
        if value in each.setdefault(name, []):
            raise ValueError(f"--each: {name} = {value!r} is given twice")
        each[name].append(value)
    return each


def fields(config_class: Any) -> tuple[list[str], list[str]]:
    """Names of a config's real settings, and of its sizes and switches."""
    static = {
        f.name: not f.metadata.get("pytree_node", True) for f in dataclasses.fields(config_class)
    }
    return [n for n, s in static.items() if not s], [n for n, s in static.items() if s]


def _number(option: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{option}: {name} = {text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{option}: {name} = {text!r} must be finite")
    return value


def _static(name: str, text: str, kind: Any) -> Any:
    """Read the value of a size or switch."""
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(_cli.whole(part) for part in text.split(",") if part)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return _cli.whole(text) if kind is int else kind(text)
    except (KeyError, ValueError, TypeError):
        wanted = {bool: "true or false", int: "a whole number"}.get(kind, "whole numbers, 64,64")
        raise ValueError(f"--each: {name} = {text!r} must be {wanted}") from None


def make_settings(axes: Sequence[Axis], num_samples: int, sample_seed: int) -> list[Values]:
    """Every point of the grid with every sample of the ranges; one empty setting without axes.

    The samples of a name depend on `sample_seed` and the name alone: more samples keep the first,
    another name leaves them as they are. They have six digits, so that the table tells exactly what
    ran.
    """
    grids = [axis for axis in axes if axis.kind == "grid"]
    ranges = [axis for axis in axes if axis.kind != "grid"]
    points = [
        dict(zip([axis.name for axis in grids], values, strict=True))
        for values in itertools.product(*(axis.values for axis in grids))
    ]
    columns = {axis.name: draw(axis, num_samples, sample_seed) for axis in ranges}
    samples = [{name: column[i] for name, column in columns.items()} for i in range(num_samples)]
    settings = [{**point, **sample} for point in points for sample in (samples or [{}])]
    names = [axis.name for axis in axes]
    return [{name: setting[name] for name in names} for setting in settings]


def draw(axis: Axis, num_samples: int, sample_seed: int) -> list[float]:
    """Samples of a range, of six digits."""
    low, high = axis.values
    rng = np.random.default_rng([sample_seed, *axis.name.encode()])
    u = rng.random(num_samples)
    if axis.kind == "log_uniform":
        drawn = np.exp(np.log(low) + u * (np.log(high) - np.log(low)))
    else:
        drawn = low + u * (high - low)
    return [min(max(float(f"{x:.6g}"), low), high) for x in drawn]


# programs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """Agents that one compiled program can train: all but real values is the same."""

    index: int
    static: dict[str, Any]  # what --each chose
    config: Any
    train: Train[Any]  # with the config's own reals: sizes and counts


@dataclass(frozen=True)
class Lane:
    """One agent to train."""

    program: int
    setting: int  # of the program
    seed: int
    values: Values

    @property
    def id(self) -> str:
        """Its name in the files: the same in every order and chunking."""
        return f"p{self.program}-s{self.setting}-seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep that has passed all checks."""

    agent: ModuleType
    options: _cli.Options
    setup: "EnvSetup"
    programs: list[Program]
    settings: list[Values]
    score: str
    max_memory: float | None  # bytes
    max_lanes: int | None

    def lanes(self, program: Program) -> list[Lane]:
        """Every setting with every seed."""
        return [
            Lane(program.index, i, seed, values)
            for i, values in enumerate(self.settings)
            for seed in self.options.seeds
        ]


def split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the config, and of the environment's parameters (without their prefix)."""
    ours = {k: v for k, v in values.items() if not k.startswith(PARAMS)}
    theirs = {k.removeprefix(PARAMS): v for k, v in values.items() if k.startswith(PARAMS)}
    return ours, theirs


def check_settings(
    agent: ModuleType, config: Any, env: Any, env_params: Any, settings: Sequence[Values]
) -> None:
    """Raise ValueError, as `agent.check_config`, if any setting cannot work."""
    from train import _envs

    for values in settings:
        ours, theirs = split(values)
        params = _envs.with_train_params(env_params, theirs)
        agent.check_config(dataclasses.replace(config, **ours), env, params)


def run_program(
    sweep: Sweep,
    program: Program,
    lanes: Sequence[Lane],
    save: Callable[[list[dict[str, Any]], dict[str, float]], None],
    say: Callable[[str], None],
) -> None:
    """Train and evaluate `lanes` in chunks that fit; hand each finished chunk to `save`.

    Raises:
        DoesNotFit: not even one agent does.
    """
    agent, setup, config = sweep.agent, sweep.setup, program.config
    action, obs_shape = spaces.read(setup.env, setup.params)

    def train_of(values: dict[str, jax.Array]) -> Train[Any]:
        ours, theirs = split(values)
        params = dataclasses.replace(setup.params, **theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said once, before
            return agent.make_train(dataclasses.replace(config, **ours), setup.env, params)

    def act(lane: tuple[dict[str, jax.Array], Any], obs: jax.Array) -> jax.Array:
        ours, _ = split(lane[0])
        act = agent.make_act(dataclasses.replace(config, **ours), action, obs_shape)
        return act(lane[1], obs)

    spread = _devices.spread_agents(sweep.options, program.train)
    by_lane, everywhere = spread.by_lane, spread.everywhere
    num_devices = spread.mesh.size
    init = jax.jit(
        lambda values, keys: spread.each(lambda lane: train_of(lane[0]).init(lane[1]))(
            (values, keys)
        ),
        in_shardings=by_lane,
        out_shardings=by_lane,
    )

    def runner(num_updates: int) -> Any:
        each = spread.each(lambda lane: train_of(lane[0]).run(lane[1], num_updates))
        return jax.jit(
            lambda values, state: each((values, state)),
            in_shardings=by_lane,
            out_shardings=(by_lane, everywhere),
            donate_argnums=1,
        )

    def inputs_of(lanes: Sequence[Lane]) -> Any:
        return jax.device_put(inputs(lanes), by_lane)

    # from here on numbers of lanes are those of one device
    def shapes(num_lanes: int) -> tuple[Any, Any, Any]:
        some = list(itertools.islice(itertools.cycle(lanes), num_lanes * num_devices))
        values, keys = inputs(some)
        return values, keys, jax.eval_shape(init, values, keys)

    wanted = -(-len(lanes) // num_devices)
    budget = memory_budget(sweep.max_memory)
    most = min(wanted, max(1, (sweep.max_lanes or len(lanes)) // num_devices))
    if budget is not None:
        if jax.default_backend() == "cpu":  # its devices share one memory
            budget /= num_devices
        # XLA does not count constants: the environment's arrays, and their copies in two programs
        arrays = [x for x in jax.tree.leaves(setup.params) if isinstance(x, jax.Array)]
        budget = max(budget - 3 * num_bytes(arrays), 0.0)
        # no need to compile for agents whose states alone are too many
        state_bytes = num_bytes(shapes(1)[2]) // num_devices
        most = min(most, int(budget / state_bytes))
        if not most:
            raise too_large("one agent's state", state_bytes, budget)
    sizes = _run.chunk_sizes(program.train.num_updates)
    began = time.perf_counter()

    def compile_run(num_lanes: int) -> Any:
        values, _, state = shapes(num_lanes)
        return runner(sizes[0]).lower(values, state).compile()

    most, compiled = fit(compile_run, most, budget, "one agent")
    # chunks of nearly one size: fewer lanes are run twice to fill the last one
    num_lanes = -(-wanted // -(-wanted // most))
    values, keys, state = shapes(num_lanes)
    compiled_init = init.lower(values, keys).compile()
    runs = {sizes[0]: compiled if num_lanes == most else compile_run(num_lanes)}
    for size in set(sizes[1:]) - set(sizes[:1]):
        runs[size] = runner(size).lower(values, state).compile()
    over_episodes, eval_params, eval_keys = _report.episodes_of(
        setup, act, _run.EVAL_SEED, sweep.options.eval_episodes
    )
    eval_params, eval_keys = spread.on_every_device((eval_params, eval_keys))
    evaluation = jax.jit(
        spread.each(over_episodes, num_shared=2),
        in_shardings=(by_lane, everywhere, everywhere),
        out_shardings=everywhere,
    )
    policies = jax.eval_shape(agent.get_policy, state)

    def compile_evaluation(num: int) -> Any:
        some = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((num * num_devices, *x.shape[1:]), x.dtype),
            (values, policies),
        )
        return evaluation.lower(some, eval_params, eval_keys).compile()

    num_evaluated, evaluate = fit(compile_evaluation, num_lanes, budget, "one agent's evaluation")
    _memory.give_back()
    compile_s = time.perf_counter() - began

    num_lanes, num_evaluated = num_lanes * num_devices, num_evaluated * num_devices
    chunks = [lanes[i : i + num_lanes] for i in range(0, len(lanes), num_lanes)]
    for i, chunk in enumerate(chunks):
        began = time.perf_counter()
        full = list(itertools.islice(itertools.cycle(chunk), num_lanes))  # one shape for all
        values, keys = inputs_of(full)
        state = compiled_init(values, keys)
        diverged = np.zeros(num_lanes, bool)
        for size in sizes:
            state, metrics = runs[size](values, state)
            diverged |= non_finite(jax.device_get(metrics))
            if diverged.all():
                break
        policies = agent.get_policy(state)
        rows = evaluate_lanes(
            (values, policies), evaluate, num_evaluated, eval_params, eval_keys, by_lane
        )
        results = [
            {
                "lane": lane.id,
                "setting": lane.setting,
                "seed": lane.seed,
                "diverged": bool(diverged[j]),
                "stats": None if diverged[j] else _report.aggregate(rows, j, setup.endings),
            }
            for j, lane in enumerate(chunk)
        ]
        seconds = time.perf_counter() - began
        save(results, {"compile_s": compile_s if i == 0 else 0.0, "run_s": seconds})
        told = f"chunk {i + 1} of {len(chunks)}, {len(chunk)} agents at once: {seconds:.1f} s"
        if i == 0:
            planned = program_bytes(runs[sizes[0]])
            told += f", after compiling in {compile_s:.1f} s"
            told += (
                "" if planned is None else f" ({planned / 1e6:,.3g} MB of memory planned by XLA)"
            )
        say(told)


def inputs(lanes: Sequence[Lane]) -> tuple[dict[str, jax.Array], jax.Array]:
    """Real values by name, each (num_lanes,) float32, and keys: those of `train.<agent> --seed`."""
    values = {
        name: jnp.array([lane.values[name] for lane in lanes], jnp.float32)
        for name in lanes[0].values
    }
    return values, jnp.stack([jax.random.key(lane.seed) for lane in lanes])


def evaluate_lanes(
    lanes: Any,
    evaluate: Any,
    num_at_once: int,
    params: Any,
    keys: jax.Array,
    by_lane: jax.sharding.Sharding,
) -> _report.Rows:
    """Evaluate all lanes, leaves (num_lanes, ...), `num_at_once` in a call."""
    num_lanes = jax.tree.leaves(lanes)[0].shape[0]
    parts = []
    for first in range(0, num_lanes, num_at_once):
        index = np.minimum(np.arange(first, first + num_at_once), num_lanes - 1)
        some = jax.tree.map(lambda x, index=index: x[index], lanes)
        some = jax.device_put(some, by_lane)
        rows = _report.rows_of(jax.device_get(evaluate(some, params, keys)))
        parts.append({name: value[: num_lanes - first] for name, value in rows.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def non_finite(metrics: dict[str, np.ndarray]) -> np.ndarray:
    """Whether each lane (num_lanes,) has a metric (num_lanes, n) that is not finite.

    Of an update in which no episode ended, the means over episodes are NaN and do not count.
    """
    count = metrics.get("num_episodes")
    found = np.zeros(len(next(iter(metrics.values()))), bool)
    for name, values in metrics.items():
        bad = ~np.isfinite(values)
        if name in sinks.EPISODE_METRICS and count is not None:
            bad &= count > 0
        found |= bad.any(axis=1)
    return found


# memory -------------------------------------------------------------------------------------------


def memory_budget(max_memory: float | None) -> float | None:
    """Bytes that a program may take: as asked, or 0.8 of the device's; None where unknown."""
    available = device_memory()
    return max_memory or (None if available is None else 0.8 * available)


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def program_bytes(compiled: Any) -> int | None:
    """Bytes that XLA plans for a compiled program while it runs; None where it does not tell."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
        - stats.alias_size_in_bytes  # outputs in the place of donated arguments
    )


def too_large(what: str, need: int, budget: float) -> DoesNotFit:
    """The error of what does not fit."""
    return DoesNotFit(
        f"max_memory = {budget / 1e9:.3g} GB: {what} takes {need / 1e9:.3g} GB, lower num_envs, "
        "num_steps, buffer_size or eval_episodes, or raise --max-memory"
    )


def fit(
    compile_for: Callable[[int], Any], most: int, budget: float | None, what: str
) -> tuple[int, Any]:
    """Return (n, compiled for n lanes) with the n <= most, by halves at worst, that fits.

    Raises:
        DoesNotFit: one lane does not; `what` is its name.
    """
    n = most
    while True:
        compiled = compile_for(n)
        need = program_bytes(compiled)
        if need is None or budget is None or need <= budget:
            return n, compiled
        if n == 1:
            raise too_large(what, need, budget)
        n = max(1, min(n - 1, int(n * budget / need)))


# files --------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of all lanes that earlier chunks have written, by the lane's id.

    Raises:
        ValueError: a file is damaged.
    """
    finished: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            for result in json.loads(path.read_text())["lanes"]:
                finished[result["lane"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it, and its agents are trained again"
            ) from error
    return finished


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two specs, as "name: old, now new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in [*old, *(n for n in new if n not in old)]:
            found += differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
        return found
    return [] if old == new else [f"{where}: {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# what came out ------------------------------------------------------------------------------------


def interquartile_mean(x: Any, axis: int = -1) -> Any:
    """Mean without the lowest and the highest quarter, rounded down (Agarwal et al. 2021)."""
    return trim_mean(x, 0.25, axis=axis)


def interval(scores: np.ndarray, statistic: Callable[..., Any]) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a statistic of the seeds' scores (n,); None of one seed.

    Efron and Tibshirani (1993), section 13.3; as in Agarwal et al. (2021,
    https://arxiv.org/abs/2108.13264), where the seeds are what is resampled.
    """
    if len(scores) < 2:
        return None
    result = bootstrap(
        (scores,),
        statistic,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(result.low), float(result.high)


def summarise(
    programs: Sequence[Program],
    settings: Sequence[Values],
    results: dict[str, dict[str, Any]],
    score: str,
) -> list[dict[str, Any]]:
    """One row a setting, best first: by the IQM of its seeds' scores; any diverged seed comes last.

    Raises:
        ValueError: the environment does not tell the score.
    """
    rows = []
    for program in programs:
        for i, values in enumerate(settings):
            mine = [
                r
                for name, r in results.items()
                if name.startswith(f"p{program.index}-s{i}-seed") and r["setting"] == i
            ]
            ended = [r["stats"][SCORES[score]] for r in mine if not r["diverged"]]
            if any(value is None for value in ended):
                raise ValueError(
                    f"score = {score!r}: this environment's episodes do not tell it, take return"
                )
            scores = np.array(ended, np.float64)
            complete = len(scores) == len(mine) and len(mine) > 0
            mean_interval = interval(scores, np.mean) if complete else None
            iqm_interval = interval(scores, interquartile_mean) if complete else None
            rows.append(
                {
                    "program": program.index,
                    "setting": i,
                    "static": program.static,
                    "values": values,
                    "num_seeds": len(mine),
                    "num_diverged": len(mine) - len(scores),
                    "mean": float(scores.mean()) if complete else None,
                    "iqm": float(interquartile_mean(scores)) if complete else None,
                    "mean_low": mean_interval and mean_interval[0],
                    "mean_high": mean_interval and mean_interval[1],
                    "iqm_low": iqm_interval and iqm_interval[0],
                    "iqm_high": iqm_interval and iqm_interval[1],
                    "lowest": float(scores.min()) if complete else None,
                    "scores": ended,
                }
            )
    return sorted(rows, key=lambda row: (row["iqm"] is None, -(row["iqm"] or 0.0)))


def plot(path: Path, title: str, rows: Sequence[dict[str, Any]], axes: Sequence[Axis]) -> None:
    """Draw the score over every swept name: seeds as dots, IQM and its interval over them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    statics = list(rows[0]["static"])
    names = [axis.name for axis in axes] + statics
    names = names or ["setting"]
    figure = Figure(figsize=(4.6 * len(names), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    ranked = [row for row in rows if row["iqm"] is not None]
    groups = sorted({row["program"] for row in rows})
    for panel, name in zip(panels, names, strict=True):
        axis = next((axis for axis in axes if axis.name == name), None)
        labels: list[str] = []
        if axis is None:
            told = [str(row["static"].get(name, "")) for row in ranked]
            labels = sorted(set(told), key=told.index)
            x = np.array([labels.index(text) for text in told], float)
        else:
            x = np.array([row["values"][name] for row in ranked])
        is_log = axis is not None and _is_log(axis)
        if axis is None or axis.kind == "grid":
            x = 10.0 ** side_by_side(np.log10(x)) if is_log else side_by_side(x)
        for row, place in zip(ranked, x, strict=True):
            colour = f"C{groups.index(row['program']) % 10}"
            error = None
            if row["iqm_low"] is not None:
                # rounding may put the mean of equal scores beyond its own interval
                below, above = row["iqm"] - row["iqm_low"], row["iqm_high"] - row["iqm"]
                error = [[max(below, 0.0)], [max(above, 0.0)]]
            panel.errorbar(
                [place], [row["iqm"]], yerr=error, fmt="o", ms=5, capsize=2, lw=1, color=colour
            )
            seeds = [place] * len(row["scores"])
            panel.scatter(seeds, row["scores"], s=7, color="black", alpha=0.5, zorder=3, lw=0)
        if is_log:
            panel.set_xscale("log")
        if axis is None:
            panel.set_xticks(range(len(labels)), labels)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(title)
    if len(groups) > 1:
        of = {row["program"]: row["static"] for row in rows}
        for i, group in enumerate(groups):
            label = ", ".join(f"{k} {v}" for k, v in of[group].items())
            panels[0].scatter([], [], color=f"C{i % 10}", label=label)
        panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle("small: seeds; large: their IQM with its 95 % interval", fontsize=10)
    figure.savefig(path, dpi=130)


def side_by_side(x: np.ndarray) -> np.ndarray:
    """Move apart those (n,) that share a place, by at most a quarter of the way to the next one."""
    places = np.unique(x)
    room = 0.25 * np.diff(places).min() if len(places) > 1 else 0.25
    moved = x.copy()
    for place in places:
        (same,) = np.nonzero(x == place)
        moved[same] += np.linspace(-room, room, len(same)) if len(same) > 1 else 0.0
    return moved


def _is_log(axis: Axis) -> bool:
    """Whether the values of an axis are better seen on a logarithmic scale."""
    return axis.kind == "log_uniform" or (
        axis.kind == "grid" and min(axis.values) > 0 and max(axis.values) >= 10 * min(axis.values)
    )
