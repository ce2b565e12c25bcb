"""One training run, whatever the agent: checks, compiled chunks, evaluation, and the run folder.

runs/<name>/ holds
  config.json         environment, seeds and all settings: enough to repeat the run
  metrics.csv         one row for each update and seed; tensorboard/ the same, a point a chunk
  learning_curve.png  all seeds and their median
  policies/           seed_<i>.msgpack, the policy of every seed
  policy.msgpack      the best of them in the evaluation; `jaxrl.load_policy(folder)` reads it
  evaluation.csv      one row for each seed and episode of the evaluation
  animation.gif       an episode of the best policy, where the environment can be drawn
  summary.json        how fast and how good, on what
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxrl
from jaxrl import policy, sinks, spaces
from jaxrl.cost.energy import EnergyMeter
from jaxrl.replay import device_memory
from jaxrl.sinks import Chunk, Sink
from jaxrl.types import Train
from train import _cli, _cost, _report
from train._progress import Progress

if TYPE_CHECKING:
    from train._envs import EnvSetup

FORMAT = "jaxrl run 1"
FILES = (
    "config.json",
    "metrics.csv",
    "tensorboard",
    "learning_curve.png",
    "policies",
    "policy.msgpack",
    "evaluation.csv",
    "animation.gif",
    "summary.json",
)
EVAL_SEED = 0  # every run is evaluated on the same episodes; train.play takes others


@dataclass(frozen=True)
class Run:
    """A run that has passed all checks."""

    agent: ModuleType
    options: _cli.Options
    config: Any
    setup: "EnvSetup"
    train: Train[Any]
    folder: Path
    command: str

    @property
    def agent_name(self) -> str:
        """The agent's name: that of its module."""
        return self.agent.__name__.rpartition(".")[2]


def main(agent: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Train `agent` (a module of jaxrl.agents) as the command line says; return the exit code.

    0: done. 1: training diverged. 2: wrong input, nothing was started. 130: stopped by Ctrl-C.
    """
    return _cli.exit_code(lambda: prepare(agent, argv))


def prepare(agent: ModuleType, argv: Sequence[str] | None) -> Callable[[], int]:
    """Check everything that can be wrong, then make the run folder; nothing is compiled yet.

    Raises:
        ValueError, OSError: wrong input, in one sentence.
    """
    options, config = _cli.parse(agent, argv)
    if options.list_envs:
        return lambda: print(_cli.list_envs()) or 0
    options.check()
    env_kwargs = _cli.parse_pairs("env_kwargs", options.env_kwargs)
    train_params = _cli.parse_pairs("train_params", options.train_params)
    from train import _envs  # takes seconds (gymnax): wrong options are refused before

    agent_name = agent.__name__.rpartition(".")[2]
    env, env_params = _envs.probe(options.env, env_kwargs)
    agent.check_config(config, env, _envs.with_train_params(env_params, train_params))
    name = options.name or f"{options.env}__{agent_name}__seed{options.seed}"
    folder = Path(options.runs_dir) / name
    check_folder(folder, options.overwrite)

    setup = _envs.make_env(options.env, **env_kwargs)
    setup = dataclasses.replace(setup, params=_envs.with_train_params(setup.params, train_params))
    train = agent.make_train(config, setup.env, setup.params)
    check_memory(train, options.num_seeds)
    if options.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    make_folder(folder)
    command = shlex.join(
        ["python", "-m", f"train.{agent_name}", *(sys.argv[1:] if argv is None else argv)]
    )
    run = Run(agent, options, config, setup, train, folder, command)
    return lambda: execute(run)


def check_memory(train: Train[Any], num_seeds: int) -> None:
    """Raise ValueError if the states of all seeds cannot fit into the device's memory."""
    state = jax.tree.leaves(jax.eval_shape(train.init, jax.random.key(0)))
    asked, available = num_seeds * sum(x.size * x.dtype.itemsize for x in state), device_memory()
    if available is not None and asked > available:
        raise ValueError(
            f"num_seeds = {num_seeds}: the states of so many seeds ask for {asked:,} bytes, but "
            f"the device has {available:,}: lower num_seeds, or buffer_size if there is one"
        )


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless `folder` is free, or an earlier run that may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} exists and is not a plain folder: choose another --name")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        is_run = json.loads((folder / "config.json").read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        is_run = False
    if not is_run:
        raise FileExistsError(
            f"{folder} exists and does not hold a run: choose another --name or --runs-dir"
        )
    if not overwrite:
        raise FileExistsError(
            f"run folder {folder} exists: choose another --name, or give --overwrite to replace it"
        )


def make_folder(folder: Path) -> None:
    """Make the run folder; of an earlier run only the files that a run writes are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (folder / "policies").mkdir()
    except OSError as error:
        raise OSError(
            f"run folder {folder} cannot be written ({error.strerror}): choose another --runs-dir"
        ) from error


def execute(run: Run) -> int:
    """Train, evaluate, draw, sum up; return the exit code."""
    console = Console()
    options, folder = run.options, run.folder
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "agent": run.agent_name,
            "env": options.env,
            "env_kwargs": run.setup.kwargs,
            "train_params": list(options.train_params),
            "seed": options.seed,
            "num_seeds": options.num_seeds,
            "eval_episodes": options.eval_episodes,
            "config": dataclasses.asdict(run.config),
            "jaxrl": jaxrl.__version__,
            "command": run.command,
        },
    )
    # before the run: what can fail here must not cost one
    cost = _cost.count_run(run.agent, run.config, run.setup.env, run.setup.params, run.train)
    try:
        outcome = train_seeds(run, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {folder} keeps what was written so far")
        return 130
    summary: dict[str, Any] = {
        "status": outcome.status,
        "env": options.env,
        "agent": run.agent_name,
        "seeds": list(options.seeds),
        "env_steps": outcome.env_steps,
        "env_steps_total": outcome.env_steps * options.num_seeds,
        "compile_s": outcome.compile_s,
        "run_s": outcome.run_s,
        "steps_per_s": outcome.env_steps * options.num_seeds / outcome.run_s,
        "eval_episodes": options.eval_episodes,
        "eval_seed": EVAL_SEED,
        "eval_s": None,
        **no_evaluation(),
        **_cost.summary_columns(
            cost,
            outcome.energy,
            outcome.metrics,
            options.num_seeds,
            outcome.env_steps // run.train.steps_per_update,
            run_s=outcome.run_s,
            threshold=options.threshold,
            g_per_kwh=options.g_per_kwh,
        ),
        "started": started,
        **machine(),
        "command": run.command,
    }
    code = 0
    try:
        if outcome.metrics:
            _report.learning_curve(
                folder / "learning_curve.png",
                f"{run.agent_name} on {options.env}",
                options.seeds,
                outcome.metrics,
                run.train.steps_per_update,
            )
        if outcome.status == "diverged":
            console.print(f"[bold red]stopped:[/] {outcome.message}", highlight=False)
            code = 1
        else:
            saved = save_policies(run, outcome)
            if outcome.status == "interrupted":
                shutil.copyfile(policy_path(folder, options.seed), folder / "policy.msgpack")
                code = 130
            else:
                summary.update(evaluate_and_draw(run, saved, console))
    except KeyboardInterrupt:
        summary["status"], code = "interrupted", 130
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        console.print(f"[bold red]stopped:[/] {error}: lower --learning-rate", highlight=False)
        summary["status"], code = "diverged", 1
    write_json(folder / "summary.json", summary)
    if code == 130:
        console.print(
            f"interrupted after {outcome.env_steps:,} of {run.train.total_steps:,} steps a seed; "
            "the metrics and policies so far are kept"
        )
    console.print(_cost.table(summary))
    console.print(
        f"{summary['env_steps_total']:,} steps: compiled in {outcome.compile_s:.1f} s, run in "
        f"{outcome.run_s:.1f} s, {summary['steps_per_s']:,.0f} steps/s\n{folder}",
        highlight=False,
        soft_wrap=True,
    )
    return code


@dataclass(frozen=True)
class Outcome:
    """What training left."""

    state: Any  # of all seeds, leading axis (num_seeds,)
    metrics: dict[str, np.ndarray]  # each (num_seeds, num_updates done)
    env_steps: int  # of one seed
    compile_s: float
    run_s: float
    energy: _cost.RunEnergy
    status: str  # "finished", "interrupted" or "diverged"
    message: str = ""


def train_seeds(run: Run, console: Console) -> Outcome:
    """Train all seeds side by side in compiled chunks; write metrics and show progress in between.

    The metrics of a chunk are read while the next one runs: writing them costs the run nothing.
    """
    options, train = run.options, run.train
    sizes = chunk_sizes(train.num_updates)
    console.print(
        f"{run.agent_name} on {options.env}, {options.num_seeds} seed(s) of "
        f"{train.total_steps:,} steps: compiling",
        highlight=False,
    )
    # seed i of many is the run of --seed i: its key depends on nothing else
    keys = jnp.stack([jax.random.key(seed) for seed in options.seeds])
    with EnergyMeter(watts_per_core=options.watts_per_core) as compiling:
        init = jax.jit(jax.vmap(train.init)).lower(keys).compile()
        shapes = jax.eval_shape(jax.vmap(train.init), keys)
        chunks = {n: compile_chunk(train, n, shapes) for n in sorted(set(sizes))}
    compile_s = compiling.energy.seconds

    with ExitStack() as stack:
        meter = stack.enter_context(EnergyMeter(watts_per_core=options.watts_per_core))
        energy_log = _cost.EnergyLog(meter)
        all_sinks: list[Sink] = [
            stack.enter_context(sinks.csv_sink(run.folder / "metrics.csv")),
            stack.enter_context(sinks.tensorboard_sink(run.folder / "tensorboard")),
            energy_log,
        ]
        if options.progress:
            progress = Progress(console, train.num_updates)
            all_sinks.append(stack.enter_context(progress))
        asked_to_stop = stack.enter_context(first_interrupt_asks())
        done: list[Chunk] = []
        began = time.perf_counter()

        def read(first_update: int, metrics: Any) -> str:
            """Wait for a chunk and pass it on; return what is wrong with it, or nothing."""
            metrics = jax.device_get(metrics)
            wall_s = time.perf_counter() - began
            chunk = Chunk(options.seeds, first_update, train.steps_per_update, wall_s, metrics)
            done.append(chunk)
            for sink in all_sinks:
                sink(chunk)
            bad = sinks.find_non_finite(chunk)
            if bad is None:
                return ""
            seed, update, name = bad
            return (
                f"seed {seed}, update {update}: {name} is not finite, training has diverged; lower "
                "--learning-rate"
            )

        state = init(keys)
        message, first, waiting = "", 0, None
        for size in sizes:
            state, metrics = chunks[size](state)  # returns at once: runs while the last one is read
            if waiting is not None:
                message = read(*waiting)
            waiting = first, metrics
            first += size
            if message or asked_to_stop.is_set():
                break
        if waiting is not None and not message:
            message = read(*waiting)
        jax.block_until_ready(state)
        run_s = time.perf_counter() - began
        used = _cost.RunEnergy(compiling.energy, meter.so_far(), energy_log)

    num_done = done[-1].last_update
    status = (
        "diverged" if message else "finished" if num_done == train.num_updates else "interrupted"
    )
    metrics = {
        name: np.concatenate([chunk.metrics[name] for chunk in done], axis=1)
        for name in done[0].metrics
    }
    env_steps = num_done * train.steps_per_update
    return Outcome(state, metrics, env_steps, compile_s, run_s, used, status, message)


def compile_chunk(train: Train[Any], num_updates: int, shapes: Any) -> Callable[[Any], Any]:
    """Compile `num_updates` updates of all seeds; the state is donated: buffers stay in place."""
    many = jax.vmap(lambda state: train.run(state, num_updates))
    return jax.jit(many, donate_argnums=0).lower(shapes).compile()


def chunk_sizes(num_updates: int) -> list[int]:
    """Cut a run into about 200 chunks of one size (each further size would be compiled as well).

    Between 20 and 2000 chunks where a divisor gives that, else 200 and a rest.
    """
    wanted = num_updates / 200
    divisors = [
        n
        for n in range(max(1, num_updates // 2000), max(1, num_updates // 20) + 1)
        if num_updates % n == 0 and num_updates // n <= 2000
    ]
    if divisors:
        size = min(divisors, key=lambda n: abs(math.log(n / wanted)))
        return [size] * (num_updates // size)
    size = math.ceil(wanted)
    rest = [num_updates % size] if num_updates % size else []
    return [size] * (num_updates // size) + rest


@contextlib.contextmanager
def first_interrupt_asks() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no chunk is lost half-way; the second raises."""
    asked = threading.Event()

    def handler(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def policy_path(folder: Path, seed: int) -> Path:
    """Where the policy of a seed is saved."""
    return folder / "policies" / f"seed_{seed}.msgpack"


def save_policies(run: Run, outcome: Outcome) -> list[policy.SavedPolicy]:
    """Save the policy of every seed."""
    env, params = run.setup.env, run.setup.params
    action, obs_shape = spaces.read(env, params)
    all_policies = jax.device_get(run.agent.get_policy(outcome.state))
    saved = []
    for lane, seed in enumerate(run.options.seeds):
        one = policy.SavedPolicy(
            agent=run.agent_name,
            config=run.config,
            action=action,
            obs_shape=obs_shape,
            env=run.options.env,
            env_kwargs=run.setup.kwargs,
            seed=seed,
            policy=jax.tree.map(lambda x, lane=lane: x[lane], all_policies),
        )
        policy.save_policy(policy_path(run.folder, seed), one)
        saved.append(one)
    return saved


def evaluate_and_draw(
    run: Run, saved: Sequence[policy.SavedPolicy], console: Console
) -> dict[str, Any]:
    """Evaluate all policies, keep and animate the best; return entries of the summary."""
    options, folder, setup = run.options, run.folder, run.setup
    began = time.perf_counter()
    act = saved[0].act_fn()
    policies = _report.stack([s.policy for s in saved])
    rows = _report.evaluate(setup, act, policies, EVAL_SEED, options.eval_episodes)
    eval_s = time.perf_counter() - began
    _report.write_episodes(folder / "evaluation.csv", options.seeds, rows)
    per_seed = [
        {"seed": seed, **_report.aggregate(rows, lane, setup.endings)}
        for lane, seed in enumerate(options.seeds)
    ]
    middle = _report.median(per_seed)
    best = _report.best_lane(per_seed)
    shutil.copyfile(policy_path(folder, options.seeds[best]), folder / "policy.msgpack")
    title = f"{options.eval_episodes} {setup.episodes_are}, most likely actions"
    labels = [str(seed) for seed in options.seeds]
    console.print(_report.table(title, labels, per_seed, middle))
    _report.print_endings(console, per_seed)
    if options.animate:
        if setup.animate is None:
            console.print(f"no animation: there is no picture of {options.env}", highlight=False)
        else:
            shown = setup.animate(
                lambda obs: act(saved[best].policy, obs),
                EVAL_SEED,
                options.eval_episodes,
                folder / "animation.gif",
            )
            console.print(f"animation.gif: {shown}", highlight=False)
    returns = rows["return"].astype(np.float64)
    return {
        "eval_s": eval_s,
        # over all seeds and episodes; "median" holds the medians over seeds
        "eval_return_mean": float(returns.mean()),
        "eval_return_std": float(returns.std()),
        "eval_return_iqm": float(_report.trim_mean(returns.reshape(-1), 0.25)),
        "success_rate": middle["success_rate"],
        "success_length_mean": middle["success_length_mean"],
        "eval_length_mean": middle["length_mean"],
        "median": middle,
        "per_seed": per_seed,
        "best_seed": options.seeds[best],
        "best_of": options.num_seeds,
    }


def no_evaluation() -> dict[str, None]:
    """The entries of a summary that only an evaluation can fill."""
    names = (
        "eval_return_mean",
        "eval_return_std",
        "eval_return_iqm",
        "success_rate",
        "success_length_mean",
        "eval_length_mean",
        "median",
        "per_seed",
        "best_seed",
        "best_of",
    )
    return dict.fromkeys(names)


def machine() -> dict[str, Any]:
    """What the run ran on."""
    return {
        "jax": jax.__version__,
        "jaxrl": jaxrl.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpu_count": os.cpu_count(),
    }


def write_json(path: Path, content: Any) -> None:
    """Write a new JSON file."""
    text = json.dumps(content, indent=2, allow_nan=False)  # before the file exists
    with path.open("x") as file:
        file.write(text + "\n")
