"""One training run, whatever the agent: checks, compiled chunks, evaluation, and the run folder.

runs/<name>/ holds
  config.json         environment, seeds and all settings: enough to repeat the run
  metrics.csv         one row for each update and seed; tensorboard/ the same, a point a chunk
  evaluation_curve.csv  one row for each evaluation while training and seed
  checkpoints/        with --checkpoint-every: the whole state of the last few, and of the best
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
import itertools
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape

import jaxrl
from jaxrl import policy, sinks, spaces
from jaxrl.apart import NETS
from jaxrl.cost.energy import EnergyMeter
from jaxrl.replay import device_memory
from jaxrl.sharding import ENVS, SEEDS, SpreadTrain
from jaxrl.sinks import Chunk, Sink
from jaxrl.types import Train
from train import _checkpoint, _cli, _cost, _devices, _folder, _memory, _processes, _report
from train._processes import Processes
from train._progress import Progress

if TYPE_CHECKING:
    from jaxrl.checkpoint import Checkpoints
    from train._envs import EnvSetup

FORMAT, FILES = _folder.FORMAT, _folder.FILES
EVAL_SEED = 0  # every run is evaluated on the same episodes; train.play takes others
CURVE_SEED = 2**31 - 1  # of the episodes of evaluations while training: nobody else's
CURVE = {  # columns of evaluation_curve.csv, from those of `_report.aggregate`
    "eval_return": "return_mean",
    "eval_return_std": "return_std",
    "eval_discounted_return": "discounted_return_mean",
    "eval_length": "length_mean",
    "eval_success_rate": "success_rate",
}
INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 + the number of the signal


@dataclass(frozen=True)
class Run:
    """A run that has passed all checks."""

    agent: ModuleType
    options: _cli.Options
    config: Any
    setup: "EnvSetup"
    spread: SpreadTrain
    folder: Path
    command: str
    start: _checkpoint.Start = field(default_factory=_checkpoint.Start)
    state: Any = None  # at `start`, where that is a checkpoint
    identity: dict[str, Any] = field(default_factory=dict)  # where checkpoints are written
    processes: Processes = field(default_factory=Processes)

    @property
    def train(self) -> Train[Any]:
        """The run of one seed."""
        return self.spread.train

    @property
    def agent_name(self) -> str:
        """The agent's name: that of its module."""
        return self.agent.__name__.rpartition(".")[2]


def main(agent: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Train `agent` (a module of jaxrl.agents) as the command line says; return the exit code.

    0: done. 1: training diverged, or a file could not be written. 2: wrong input, nothing was
    started. 130: stopped by Ctrl-C. 143: stopped by SIGTERM. Where checkpoints are written, a run
    stopped by a signal has saved one: --resume goes on with it. Of several processes each returns
    the same, unless one was lost: 1 in the others, or JAX ends them (134, SIGABRT).
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
    learn_apart = getattr(config, "learn_apart", False)
    cpu_devices = _devices.make_cpu_devices(options, options.num_processes or 1, learn_apart)
    processes = _processes.start(options)
    with processes.guarded(refusals=True):
        run = check_and_make(agent, options, config, processes, argv, cpu_devices)
        if isinstance(run, str):
            processes.finish()
            return lambda: print(run) or 0

    def go() -> int:
        with processes.guarded():
            code = execute(run)
            processes.finish()
        return code

    return go


def check_and_make(
    agent: ModuleType,
    options: _cli.Options,
    config: Any,
    processes: Processes,
    argv: Sequence[str] | None,
    cpu_devices: _devices.Default = _devices.Default(),  # noqa: B008  (frozen)
) -> Run | str:
    """Return a run that has passed all checks, its folder made; or why there is nothing to do.

    Raises:
        ValueError, OSError: wrong input, in one sentence.
    """
    env_kwargs = _cli.parse_pairs("env_kwargs", options.env_kwargs)
    train_params = _cli.parse_pairs("train_params", options.train_params)
    from train import _envs  # takes seconds (gymnax): wrong options are refused before

    agent_name = agent.__name__.rpartition(".")[2]
    env, env_params = _envs.probe(options.env, env_kwargs)
    agent.check_config(config, env, _envs.with_train_params(env_params, train_params))
    if options.resume is None:
        name = options.name or f"{options.env}__{agent_name}__seed{options.seed}"
        folder = Path(options.runs_dir) / name
    else:
        folder = Path(options.resume)

    def check_folder() -> bool:
        """Whether the run is finished already."""
        if options.resume is None:
            _folder.check_folder(folder, options.overwrite)
            return False
        if _folder.status(folder) == "finished":
            return True
        check_resume(folder)
        return False

    if processes.from_first(check_folder):
        return f"the run in {folder} is finished: there is nothing to go on with"

    setup = _envs.make_env(options.env, **env_kwargs)
    setup = dataclasses.replace(setup, params=_envs.with_train_params(setup.params, train_params))
    learn_apart = getattr(config, "learn_apart", False)
    nets = _devices.choose_net_devices(options, learn_apart, cpu_devices)
    net_axis = (NETS,) if nets > 1 else ()
    train = agent.make_train(config, setup.env, setup.params, *net_axis)
    num_envs = getattr(config, "num_envs", 1)
    spread = _devices.spread(options, train, num_envs, cpu_devices, nets)
    check_memory(spread, options.num_seeds)
    if options.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    identity, start, state = {}, _checkpoint.Start(), None
    if options.checkpoint_every is not None:
        identity = _checkpoint.identity(agent_name, options.env, setup, options.seeds, config)
        processes.say_how_to_go_on(f"Start all processes again with --resume {folder}.")
    else:
        processes.say_how_to_go_on(
            "Nothing was saved, as there is no --checkpoint-every: start all processes again."
        )
    command = shlex.join(
        ["python", "-m", f"train.{agent_name}", *(sys.argv[1:] if argv is None else argv)]
    )

    def make_folder() -> None:
        _folder.make_folder(folder)
        settings = _cli.run_as_json(agent_name, options, setup.kwargs, config)
        settings |= {"jaxrl": jaxrl.__version__, "command": command}
        _folder.write_json(folder / "config.json", settings)

    if options.resume is None:
        processes.from_first(make_folder)
    else:
        found = processes.from_first(
            lambda: _checkpoint.find(folder, identity, arithmetic(spread, options))
        )
        template = spread.shapes(seed_keys(options.seeds))
        start, state = _checkpoint.read(folder, found, template)
        sizes_until(chunk_sizes(train.num_updates), start.num_updates)
    return Run(
        agent, options, config, setup, spread, folder, command, start, state, identity, processes
    )


def check_resume(folder: Path) -> None:
    """Raise ValueError, saying why, if there is nothing to go on with."""
    if _folder.read_run(folder).get("checkpoint_every") is None:
        raise ValueError(
            f"resume = {folder}: this run was started without --checkpoint-every, so that there "
            "is nothing to go on from"
        )
    if _folder.status(folder) == "diverged":
        raise ValueError(
            f"resume = {folder}: this run diverged and would do so again, start another one"
        )
    with _folder.lock(folder):
        pass


def check_memory(spread: SpreadTrain, num_seeds: int) -> None:
    """Raise ValueError if the states of all seeds cannot fit into memory."""
    state = jax.tree.leaves(jax.eval_shape(spread.train.init, jax.random.key(0)))
    available = device_memory()
    if jax.default_backend() == "cpu":  # the devices of a process share its memory
        parts, where = jax.process_count(), "the machine"
    else:
        parts, where = spread.mesh.shape[SEEDS], "the device"
    here = -(-num_seeds // parts)
    asked = here * sum(x.size * x.dtype.itemsize for x in state)
    if available is not None and asked > available:
        raise ValueError(
            f"num_seeds = {num_seeds}: the states of {'so many' if parts == 1 else here} seeds ask "
            f"for {asked:,} bytes, but {where} has {available:,}: lower num_seeds, or buffer_size "
            "if there is one"
        )


def arithmetic(spread: SpreadTrain, options: _cli.Options) -> dict[str, int]:
    """What the rounding of a run depends on beside its identity."""
    return {
        "seeds side by side on a device": spread.lanes_at_once(options.num_seeds),
        "devices for the environments of a seed": spread.mesh.shape[ENVS],
        "devices for the networks of a seed": spread.mesh.shape[NETS],
    }


def execute(run: Run) -> int:
    """Train, evaluate, draw, sum up; return the exit code."""
    is_first = run.processes.is_first
    lock = _folder.lock(run.folder) if is_first else contextlib.nullcontext()
    with lock, sigterm_raises():
        return execute_locked(run, Console(quiet=not is_first))


def execute_locked(run: Run, console: Console) -> int:
    """Do that, where no other process writes the folder."""
    options, folder, start = run.options, run.folder, run.start
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for note in start.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    try:
        # before the run: what can fail here must not cost one
        cost = count_cost(run) if run.processes.is_first else None
        outcome = train_seeds(run, console)
    except KeyboardInterrupt as stop:
        console.print(f"interrupted; {folder} keeps what was written so far")
        return run.processes.leave(exit_code_of(stop))
    except OSError as error:
        console.print(f"[bold red]stopped:[/] {escape(str(error))}", highlight=False)
        if options.checkpoint_every is not None:
            console.print(f"when that is mended, go on with --resume {folder}", highlight=False)
        return run.processes.leave(1)
    if cost is None:
        return follow(run, outcome)
    summary: dict[str, Any] = {
        "status": outcome.status,
        "env": options.env,
        "agent": run.agent_name,
        "seeds": list(options.seeds),
        "seed_devices": run.spread.mesh.shape[SEEDS],
        "env_devices": run.spread.mesh.shape[ENVS],
        "net_devices": run.spread.mesh.shape[NETS],
        "env_steps": outcome.env_steps,
        "env_steps_total": outcome.env_steps * options.num_seeds,
        "compile_s": outcome.compile_s,
        "run_s": outcome.run_s,
        "steps_per_s": outcome.env_steps * options.num_seeds / outcome.run_s,
        "eval_episodes": options.eval_episodes,
        "eval_seed": EVAL_SEED,
        "eval_s": None,
        "resumed_at": list(start.resumed_at),
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
            saved = policies_of(run, outcome)
            save_policies(run, saved)
            if outcome.status == "interrupted":
                shutil.copyfile(policy_path(folder, options.seed), folder / "policy.msgpack")
                code = outcome.exit_code
            else:
                summary.update(evaluate_and_draw(run, outcome, saved, console))
    except KeyboardInterrupt as stop:
        summary["status"], code = "interrupted", run.processes.leave(exit_code_of(stop))
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        console.print(f"[bold red]stopped:[/] {error}: lower --learning-rate", highlight=False)
        summary["status"], code = "diverged", 1
    _folder.write_json(folder / "summary.json", summary)
    if code in (INTERRUPTED, TERMINATED):
        console.print(
            f"interrupted after {outcome.env_steps:,} of {run.train.total_steps:,} steps a seed; "
            "the metrics and policies so far are kept"
        )
        if options.checkpoint_every is not None:
            console.print(f"go on with --resume {folder}", highlight=False, soft_wrap=True)
    console.print(_cost.table(summary))
    console.print(
        f"{summary['env_steps_total']:,} steps: compiled in {outcome.compile_s:.1f} s, run in "
        f"{outcome.run_s:.1f} s, {summary['steps_per_s']:,.0f} steps/s\n{folder}",
        highlight=False,
        soft_wrap=True,
    )
    return code


def count_cost(run: Run) -> _cost.RunCost:
    """Count what a seed costs, whatever devices share it."""
    env, params = run.setup.env, run.setup.params
    train = run.train
    if run.spread.mesh.shape[NETS] > 1:  # what has a mesh axis cannot be traced without one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when the run was made
            train = run.agent.make_train(run.config, env, params)
    return _cost.count_run(run.agent, run.config, env, params, train)


def follow(run: Run, outcome: "Outcome") -> int:
    """Do the part of a process that is not the first in what comes after training."""
    if outcome.status == "diverged":
        return 1
    try:
        policies_of(run, outcome)
    except ValueError:  # which the first one tells
        return 1
    if outcome.status == "interrupted":
        return outcome.exit_code
    try:
        evaluate(run, outcome)
    except KeyboardInterrupt as stop:
        return run.processes.leave(exit_code_of(stop))
    return 0


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
    exit_code: int = 0  # of an interrupted run


@dataclass(frozen=True)
class Programs:
    """What a run compiles before it begins."""

    init: Callable[[jax.Array], Any] | None  # None where the state is read
    chunks: dict[int, Callable[[Any], Any]]  # by their number of updates
    evaluate: Callable[[Any], dict[str, jax.Array]] | None  # of a state; None: no evaluations


@dataclass(frozen=True)
class Boundary:
    """The end of a chunk: what must be read and written before the next but one begins."""

    first_update: int
    metrics: Any
    evaluation: dict[str, jax.Array] | None  # still being computed
    snapshot: Any  # the state on the host, to be saved; or None
    vote: Any  # on whether to stop, where there are other processes


def train_seeds(run: Run, console: Console) -> Outcome:
    """Train all seeds side by side in compiled chunks; write metrics and show progress in between.

    The metrics of a chunk are read while the next one runs: writing them costs the run nothing.
    Evaluation and checkpoint take copies of the state: the next chunk takes the state itself.
    """
    options, train, start, processes = run.options, run.train, run.start, run.processes
    sizes = chunk_sizes(train.num_updates)
    done_before = sizes_until(sizes, start.num_updates)
    what = f"{options.num_seeds} seed(s) of {train.total_steps:,} steps{_devices.told(run.spread)}"
    where = "" if start.step is None else f", from the checkpoint at {start.step:,} steps"
    console.print(
        f"{run.agent_name} on {options.env}, {what}{where}: compiling",
        highlight=False,
        soft_wrap=True,
    )
    with EnergyMeter(watts_per_core=options.watts_per_core) as compiling:
        programs = compile_run(run, sizes[len(done_before) :])
    compile_energy = compiling.energy
    if start.compile_energy is not None:
        compile_energy = start.compile_energy + compile_energy
    compile_s = start.compile_s + compiling.energy.seconds
    state = begin(run, programs)

    with ExitStack() as stack:
        meter = stack.enter_context(EnergyMeter(watts_per_core=options.watts_per_core))
        energy_log = _cost.EnergyLog(meter, list(start.energy_points), start.run_energy)
        done: list[Chunk] = []
        all_sinks: list[Sink] = [energy_log]
        curve_sinks: list[Sink] = []
        if processes.is_first:
            tensorboard = stack.enter_context(
                sinks.tensorboard_sink(run.folder / "tensorboard", start.wall_s)
            )
            done, curve = read_rows(run, done_before)
            for chunk in (*done, *curve):
                tensorboard(chunk)
            to_file, curve_to_file = (
                stack.enter_context(sinks.csv_sink(run.folder / name, append=start.num_updates > 0))
                for name in _folder.GROWING
            )
            all_sinks += [to_file, tensorboard]
            curve_sinks += [curve_to_file, tensorboard]
            if options.progress:
                progress = Progress(console, train.num_updates)
                all_sinks.append(stack.enter_context(progress))
        checkpoints = open_checkpoints(run, stack)
        asked_to_stop = stack.enter_context(first_interrupt_asks())
        since_saved: list[Chunk] = []
        num_done = start.num_updates
        agreed = 0  # the exit code of a signal that some process has had; of several processes
        # innermost: what is left afterwards could wait for ever
        stack.enter_context(processes.guarded(refusals=True))
        began = time.perf_counter() - start.wall_s

        def read(end: Boundary) -> str:
            """Wait for a chunk and pass it on; return what is wrong with it, or nothing."""
            nonlocal agreed, num_done
            metrics = jax.device_get(end.metrics)
            wall_s = time.perf_counter() - began
            seeds, per_update = options.seeds, train.steps_per_update
            chunk = Chunk(seeds, end.first_update, per_update, wall_s, metrics)
            num_done = chunk.last_update
            done.append(chunk)
            since_saved.append(chunk)
            for sink in all_sinks:
                sink(chunk)
            if end.evaluation is not None:
                rows = jax.device_get(end.evaluation)
                columns = curve_columns(rows, run.setup.endings)
                wall_s = time.perf_counter() - began
                point = Chunk(seeds, chunk.last_update - 1, per_update, wall_s, columns)
                for sink in curve_sinks:
                    sink(point)
            if end.vote is not None:
                agreed = max(agreed, int(end.vote))
            bad = sinks.find_non_finite(chunk)
            if bad is not None:
                seed, update, name = bad
                return (
                    f"seed {seed}, update {update}: {name} is not finite, training has diverged; "
                    "lower --learning-rate"
                )
            if end.snapshot is not None:
                assert checkpoints is not None
                metadata = _checkpoint.metadata_of(
                    run_identity=run.identity,
                    sizes=_folder.sync(run.folder) if processes.is_first else {},
                    num_updates=chunk.last_update,
                    wall_s=time.perf_counter() - began,
                    compile_s=compile_s,
                    compile_energy=compile_energy,
                    run_energy=energy_log.so_far(),
                    energy_points=energy_log.points,
                    resumed_at=start.resumed_at,
                    arithmetic=arithmetic(run.spread, options),
                )
                score = _checkpoint.score(since_saved)
                checkpoints.save(chunk.last_update * per_update, end.snapshot, metadata, score)
                since_saved.clear()
            elif checkpoints is not None:
                checkpoints.check()
            return ""

        message, first, waiting = "", start.num_updates, None
        for size in sizes[len(done_before) :]:
            state, metrics = programs.chunks[size](state)  # at once: runs while the last is read
            vote = processes.vote(asked_to_stop.exit_code)
            if waiting is not None:
                message = read(waiting)
            # of several processes none stops by itself: what all have heard of counts
            asked = asked_to_stop.exit_code if processes.alone else agreed
            last, stops = first + size, bool(message or asked)
            evaluation = snapshot = None
            if programs.evaluate is not None and is_due(run, eval_every(run), first, last):
                evaluation = programs.evaluate(state)
            if checkpoints is not None and not message:
                is_end = stops or last == train.num_updates
                if is_end or is_due(run, options.checkpoint_every, first, last):
                    snapshot = _checkpoint.to_host(state)
            waiting = Boundary(first, metrics, evaluation, snapshot, vote)
            first = last
            if stops:
                break
        if waiting is not None and not message:
            message = read(waiting)
        jax.block_until_ready(state)
        if checkpoints is not None:
            checkpoints.wait()
        run_s = time.perf_counter() - began
        used = _cost.RunEnergy(compile_energy, energy_log.so_far(), energy_log)

    code = asked_to_stop.exit_code if processes.alone else agreed
    # at the last moment Ctrl-C comes too late, SIGTERM leaves no time for the evaluation
    is_done = num_done == train.num_updates and code != TERMINATED
    status = "diverged" if message else "finished" if is_done else "interrupted"
    metrics = {
        name: np.concatenate([chunk.metrics[name] for chunk in done], axis=1)
        for name in (done[0].metrics if done else ())
    }
    env_steps = num_done * train.steps_per_update
    return Outcome(state, metrics, env_steps, compile_s, run_s, used, status, message, code)


def compile_run(run: Run, sizes: Sequence[int]) -> Programs:
    """Compile all that the run needs for chunks of these sizes."""
    spread = run.spread
    keys = spread.on_every_device(seed_keys(run.options.seeds))
    shapes = spread.shapes(keys)
    init = spread.compile_init(keys) if run.state is None else None
    chunks = {n: spread.compile(shapes, n) for n in sorted(set(sizes))}
    evaluate = compile_curve(run, shapes) if sizes and eval_every(run) else None
    _memory.give_back()
    return Programs(init, chunks, evaluate)


def compile_curve(run: Run, shapes: Any) -> Callable[[Any], dict[str, jax.Array]]:
    """Compile the evaluation while training, of the policies in a state that is donated next."""
    act = run.agent.make_act(run.config, *spaces.read(run.setup.env, run.setup.params))

    def copied(state: Any) -> Any:
        return jax.tree.map(jnp.copy, run.agent.get_policy(state))

    copy = jax.jit(copied, out_shardings=run.spread.by_lane).lower(shapes).compile()
    evaluate = _report.compile_evaluation(
        run.setup,
        act,
        jax.eval_shape(copied, shapes),
        CURVE_SEED,
        run.options.eval_every_episodes,
        run.spread,
    )
    return lambda state: evaluate(copy(state))


def curve_columns(rows: _report.Rows, endings: dict[int, str]) -> dict[str, np.ndarray]:
    """The columns of evaluation_curve.csv, each (num_seeds, 1); none of what is not known."""
    lanes = range(len(rows["return"]))
    stats = [_report.aggregate(rows, lane, endings) for lane in lanes]
    known = {name: key for name, key in CURVE.items() if stats[0][key] is not None}
    return {name: np.array([[s[key]] for s in stats]) for name, key in known.items()}


def seed_keys(seeds: Sequence[int]) -> jax.Array:
    """Keys (num_seeds,): seed i of many is the run of --seed i, its key depends on nothing else."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def begin(run: Run, programs: Programs) -> Any:
    """Return the state to go on from, the folder brought back to where it was then."""
    if run.options.resume is not None and run.processes.is_first:
        _folder.cut(run.folder, run.start.sizes)
    if programs.init is None:
        return run.state
    return programs.init(run.spread.on_every_device(seed_keys(run.options.seeds)))


def read_rows(run: Run, sizes: Sequence[int]) -> tuple[list[Chunk], list[Chunk]]:
    """What was written before the checkpoint: chunks of metrics, and evaluations while training."""
    if not sizes:
        return [], []
    seeds, per_update = run.options.seeds, run.train.steps_per_update
    done = sinks.read_csv(run.folder / "metrics.csv", seeds, per_update, sizes)
    every, ends = eval_every(run), np.cumsum([0, *sizes])
    evaluated = [b for a, b in itertools.pairwise(ends.tolist()) if is_due(run, every, a, b)]
    if not evaluated:
        return done, []
    path = run.folder / "evaluation_curve.csv"
    return done, sinks.read_csv(path, seeds, per_update, [1] * len(evaluated))


def open_checkpoints(run: Run, stack: ExitStack) -> "Checkpoints | None":
    """Return where checkpoints are written, if they are; what is damaged makes room."""
    if run.options.checkpoint_every is None:
        return None
    from jaxrl import checkpoint

    folder = run.folder / "checkpoints"
    for step in run.start.damaged if run.processes.is_first else ():
        checkpoint.set_aside(folder, step)
    return stack.enter_context(checkpoint.Checkpoints(folder, run.options.keep_checkpoints))


def eval_every(run: Run) -> int:
    """Environment steps of a seed between evaluations while training; 0: none."""
    given = run.options.eval_every
    by_default = max(1, run.train.total_steps // run.setup.num_evaluations)
    return by_default if given is None else given


def is_due(run: Run, every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` environment steps lies in the updates `before` to `after`."""
    per_update = run.train.steps_per_update
    return bool(every) and after * per_update // every > before * per_update // every


def sizes_until(sizes: Sequence[int], num_updates: int) -> list[int]:
    """The first chunks, which are so many updates.

    Raises:
        ValueError: they are not whole chunks.
    """
    ends = [0, *itertools.accumulate(sizes)]
    if num_updates not in ends:
        raise ValueError(f"{num_updates} updates are no whole number of chunks of this run")
    return list(sizes[: ends.index(num_updates)])


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


class Terminated(KeyboardInterrupt):
    """SIGTERM: a machine that is to be taken away, or a job at its time limit."""


def exit_code_of(stop: KeyboardInterrupt) -> int:
    """128 + the number of the signal, as shells have it."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


class AskedToStop(threading.Event):
    """Set by the first signal; knows the exit code that it stands for."""

    exit_code: int = 0


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` as Ctrl-C raises KeyboardInterrupt."""

    def handler(*_: Any) -> None:
        raise Terminated

    with handling({signal.SIGTERM: handler}):
        yield


@contextlib.contextmanager
def first_interrupt_asks() -> Iterator[AskedToStop]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that no chunk is lost; the second raises.

    A checkpoint is written at the end of the chunk, if there are checkpoints.
    """
    asked = AskedToStop()

    def handler(number: int, _: Any) -> None:
        stop = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if asked.is_set():
            raise stop
        asked.exit_code = exit_code_of(stop)
        asked.set()

    with handling({signal.SIGINT: handler, signal.SIGTERM: handler}):
        yield asked


@contextlib.contextmanager
def handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Install signal handlers, then the former ones; outside of the main thread do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def policy_path(folder: Path, seed: int) -> Path:
    """Where the policy of a seed is saved."""
    return folder / "policies" / f"seed_{seed}.msgpack"


def policies_of(run: Run, outcome: Outcome) -> list[policy.SavedPolicy]:
    """The policy of every seed, on the host, in every process.

    Raises:
        ValueError: one holds a number that is not finite.
    """
    env, params = run.setup.env, run.setup.params
    action, obs_shape = spaces.read(env, params)
    all_policies = jax.device_get(run.spread.readable(run.agent.get_policy(outcome.state)))
    found = []
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
        policy.check_finite(one.policy, f"policy of seed {seed}")
        found.append(one)
    return found


def save_policies(run: Run, policies: Sequence[policy.SavedPolicy]) -> None:
    """Save the policy of every seed."""
    for one in policies:
        policy.save_policy(policy_path(run.folder, one.seed), one)


def evaluate(run: Run, outcome: Outcome) -> _report.Rows:
    """Evaluate all policies, each where its seed is; all processes have the rows."""
    act = run.agent.make_act(run.config, *spaces.read(run.setup.env, run.setup.params))
    policies = run.agent.get_policy(outcome.state)
    evaluate = _report.compile_evaluation(
        run.setup, act, policies, EVAL_SEED, run.options.eval_episodes, run.spread
    )
    return jax.device_get(evaluate(policies))


def evaluate_and_draw(
    run: Run, outcome: Outcome, saved: Sequence[policy.SavedPolicy], console: Console
) -> dict[str, Any]:
    """Evaluate all policies, keep and animate the best; return entries of the summary."""
    options, folder, setup = run.options, run.folder, run.setup
    began = time.perf_counter()
    rows = evaluate(run, outcome)
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
                lambda obs: saved[best].act_fn()(saved[best].policy, obs),
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
        "processes": jax.process_count(),
        "cpu_count": os.cpu_count(),
    }
