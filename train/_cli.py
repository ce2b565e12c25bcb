"""The command line of the training scripts: options, presets, and wrong input in one sentence."""

import argparse
import contextlib
import dataclasses
import io
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Literal, TypeVar

import tyro

from jaxrl.checks import check_count, check_real
from train import _folder, _presets, _processes

MAX_EPISODES = 30_000  # of one evaluation: MicroRacer needs 0.4 MB of track for each


@dataclass(frozen=True)
class Options:
    """What every training script takes, whatever the agent."""

    env: str = "MicroRacer-v0"
    """Environment: one of ours, or of gymnax (--list-envs shows them)."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment, name=value each, e.g. obstacles=false observation=lidar."""
    train_params: tuple[str, ...] = ()
    """Parameters of the environment that differ while training, name=value each, e.g.
    failure_reward=-10; the evaluation keeps the environment's own."""
    seed: int = 0
    """Seed of the first agent; the others take the next numbers."""
    num_seeds: int = 4
    """Agents to train side by side, with seeds seed, seed + 1, ... """
    seed_devices: int | None = None
    """Devices to spread the seeds over; by default all accelerators, or on CPU a device for each
    core, as far as each gets equally many seeds."""
    env_devices: int = 1
    """Devices to cut the environments of every seed over."""
    net_devices: int | None = None
    """Devices for the networks of every seed, 1 or 2; 2 needs --learn-apart, and is the default
    with it on CPU where the seeds leave cores."""
    lanes: Literal["side-by-side", "one-by-one"] = "side-by-side"
    """How several seeds share a device: side-by-side is fast; one-by-one makes each, bit for bit,
    the run of its seed alone, on however many devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes are one run (docs/machines.md); with it go
    --num-processes and --process-id."""
    num_processes: int | None = None
    """How many processes are this run."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    distributed: Literal["auto", "slurm", "ompi", "mpi4py"] | None = None
    """Let JAX find the other processes: auto takes Slurm, Open MPI, Kubernetes or Cloud TPU."""
    eval_episodes: int = 512
    """Episodes of the evaluation, the same for every seed (MicroRacer: as many unseen tracks)."""
    eval_every: int | None = None
    """Environment steps of a seed from one evaluation while training to the next (at the end of a
    chunk, of which a run has about 200); by default a tenth of the run, of
    LunarLander half of it; 0: none."""
    eval_every_episodes: int = 16
    """Episodes of an evaluation while training, others than those of the evaluation at the end."""
    checkpoint_every: int | None = None
    """Environment steps of a seed from one checkpoint to the next (at the end of a chunk); by
    default there are none. With it, Ctrl-C and SIGTERM save one as well, and so does the end."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the last ones; the best is kept besides."""
    resume: str | None = None
    """Run folder of a run that was stopped or killed: go on from its newest checkpoint. Its
    settings are taken; those given here as well must be the same."""
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder; by default <env>__<agent>__seed<seed>."""
    overwrite: bool = False
    """Replace the files of an earlier run of that name."""
    animate: bool = True
    """Write an animation of the best agent, where the environment can be drawn."""
    progress: bool = True
    """Show the progress while training."""
    compilation_cache: str | None = None
    """Folder where compiled programs are kept, so that the same run starts faster the next time."""
    threshold: float | None = None
    """Return at which to tell the energy spent: that of the first update that reaches it."""
    watts_per_core: float | None = 10.0
    """Watts of a CPU core at work, for an estimate where no energy counter can be read."""
    g_per_kwh: float | None = None
    """Grams of CO2e of a kWh of your electricity, to tell emissions."""
    list_envs: bool = False
    """Print the names of the environments and stop."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of this run."""
        return tuple(range(self.seed, self.seed + self.num_seeds))

    def check(self) -> None:
        """Raise ValueError, naming argument, value and remedy, if an option cannot be meant."""
        check_count("seed", self.seed, minimum=0)
        check_count("num_seeds", self.num_seeds)
        check_count("env_devices", self.env_devices)
        if self.seed_devices is not None:
            check_count("seed_devices", self.seed_devices)
        if self.net_devices is not None:
            check_count("net_devices", self.net_devices)
            if self.net_devices > 2:
                raise ValueError(
                    f"net_devices = {self.net_devices} must be 1 or 2: an agent has two parts that "
                    "can learn apart"
                )
        _processes.check(self.coordinator, self.num_processes, self.process_id)
        if self.coordinator is not None and self.distributed is not None:
            raise ValueError(
                f"distributed = {self.distributed!r} contradicts coordinator = "
                f"{self.coordinator!r}: give one of them"
            )
        check_count("eval_episodes", self.eval_episodes)
        if self.eval_episodes > MAX_EPISODES:
            raise ValueError(f"eval_episodes = {self.eval_episodes} must be <= {MAX_EPISODES}")
        check_count("eval_every_episodes", self.eval_every_episodes)
        if self.eval_every_episodes > MAX_EPISODES:
            raise ValueError(
                f"eval_every_episodes = {self.eval_every_episodes} must be <= {MAX_EPISODES}"
            )
        if self.eval_every is not None:
            check_count("eval_every", self.eval_every, minimum=0)
        if self.checkpoint_every is not None:
            check_count("checkpoint_every", self.checkpoint_every)
        check_count("keep_checkpoints", self.keep_checkpoints)
        if self.seed + self.num_seeds > 2**31:
            raise ValueError(f"seed = {self.seed} is too large: seeds must be below 2**31")
        if self.threshold is not None:
            check_real("threshold", self.threshold, -math.inf, math.inf)
        if self.watts_per_core is not None:
            check_real("watts_per_core", self.watts_per_core, 0.0, math.inf, above=True)
        if self.g_per_kwh is not None:
            check_real("g_per_kwh", self.g_per_kwh, 0.0, math.inf)
        if self.name is not None and not re.fullmatch(r"[\w][\w.+=-]*", self.name):
            raise ValueError(
                f"name = {self.name!r} must be the plain name of a folder (letters, digits and "
                "_ . + = -): give the folder above it as --runs-dir"
            )


Config = TypeVar("Config")


@dataclass(frozen=True)
class Args(Generic[Config]):
    """Options and the agent's settings, flat on the command line."""

    run: tyro.conf.OmitArgPrefixes[Options]
    agent: tyro.conf.OmitArgPrefixes[Config]


def parse(agent: ModuleType, argv: Sequence[str] | None = None) -> tuple[Options, Any]:
    """Read the command line: options and the agent's config; defaults are the environment's preset.

    With --resume the defaults are that run's options and config, and what the command line says
    otherwise is refused, unless the result does not depend on it.

    Raises:
        ValueError, OSError: an argument cannot be read; the message is one sentence.
        SystemExit: after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = agent.__name__.rpartition(".")[2]
    # these two decide the defaults, so that they are read first
    default_env = _presets.DEFAULT_ENVS.get(name, Options.env)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", nargs="?", default=default_env)
    first.add_argument("--resume", nargs="?")
    known = first.parse_known_args(argv)[0]
    if known.resume is not None and not {"-h", "--help"} & set(argv):
        return _parse_to_resume(agent, name, argv, Path(known.resume))
    env_id = known.env or default_env
    preset = _presets.find(name, env_id)
    options = Options(
        env=env_id,
        env_kwargs=tuple(as_pair(k, v) for k, v in preset.env_kwargs.items()),
        train_params=tuple(as_pair(k, v) for k, v in preset.train_params.items()),
    )
    told = "tuned for" if preset.config else "general, not tuned for"
    return _read_args(agent, name, argv, options, agent.Config(**preset.config), told)


def _read_args(
    agent: ModuleType, name: str, argv: Sequence[str], options: Options, config: Any, told: str
) -> tuple[Options, Any]:
    title = (agent.__doc__ or "").partition("\n")[0]
    args = read(
        Args[agent.Config],
        argv,
        prog=f"python -m train.{name}",
        description=f"{title} Defaults below are {told} {options.env}.",
        default=Args(options, config),
    )
    return args.run, args.agent


# what a resumed run may be given otherwise: the result does not depend on it
FREE_TO_CHANGE = (
    *("checkpoint_every", "keep_checkpoints", "progress", "animate", "compilation_cache"),
    *("threshold", "watts_per_core", "g_per_kwh", "resume", "list_envs"),
    # rounding may depend on these, which is told then
    *("seed_devices", "env_devices", "net_devices", "lanes"),
    *("coordinator", "num_processes", "process_id", "distributed"),
)


def _parse_to_resume(
    agent: ModuleType, name: str, argv: Sequence[str], folder: Path
) -> tuple[Options, Any]:
    written = _folder.read_run(folder)
    if written["agent"] != name:
        raise ValueError(
            f"resume = {folder} is a run of {written['agent']}, not of {name}: "
            f"use python -m train.{written['agent']}"
        )
    stored, stored_config = stored_options(written), stored_config_of(agent, written, folder)
    options, config = _read_args(agent, name, argv, stored, stored_config, "those of the run on")
    if options.overwrite:
        raise ValueError(
            "--overwrite replaces a run and --resume goes on with it: give one of them"
        )
    place = {"name": folder.absolute().name, "runs_dir": str(folder.absolute().parent)}
    for field in dataclasses.fields(Options):
        given, there = getattr(options, field.name), getattr(stored, field.name)
        if field.name in FREE_TO_CHANGE or given == there:
            continue
        if field.name in place:
            there = place[field.name]
            given = str(Path(given).absolute()) if field.name == "runs_dir" else given
        if field.name in ("env_kwargs", "train_params"):
            given, there = (parse_pairs(field.name, pairs) for pairs in (given, there))
        if given != there:
            _refuse_change(field.name, given, there, folder)
    for field in dataclasses.fields(config):
        given, there = getattr(config, field.name), getattr(stored_config, field.name)
        if given != there:
            _refuse_change(field.name, given, there, folder)
    return options, config


def _refuse_change(name: str, given: Any, there: Any, folder: Path) -> None:
    option = "--" + name.replace("_", "-")
    raise ValueError(
        f"{option} = {given!r} contradicts the run in {folder}, where it is {there!r}: leave it "
        "out, or start another run"
    )


# config.json --------------------------------------------------------------------------------------

# of the options, what config.json does not hold: where the run is and how it is shown
NOT_STORED = (
    *("runs_dir", "name", "overwrite", "progress", "compilation_cache", "list_envs"),
    *("coordinator", "num_processes", "process_id", "distributed"),
)


def run_as_json(agent: str, options: Options, env_kwargs: dict[str, Any], config: Any) -> Any:
    """Return a run's settings as config.json holds them: enough to repeat it or to go on."""
    stored = dataclasses.asdict(options)
    for name in (*NOT_STORED, "resume"):
        del stored[name]
    stored["env_kwargs"] = env_kwargs
    return {
        "format": _folder.FORMAT,
        "agent": agent,
        **stored,
        "config": dataclasses.asdict(config),
    }


def stored_options(written: dict[str, Any]) -> Options:
    """Return the options of a run from its config.json; those that it lacks have their defaults."""
    names = {f.name for f in dataclasses.fields(Options)} - {*NOT_STORED, "resume"}
    values = {name: written[name] for name in names & written.keys()}
    values["env_kwargs"] = tuple(as_pair(k, v) for k, v in written["env_kwargs"].items())
    values["train_params"] = tuple(written["train_params"])
    return Options(**values)


def stored_config_of(agent: ModuleType, written: dict[str, Any], folder: Path) -> Any:
    """Return the agent's config of a run from its config.json.

    Raises:
        ValueError: it names a setting that the agent has not.
    """
    known = {f.name for f in dataclasses.fields(agent.Config)}
    for name in written["config"]:
        if name not in known:
            raise ValueError(
                f"{folder / 'config.json'}: {name} is not a setting of {written['agent']} here"
            )
    values = written["config"].items()
    return agent.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})


def read(cls: Any, argv: Sequence[str], **kwargs: Any) -> Any:
    """Read a dataclass as `tyro.cli` does, whole numbers as 1e6 and 1_000_000 too.

    Raises:
        ValueError: what tyro complains of, in one sentence.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(cls, args=argv, registry=_registry(), **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_one_sentence(stderr.getvalue())) from None


def _registry() -> tyro.constructors.ConstructorRegistry:
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def whole_number(info: Any) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda args: whole(args[0]),
            is_instance=lambda x: isinstance(x, int),
            str_from_instance=lambda x: [str(x)],
        )

    return registry


def whole(text: str) -> int:
    """Read a whole number, as 1e6 and 1_000_000 too.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text!r} is not a whole number")


def _one_sentence(box: str) -> str:
    """Take what matters out of tyro's framed message."""
    box = "\n".join(line for line in box.splitlines() if not line.startswith("╭"))  # the title
    lines = [re.sub(r"[│╭╮╰╯]|(?<!\S)─+.*", "", line).strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(box.splitlines()) if set(line.strip(" │")) == {"─"}]
    end = rules[0] if rules else len(lines)
    message = " ".join(line for line in lines[:end] if line)
    for i, line in enumerate(lines):
        if line.startswith("Perhaps you meant") and i + 1 < len(lines):
            message += f": did you mean {lines[i + 1].split()[0]}?"
    return f"{message} (--help shows all arguments)"


def parse_pairs(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Read ("obstacles=false", "num_tracks=512") as {"obstacles": False, "num_tracks": 512}.

    Raises:
        ValueError: a pair is not name=value.
    """
    kwargs = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{option}: {pair!r} must be name=value, e.g. obstacles=false")
        kwargs[name] = _value(text)
    return kwargs


def as_pair(name: str, value: Any) -> str:
    """Write what `parse_pairs` reads."""
    if isinstance(value, tuple | list):
        return f"{name}={','.join(map(str, value))}{',' if len(value) == 1 else ''}"
    return f"{name}={value}"


def _value(text: str) -> Any:
    if "," in text:  # rewards=1,2,3
        return tuple(_value(part) for part in text.split(",") if part)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def list_envs() -> str:
    """The names of all environments, one a line."""
    import gymnax

    import jaxrl.envs  # noqa: F401  (registers ours)

    return "\n".join(gymnax.registered_envs)


def exit_code(prepare: Callable[[], Callable[[], int]]) -> int:
    """Prepare, then run; wrong input becomes one sentence on stderr and exit code 2.

    Only `prepare` is guarded: an error of the run itself keeps its traceback. Warnings of `prepare`
    become notes, one line each.
    """
    try:
        with notes():
            run = prepare()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return run()


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Show warnings as notes, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"note: {warning.message}", file=sys.stderr)
