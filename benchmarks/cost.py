"""What learning costs, and what a layer costs.

    python -m benchmarks.cost runs --json benchmarks/results/cost_runs.json \
        --plot docs/cost_runs.png
    python -m benchmarks.cost layers --json benchmarks/results/cost_layers.json \
        --plot docs/cost_layers.png

`runs` trains every agent on every environment it has tuned settings for, and gives steps per
second, FLOPs per environment step, energy of a million steps with its method, and the return and
success reached: the return-per-joule picture. `--pairs` and `--total-steps` choose and shorten.

`layers` is the paper's own experiment on this device: jitted dense layers and convolutions of equal
FLOPs and different shape, their time against FLOPs and against alpha-FLOPs. It prints what comes
out, for or against the formula. Forward pass only, float32; a time is the median of single calls.
"""

import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from jaxrl import agents
from jaxrl.checks import check_count, check_real
from jaxrl.cost import alpha_flops
from jaxrl.cost.alpha_flops import Shape
from train import _cli, _presets, _run


@dataclass
class Runs:
    """Train every agent on every environment; cost beside return."""

    pairs: tuple[str, ...] = ()
    """agent:environment each, e.g. ppo:CartPole-v1; by default all with tuned settings."""
    num_seeds: int = 4
    """Agents of a run, side by side."""
    total_steps: int | None = None
    """Environment steps of a seed; by default those of the preset."""
    eval_episodes: int = 512
    """Episodes of the evaluation of each seed."""
    watts_per_core: float = 10.0
    """For the estimate where there is no energy counter."""
    json: Path | None = None
    """File to write the numbers to."""
    plot: Path | None = None
    """PNG to draw."""


@dataclass
class Layers:
    """Layers of equal FLOPs and different shape: time, FLOPs, alpha-FLOPs."""

    macs: tuple[float, ...] = (1e6, 1e7, 1e8)
    """Multiply-accumulates of a layer, about: one group of shapes for each."""
    num_repeats: int = 30
    """Calls of which the median is taken."""
    json: Path | None = None
    """File to write the numbers to."""
    plot: Path | None = None
    """PNG to draw."""


COLUMNS = (
    "agent",
    "env",
    "env_steps_total",
    "steps_per_s",
    "parameters",
    "flops_per_env_step",
    "flops_network",
    "flops_environment",
    "flops_other",
    "alpha_flops",
    "flops_per_s",
    "energy_J",
    "energy_low_J",
    "energy_high_J",
    "J_per_1M_steps",
    "J_per_1M_steps_low",
    "J_per_1M_steps_high",
    "energy_method",
    "compile_energy_J",
    "compile_s",
    "run_s",
    "eval_return_mean",
    "eval_return_std",
    "success_rate",
    "flops_warnings",
)


def main(options: Runs | Layers) -> dict[str, Any]:
    """Measure, print, write."""
    result = runs(options) if isinstance(options, Runs) else layers(options)
    result = write(options, result)
    if options.plot:
        (draw_runs if isinstance(options, Runs) else draw_layers)(result, options.plot)
    return result


def write(options: Runs | Layers, result: dict[str, Any]) -> dict[str, Any]:
    """Add the machine, and write the JSON file if one is wanted."""
    result = {"machine": _run.machine(), **result}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


# runs ---------------------------------------------------------------------------------------------


def all_pairs() -> list[tuple[str, str]]:
    """(agent, environment) of every agent there is and every preset it has."""
    return [(agent, env) for agent in agents.NAMES for env in _presets.PRESETS.get(agent, {})]


def runs(options: Runs) -> dict[str, Any]:
    """Train all pairs through the training script, each in a folder of its own."""
    pairs = [tuple(pair.split(":", 1)) for pair in options.pairs] or all_pairs()
    rows = []
    for agent, env in pairs:
        module = importlib.import_module(f"jaxrl.agents.{agent}")
        with tempfile.TemporaryDirectory() as folder:
            argv = ["--env", env, "--runs-dir", folder, "--name", "run", "--no-progress"]
            argv += ["--no-animate", "--num-seeds", str(options.num_seeds)]
            argv += ["--eval-episodes", str(options.eval_episodes)]
            argv += ["--watts-per-core", str(options.watts_per_core)]
            if options.total_steps:
                argv += ["--total-steps", str(options.total_steps)]
            code = _run.main(module, argv)
            path = Path(folder) / "run" / "summary.json"
            if code:
                print(f"{agent} on {env} failed with exit code {code}: left out")
                continue
            summary = json.loads(path.read_text())
        rows.append({name: summary.get(name) for name in COLUMNS})
        write(options, {"options": _plain(options), "rows": rows})  # a stop loses one row at most
    print(runs_table(rows))
    return {"options": _plain(options), "rows": rows}


def runs_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| agent | environment | return | success [%] | steps/s | FLOPs per step | "
        "energy of 1M steps [J] | method |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        success = row["success_rate"]
        joules = "not known"
        if row["J_per_1M_steps"] is not None:
            joules = f"{row['J_per_1M_steps']:,.4g}"
            if row["J_per_1M_steps_low"] != row["J_per_1M_steps_high"]:
                joules += (
                    f" ({row['J_per_1M_steps_low']:,.4g} to {row['J_per_1M_steps_high']:,.4g})"
                )
        bound = ">= " if row["flops_warnings"] else ""
        lines.append(
            f"| {row['agent']} | {row['env']} | {row['eval_return_mean']:.4g} "
            f"| {'' if success is None else f'{100 * success:.1f}'} | {row['steps_per_s']:,.0f} "
            f"| {bound}{row['flops_per_env_step']:,.0f} | {joules} | {row['energy_method']} |"
        )
    return "\n".join(lines)


def draw_runs(result: dict[str, Any], path: Path) -> None:
    """Return against energy, a panel for each environment; up and to the left is better."""
    rows = [row for row in result["rows"] if row["energy_J"] is not None]
    envs = list(dict.fromkeys(row["env"] for row in rows))
    if not envs:
        print("nothing to draw: no energy is known")
        return
    columns = min(4, len(envs))
    lines = -(-len(envs) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(envs) :]:
        axes.set_axis_off()
    for axes, env in zip(panels[: len(envs)], envs, strict=True):
        for row in (row for row in rows if row["env"] == env):
            J, low, high = row["energy_J"], row["energy_low_J"], row["energy_high_J"]
            axes.errorbar(
                J,
                row["eval_return_mean"],
                xerr=[[J - low], [high - J]],
                yerr=row["eval_return_std"],
                fmt="o",
                capsize=3,
                label=row["agent"],
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(env)
        axes.set_xlabel("energy of training, all seeds [J]")
        axes.set_ylabel("return, evaluated")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    methods = "; ".join(dict.fromkeys(row["energy_method"] for row in rows))
    figure.suptitle(methods, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


# layers -------------------------------------------------------------------------------------------


def grid(macs: float) -> list[tuple[int, ...]]:
    """Layers of about `macs` each, (H, W, Cin, Cout, K1, K2, batch): from one extreme to the other.

    Dense: batch against width. Convolutions: spatial size against channels, and against kernels.
    """
    found = []
    for batch in (1, 8, 64, 512, 4096):
        width = max(1, round((macs / batch) ** 0.5))
        found.append((1, 1, width, width, 1, 1, batch))
    for kernel in (1, 3, 5):
        for side in (8, 16, 32, 64, 128):
            channels = max(1, round((macs / (side * side * kernel * kernel)) ** 0.5))
            found.append((side, side, channels, channels, kernel, kernel, 1))
    counts = [float(Shape(*row).macs) for row in found]
    # whole numbers of channels: where they are few the layer is another one
    kept = [row for row, n in zip(found, counts, strict=True) if abs(n / macs - 1) < 0.1]
    return list(dict.fromkeys(kept))


def layers(options: Layers) -> dict[str, Any]:
    """Time all layers; what FLOPs and alpha-FLOPs say about the times."""
    wanted = [(macs, row) for macs in options.macs for row in grid(macs)]
    shape = Shape(*np.array([row for _, row in wanted], float).T)
    ms = alpha_flops.time_layers(shape, options.num_repeats)
    group = np.array([macs for macs, _ in wanted])
    area = np.asarray(shape.K1) * np.asarray(shape.K2) > 1
    fit = alpha_flops.fit_layers(shape, ms, source=f"this device ({jax.default_backend()})")
    index = {
        "flops": shape.flops,
        "alpha_flops": alpha_flops.alpha_flops(shape),
        "alpha_flops_replication": alpha_flops.alpha_flops(shape, alpha_flops.REPLICATION),
        "predicted_ms": alpha_flops.predicted_ms(shape, fit.constants),
    }
    selections = {
        "all": np.ones(len(ms), bool),
        "dense and 1 x 1": ~area,
        "larger kernels": area,
        **{f"{macs:.0e} MACs": group == macs for macs in options.macs},
    }
    ranks: list[dict[str, Any]] = []
    for name, chosen in selections.items():
        row: dict[str, Any] = {"layers": name, "num_layers": int(chosen.sum())}
        for key, values in index.items():
            # of equal FLOPs: rounded channels are no ranking
            says_nothing = key == "flops" and len(set(group[chosen])) == 1
            row[f"spearman_{key}"] = None if says_nothing else _spearman(ms[chosen], values[chosen])
        row["slowest_over_fastest"] = float(ms[chosen].max() / ms[chosen].min())
        ranks.append(row)
    result = {
        "options": _plain(options),
        "rows": [
            {"macs_wanted": macs, "H_W_Cin_Cout_K1_K2_batch": list(row), "measured_ms": float(t)}
            | {key: float(values[i]) for key, values in index.items()}
            for i, ((macs, row), t) in enumerate(zip(wanted, ms, strict=True))
        ],
        "ranks": ranks,
        "fit": dataclasses.asdict(fit),
    }
    result["verdict"] = verdict(result)
    print(layers_table(result))
    return result


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    from scipy.stats import spearmanr

    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.asarray(spearmanr(x, y)[0]))


def verdict(result: dict[str, Any]) -> list[str]:
    """What the measurement says, for or against the formula, in sentences."""
    said = []
    for row in result["ranks"]:
        plain, published = row["spearman_flops"], row["spearman_alpha_flops"]
        if published is None:
            continue
        if plain is None:
            said.append(
                f"{row['num_layers']} layers of equal FLOPs ({row['layers']}): the slowest takes "
                f"{row['slowest_over_fastest']:.1f} times as long as the fastest; the published "
                f"alpha-FLOPs rank them with Spearman {published:.2f}."
            )
            continue
        gain = published - plain
        word = "better than" if gain > 0.02 else "worse than" if gain < -0.02 else "as well as"
        said.append(
            f"{row['num_layers']} layers ({row['layers']}): the published alpha-FLOPs rank the "
            f"times {word} plain FLOPs (Spearman {published:.2f} and {plain:.2f})."
        )
    errors, constants = result["fit"]["errors"], result["fit"]["constants"]
    said.append(
        "Fitted to this device, the formula predicts layers it has not seen to "
        f"{100 * errors['cv_median']:.0f} % in the median and {100 * errors['cv_p90']:.0f} % in "
        f"nine of ten; its floor is {constants['floor_ms']:.2g} ms."
    )
    return said


def layers_table(result: dict[str, Any]) -> str:
    """Ranks as Markdown, and the verdict."""
    keys = ("flops", "alpha_flops", "alpha_flops_replication", "predicted_ms")
    lines = [
        "| layers | number | slowest / fastest | Spearman of time with FLOPs | "
        "with alpha-FLOPs, published | replication | fitted here |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["ranks"]:
        values = [row[f"spearman_{key}"] for key in keys]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        start = f"| {row['layers']} | {row['num_layers']} | {row['slowest_over_fastest']:.1f} "
        lines.append(f"{start}| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *result["verdict"]])


def draw_layers(result: dict[str, Any], path: Path) -> None:
    """Measured time against FLOPs, alpha-FLOPs as published, and the fit."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    labels = {
        "flops": "FLOPs",
        "alpha_flops": "alpha-FLOPs, published constants",
        "predicted_ms": "time by the formula fitted here [ms]",
    }
    kernels = np.array([row["H_W_Cin_Cout_K1_K2_batch"][4] for row in result["rows"]])
    ms = np.array([row["measured_ms"] for row in result["rows"]])
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        x = np.array([row[name] for row in result["rows"]])
        for kernel in np.unique(kernels):
            chosen = kernels == kernel
            axes.loglog(x[chosen], ms[chosen], "o", ms=4, label=f"{kernel} x {kernel}")
        axes.xaxis.set_minor_formatter(NullFormatter())  # of two decades they would overlap
        axes.set_xlabel(label)
        axes.set_ylabel("measured [ms]")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, title="kernel")
    device = ", ".join(dict.fromkeys(result["machine"]["devices"]))
    figure.suptitle(f"{device}, float32, forward, median of single calls")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _plain(options: Any) -> dict[str, Any]:
    """Options as JSON takes them; where the files go is no part of the result."""
    chosen = dataclasses.asdict(options)
    return {k: v for k, v in chosen.items() if k not in ("json", "plot")}


Command = (
    Annotated[Runs, tyro.conf.subcommand("runs")]
    | Annotated[Layers, tyro.conf.subcommand("layers")]
)


def cli(argv: list[str]) -> int:
    """Measure as the command line says; return the exit code (2: wrong input)."""
    return _cli.exit_code(lambda: prepare(argv))


def prepare(argv: list[str]) -> Callable[[], int]:
    """Check the command line, then return what to do.

    Raises:
        ValueError: wrong input, in one sentence.
    """
    options = _cli.read(Command, argv, prog="python -m benchmarks.cost", description=__doc__)
    if isinstance(options, Runs):
        for pair in options.pairs:
            agent, colon, _ = pair.partition(":")
            if not colon or agent not in agents.NAMES:
                known = ", ".join(agents.NAMES)
                raise ValueError(f"pairs: {pair!r} must be agent:environment, agent one of {known}")
    else:
        for macs in options.macs:
            check_real("macs", macs, 1e4, 1e12)
        check_count("num_repeats", options.num_repeats)

    def run() -> int:
        main(options)
        return 0

    return run


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
