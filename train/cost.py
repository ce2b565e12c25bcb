"""What training would cost, without training: `python -m train.cost --agent ppo --env CartPole-v1`.

Prints parameters, FLOPs (split into network, environment and the rest) and alpha-FLOPs, and after a
calibration the time and energy to expect, with their error. Takes every option of `train.<agent>`:

    python -m train.cost --agent ppo --env MicroRacer-v0 --total-steps 1e7
    python -m train.cost --agent ppo --env MicroRacer-v0 --calibrate calibration.json
    python -m train.cost --agent ppo --env MicroRacer-v0 --calibration calibration.json
    python -m train.cost --run runs/NAME --model-card card.md --g-per-kwh 300

Times and joules hold for the device, agent and environment that the calibration was made with.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxrl import agents
from jaxrl.checks import check_choice, check_real
from train import _cli


def parser() -> argparse.ArgumentParser:
    """The options of this script; all others are those of the agent's."""
    result = argparse.ArgumentParser(
        prog="python -m train.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    result.add_argument("--agent", default="ppo", help=f"one of {', '.join(agents.NAMES)}")
    result.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="train shortly in several sizes, write FILE"
    )
    result.add_argument("--calibrate-seconds", type=float, default=3.0, help="of each short run")
    result.add_argument(
        "--calibration", type=Path, metavar="FILE", help="predict time and energy by FILE"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the columns to FILE")
    result.add_argument("--run", type=Path, metavar="FOLDER", help="a run's folder, for its card")
    result.add_argument(
        "--model-card",
        type=Path,
        metavar="FILE",
        help="write the co2_eq_emissions block of --run to FILE",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the command line asks for; return the exit code (2: wrong input)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return _cli.exit_code(lambda: prepare(argv))


def prepare(argv: list[str]) -> Callable[[], int]:
    """Check everything, then return what to do.

    Raises:
        ValueError, OSError: wrong input, in one sentence.
    """
    known, rest = parser().parse_known_args(argv)
    check_choice("agent", known.agent, agents.NAMES)
    check_real("calibrate_seconds", known.calibrate_seconds, 0.0, 3600.0, above=True)
    if (known.run is None) != (known.model_card is None):
        raise ValueError("--run FOLDER and --model-card FILE go together: the card is of a run")
    if {"-h", "--help"} & set(rest):
        parser().print_help()
        print()
    agent = importlib.import_module(f"jaxrl.agents.{known.agent}")
    options, config = _cli.parse(agent, rest)
    options.check()
    env_kwargs = _cli.parse_pairs("env_kwargs", options.env_kwargs)
    train_params = _cli.parse_pairs("train_params", options.train_params)
    from train import _cost, _envs  # takes seconds (gymnax): wrong options are refused before

    if known.run is not None:
        card = _cost.model_card(_cost.read_summary(known.run / "summary.json"), options.g_per_kwh)
        return lambda: (known.model_card.write_text(f"---\n{card}---\n"), print(card, end=""), 0)[2]

    env, env_params = _envs.probe(options.env, env_kwargs)
    agent.check_config(config, env, _envs.with_train_params(env_params, train_params))
    calibration = _cost.read_calibration(known.calibration) if known.calibration else None
    setup = _envs.make_env(options.env, **env_kwargs)
    params = _envs.with_train_params(setup.params, train_params)
    train = agent.make_train(config, setup.env, params)

    def run() -> int:
        console = Console()
        result = calibration
        if known.calibrate is not None:
            from train._run import machine

            result = _cost.calibrate(
                agent, config, setup.env, params, known.calibrate_seconds, console.print
            )
            result |= {"env": options.env, "machine": machine()}
            known.calibrate.write_text(json.dumps(result, indent=1) + "\n")
        cost = _cost.count_run(agent, config, setup.env, params, train)
        columns = {
            "agent": known.agent,
            "env": options.env,
            "num_seeds": options.num_seeds,
            "env_steps_total": train.total_steps * options.num_seeds,
            **cost.columns(options.num_seeds),
        }
        if result is not None:
            columns |= _cost.predict(result, cost, options.num_seeds)
        title = (
            f"{known.agent} on {options.env}: {options.num_seeds} seed(s) of "
            f"{train.total_steps:,} steps, not run"
        )
        console.print(_cost.table(columns, title))
        if columns["flops_warnings"]:
            console.print(
                f"note: {len(columns['flops_warnings'])} while loops are counted once, as their "
                "length is known only when they run (docs/cost.md): a lower bound",
                highlight=False,
            )
        if columns["flops_not_counted"]:
            console.print(
                f"not counted: {', '.join(columns['flops_not_counted'])}", highlight=False
            )
        if result is None:
            console.print("time and energy: unknown without a calibration (--calibrate FILE)")
        elif (result["agent"], result["env"]) != (known.agent, options.env):
            console.print(
                f"note: the calibration is of {result['agent']} on {result['env']}: its error for "
                "this run is not known",
                highlight=False,
            )
        if result is not None and other_machine(result["machine"]):
            console.print(
                "note: the calibration is of another machine: time and energy here are not known",
                highlight=False,
            )
        if known.json is not None:
            known.json.write_text(json.dumps(columns, indent=1) + "\n")
        return 0

    return run


def other_machine(calibrated: dict[str, Any]) -> bool:
    """Whether a calibration is of other devices than those of this process."""
    from train._run import machine

    return any(calibrated[name] != machine()[name] for name in ("backend", "devices", "cpu_count"))


if __name__ == "__main__":
    sys.exit(main())
