"""Sweep settings: `python -m train.sweep --agent ppo --grid learning_rate=1e-4,1e-3 --num-seeds 4`.

All seeds and all real-valued settings train side by side in one compiled program; sizes and
switches (--each) make programs of their own. Takes every option of `train.<agent>`:

    python -m train.sweep --agent ppo --env CartPole-v1 --num-seeds 4 \\
        --grid learning_rate=1e-4,3e-4,1e-3 --log-uniform ent_coef=1e-4:1e-1 --num-samples 16 \\
        --each hidden=64,64 hidden=128,128

The same command again goes on where an interrupted sweep stopped. runs/<name>/ holds
  sweep.json     what is swept: enough to repeat it
  chunks/        the results of the agents that are done, a file for each chunk
  settings.csv   one row for each setting, best first; agents.csv one for each agent
  summary.json   the same with the best settings, and on what they ran
  sweep.png      the score over each setting
"""

import argparse
import csv
import dataclasses
import importlib
import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

import jaxrl
from jaxrl import agents
from jaxrl.checks import check_choice, check_count, check_real
from train import _cli, _devices, _run

if TYPE_CHECKING:
    from train import _sweep

FORMAT = "jaxrl sweep 1"
FILES = ("sweep.json", "chunks", "settings.csv", "agents.csv", "summary.json", "sweep.png")
MAX_PRINTED = 20


def parser() -> argparse.ArgumentParser:
    """The options of this script; all others are those of the agent's."""
    result = argparse.ArgumentParser(
        prog="python -m train.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    result.add_argument("--agent", default="ppo", help=f"one of {', '.join(agents.NAMES)}")
    pairs: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    result.add_argument("--grid", metavar="NAME=A,B", help="all of these values", **pairs)
    result.add_argument("--uniform", metavar="NAME=LOW:HIGH", help="random values", **pairs)
    result.add_argument(
        "--log-uniform", metavar="NAME=LOW:HIGH", help="random, uniform in the logarithm", **pairs
    )
    result.add_argument(
        "--num-samples", default=None, help="random values of each range, beside every grid point"
    )
    result.add_argument("--sample-seed", default="0", help="decides the random values")
    result.add_argument(
        "--each",
        metavar="NAME=VALUE",
        help="sizes and switches, a program for each: hidden=64,64 hidden=128,128",
        **pairs,
    )
    result.add_argument(
        "--score", default="return", help="what is best: return, discounted_return, success_rate"
    )
    result.add_argument(
        "--max-memory", metavar="GB", help="of a program; by default 0.8 of the device's"
    )
    result.add_argument("--max-agents", metavar="N", help="at once, whatever the memory")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep as the command line says; return the exit code.

    0: done. 1: every agent diverged. 2: wrong input. 130: stopped by Ctrl-C, to be gone on with.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    return _cli.exit_code(lambda: prepare(argv))


def prepare(argv: list[str]) -> Callable[[], int]:
    """Check everything that can be wrong; nothing is compiled yet.

    Raises:
        ValueError, OSError: wrong input, in one sentence.
    """
    own = parser()
    own.error = _refuse  # pyright: ignore[reportAttributeAccessIssue]
    known, rest = own.parse_known_args(argv)
    check_choice("agent", known.agent, agents.NAMES)
    agent = importlib.import_module(f"jaxrl.agents.{known.agent}")
    if {"-h", "--help"} & set(rest):
        own.print_help()
        print()
    for name in ("--resume", "--checkpoint-every"):
        if any(argument.split("=")[0] == name for argument in rest):
            raise ValueError(
                f"{name} is for single runs: a sweep that was stopped goes on by the same command"
            )
    options, config = _cli.parse(agent, rest)
    if options.list_envs:
        return lambda: print(_cli.list_envs()) or 0
    options.check()
    check_one_process(options)
    _devices.make_cpu_devices(options)
    from train import _envs, _sweep  # takes seconds (gymnax): wrong options are refused before

    axes = _sweep.parse_axes(agent.Config, known.grid, known.uniform, known.log_uniform)
    each = _sweep.parse_each(agent.Config, known.each)
    check_not_given(rest, [*(axis.name for axis in axes), *each])
    num_samples = count_samples(known.num_samples, axes)
    sample_seed = _whole("sample_seed", known.sample_seed, minimum=0)
    check_choice("score", known.score, list(_sweep.SCORES))
    max_memory = None if known.max_memory is None else 1e9 * _real("max_memory", known.max_memory)
    max_agents = None if known.max_agents is None else _whole("max_agents", known.max_agents)

    statics = [dict(zip(each, values, strict=True)) for values in itertools.product(*each.values())]
    num_settings = len(statics) * max(1, num_samples)
    for axis in axes:
        num_settings *= len(axis.values) if axis.kind == "grid" else 1
    if num_settings * options.num_seeds > _sweep.MAX_LANES:
        raise ValueError(
            f"{num_settings} settings with num_seeds = {options.num_seeds} are "
            f"{num_settings * options.num_seeds} agents, more than {_sweep.MAX_LANES}: take fewer"
        )
    settings = _sweep.make_settings(axes, num_samples, sample_seed)

    env_kwargs = _cli.parse_pairs("env_kwargs", options.env_kwargs)
    train_params = _cli.parse_pairs("train_params", options.train_params)
    env, env_params = _envs.probe(options.env, env_kwargs)
    env_params = _envs.with_train_params(env_params, train_params)
    configs = [dataclasses.replace(config, **static) for static in statics]
    for one in configs:
        _sweep.check_settings(agent, one, env, env_params, settings)
    spec = {
        "format": FORMAT,
        "agent": known.agent,
        "env": options.env,
        "env_kwargs": env_kwargs,
        "train_params": train_params,
        "seed": options.seed,
        "num_seeds": options.num_seeds,
        "eval_episodes": options.eval_episodes,
        "score": known.score,
        "axes": {axis.name: [axis.kind, *axis.values] for axis in axes},
        "num_samples": num_samples,
        "sample_seed": sample_seed,
        "each": each,
        "config": dataclasses.asdict(config),
        "settings": settings,
        "jaxrl": jaxrl.__version__,
        "jax": jax.__version__,
    }
    name = options.name or f"{options.env}__{known.agent}__sweep"
    folder = Path(options.runs_dir) / name
    finished = open_folder(folder, spec, options.overwrite)

    setup = _envs.make_env(options.env, **env_kwargs)
    setup = dataclasses.replace(setup, params=_envs.with_train_params(setup.params, train_params))
    programs = [
        _sweep.Program(i, static, one, agent.make_train(one, setup.env, setup.params))
        for i, (static, one) in enumerate(zip(statics, configs, strict=True))
    ]
    for program in programs:
        _run.check_memory(_devices.spread_agents(options, program.train), 1)
    if options.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sweep = _sweep.Sweep(
        agent, options, setup, programs, settings, known.score, max_memory, max_agents
    )
    make_folder(folder, spec, fresh=finished is None)
    return lambda: execute(sweep, axes, spec, folder, finished or {})


def check_one_process(options: _cli.Options) -> None:
    """Raise ValueError if several processes are asked for, or an agent over several devices."""
    single = {"coordinator": None, "distributed": None, "env_devices": 1, "net_devices": None}
    for name, default in single.items():
        value = getattr(options, name)
        if value != default:
            raise ValueError(
                f"{name} = {value!r} is for single runs: a sweep is of one process, which spreads "
                "agents over its devices (--seed-devices)"
            )


def _refuse(message: str) -> None:
    raise ValueError(f"{message} (--help shows all arguments)")


def _whole(name: str, text: str, minimum: int = 1) -> int:
    try:
        value = _cli.whole(text)
    except ValueError:
        raise ValueError(f"{name} = {text!r} must be an integer >= {minimum}") from None
    check_count(name, value, minimum)
    return value


def _real(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} = {text!r} must be a number") from None
    check_real(name, value, 0.0, float("inf"), above=True)
    return value


def count_samples(text: str | None, axes: "Sequence[_sweep.Axis]") -> int:
    """The number of samples of each range; 0 without ranges.

    Raises:
        ValueError: it is no count, or there are ranges without it or it without ranges.
    """
    ranges = [axis.name for axis in axes if axis.kind != "grid"]
    if text is None:
        if ranges:
            raise ValueError(f"num_samples must be given with a range, here of {ranges[0]}")
        return 0
    if not ranges:
        raise ValueError(
            f"num_samples = {text} needs something to draw: give --uniform or --log-uniform "
            "name=low:high"
        )
    return _whole("num_samples", text)


def check_not_given(rest: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError if a swept setting has a value on the command line as well."""
    for arg in rest:
        flag = arg.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if arg.startswith("--") and flag in names:
            raise ValueError(f"{flag} is swept and set by {arg.partition('=')[0]}: give it once")


# the folder ---------------------------------------------------------------------------------------


def open_folder(
    folder: Path, spec: dict[str, Any], overwrite: bool
) -> dict[str, dict[str, Any]] | None:
    """Return what an earlier sweep of the same spec has finished; None where there is none.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: it holds another sweep, or its files are damaged.
    """
    from train import _sweep

    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} exists and is not a plain folder: choose another --name")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        old = json.loads((folder / "sweep.json").read_text())
        is_sweep = old["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        old, is_sweep = {}, False
    if not is_sweep:
        raise FileExistsError(
            f"{folder} exists and does not hold a sweep: choose another --name or --runs-dir"
        )
    if overwrite:
        return None
    changed = _sweep.differences(old, json.loads(json.dumps(spec)))
    if changed:
        raise ValueError(
            f"{folder} holds another sweep ({'; '.join(changed[:3])}): choose another --name, or "
            "give --overwrite to replace it"
        )
    return _sweep.read_finished(folder / "chunks")


def make_folder(folder: Path, spec: dict[str, Any], *, fresh: bool) -> None:
    """Make the folder, or of an earlier sweep remove the files that a sweep writes if `fresh`."""
    from train import _sweep

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES if fresh else ():
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (folder / "chunks").mkdir(exist_ok=True)
        if fresh:
            _sweep.write_atomic(folder / "sweep.json", spec)
    except OSError as error:
        raise OSError(
            f"sweep folder {folder} cannot be written ({error.strerror}): choose another --runs-dir"
        ) from error


def execute(
    sweep: "_sweep.Sweep",
    axes: "Sequence[_sweep.Axis]",
    spec: dict[str, Any],
    folder: Path,
    finished: dict[str, dict[str, Any]],
) -> int:
    """Train what is not finished, then tell what came out of all; return the exit code."""
    from train import _sweep

    console = Console()
    options = sweep.options
    lanes = {program.index: sweep.lanes(program) for program in sweep.programs}
    wanted = {lane.id for some in lanes.values() for lane in some}
    results = {name: result for name, result in finished.items() if name in wanted}

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(
        f"{spec['agent']} on {options.env}: {len(sweep.programs)} program(s) of "
        f"{len(sweep.settings)} setting(s) with {options.num_seeds} seed(s), {len(wanted)} agents"
        + (f", {len(results)} of them done before" if results else "")
    )
    try:
        for program in sweep.programs:
            left = [lane for lane in lanes[program.index] if lane.id not in results]
            if not left:
                continue
            told = ", ".join(f"{name} {value}" for name, value in program.static.items())
            say(
                f"program {program.index + 1} of {len(sweep.programs)}{': ' if told else ''}{told}"
                f": {len(left)} agents of {program.train.total_steps:,} steps, compiling"
            )

            def save(some: list[dict[str, Any]], seconds: dict[str, float]) -> None:
                path = folder / "chunks" / f"{some[0]['lane']}-{len(some)}.json"
                _sweep.write_atomic(path, {"lanes": some, **seconds, **_run.machine()})
                results.update({result["lane"]: result for result in some})

            _sweep.run_program(sweep, program, left, save, say)
    except KeyboardInterrupt:
        say(
            f"interrupted: {len(results)} of {len(wanted)} agents are done and kept in {folder}; "
            "the same command goes on with the others"
        )
        return 130
    except _sweep.DoesNotFit as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = _sweep.summarise(sweep.programs, sweep.settings, results, sweep.score)
    write_tables(folder, sweep, lanes, rows, results)
    best = rows[0] if rows[0]["iqm"] is not None else None
    summary = {
        "score": sweep.score,
        "num_agents": len(wanted),
        "num_diverged": sum(row["num_diverged"] for row in rows),
        "env_steps_total": sum(
            program.train.total_steps * len(lanes[program.index]) for program in sweep.programs
        ),
        "eval_episodes": options.eval_episodes,
        "eval_seed": _run.EVAL_SEED,
        "confidence": _sweep.CONFIDENCE,
        "best": best,
        "best_command": best and best_command(spec, sweep, best),
        "settings": rows,
        **_run.machine(),
    }
    _sweep.write_atomic(folder / "summary.json", summary)
    names = [axis.name for axis in axes]
    console.print(table(f"{sweep.score}, best first", names, rows))
    if len(rows) > MAX_PRINTED:
        say(f"... and {len(rows) - MAX_PRINTED} more in {folder / 'settings.csv'}")
    if best is None:
        say("every setting has a seed that diverged: take lower learning rates")
        return 1
    _sweep.plot(folder / "sweep.png", f"{sweep.score} on {options.env}", rows, axes)
    equal = sum(row["iqm"] == best["iqm"] for row in rows)
    told = f"best of {len(rows)}" + (f", one of {equal} that are equal" if equal > 1 else "")
    say(f"{told}, on the episodes by which it was chosen: {summary['best_command']}")
    say(str(folder))
    return 0


def best_command(spec: dict[str, Any], sweep: "_sweep.Sweep", best: dict[str, Any]) -> str:
    """The command that trains the best setting by itself."""
    from train import _sweep

    ours, theirs = _sweep.split(best["values"])
    options = sweep.options
    config = dataclasses.replace(sweep.programs[best["program"]].config, **ours)
    _, preset = _cli.parse(sweep.agent, ["--env", options.env])
    command = ["python", "-m", f"train.{spec['agent']}", "--env", options.env]
    command += ["--seed", str(options.seed), "--num-seeds", str(options.num_seeds)]
    if options.env_kwargs:
        command += ["--env-kwargs", *options.env_kwargs]
    params = {**spec["train_params"], **theirs}
    if params:
        command += ["--train-params", *(f"{name}={value}" for name, value in params.items())]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = field.name.replace("_", "-")
        if value == getattr(preset, field.name):
            continue
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{flag}", *map(str, values)]
    return shlex.join(command)


def write_tables(
    folder: Path,
    sweep: "_sweep.Sweep",
    lanes: "dict[int, list[_sweep.Lane]]",
    rows: Sequence[dict[str, Any]],
    results: dict[str, dict[str, Any]],
) -> None:
    """Write settings.csv and agents.csv."""
    statics = list(sweep.programs[0].static)
    reals = list(sweep.settings[0])
    figures = ["num_seeds", "num_diverged", "mean", "mean_low", "mean_high", "iqm", "iqm_low"]
    figures += ["iqm_high", "lowest"]
    with (folder / "settings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["program", "setting", *statics, *reals, *figures])
        for row in rows:
            settings = [*row["static"].values(), *row["values"].values()]
            figure = [row[name] for name in figures]
            writer.writerow([row["program"], row["setting"], *settings, *figure])
    stats = next((r["stats"] for r in results.values() if r["stats"] is not None), {})
    columns = [name for name, value in stats.items() if not isinstance(value, dict)]
    with (folder / "agents.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["program", "setting", "seed", *statics, *reals, "diverged", *columns])
        for program in sweep.programs:
            for lane in lanes[program.index]:
                result = results[lane.id]
                found = result["stats"] or {}
                writer.writerow(
                    [
                        *(program.index, lane.setting, lane.seed),
                        *(*program.static.values(), *lane.values.values()),
                        int(result["diverged"]),
                        *(found.get(name) for name in columns),
                    ]
                )


def table(title: str, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> Table:
    """The best settings for people."""
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    statics = list(rows[0]["static"])
    for head in [*statics, *names]:
        result.add_column(head, justify="right", overflow="fold")
    for head in ["IQM", "95 %", "mean", "seeds"]:
        result.add_column(head, justify="right", no_wrap=True)
    for row in rows[:MAX_PRINTED]:
        seeds = str(row["num_seeds"])
        if row["num_diverged"]:
            seeds += f", {row['num_diverged']} diverged"
        between = "-"
        if row["iqm_low"] is not None:
            between = f"{row['iqm_low']:.4g} .. {row['iqm_high']:.4g}"
        result.add_row(
            *(str(row["static"][name]) for name in statics),
            *(f"{row['values'][name]:.6g}" for name in names),
            "-" if row["iqm"] is None else f"{row['iqm']:.4g}",
            between,
            "-" if row["mean"] is None else f"{row['mean']:.4g}",
            seeds,
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
