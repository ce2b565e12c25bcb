"""Which devices a run takes: seeds over some, each seed's environments or networks over others."""

import importlib.metadata
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from jaxrl import sharding
from jaxrl.apart import NETS
from jaxrl.sharding import SpreadTrain
from jaxrl.types import Train

if TYPE_CHECKING:
    from train._cli import Options


def only_cpu() -> bool:
    """Whether no accelerator's plugin is installed, or the user wants none."""
    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    return not accelerators or getattr(jax.config, "jax_platforms") == "cpu"  # noqa: B009


def use_one_thread() -> None:
    """Let XLA's CPU programs run on one thread each; before anything is computed.

    A training run is a long row of small kernels: spreading them over threads costs more than it
    gains (`benchmarks/LOG.md`). The other cores are for other devices. XLA's only setting for it is
    an environment variable; where the user has set it, or there may be an accelerator, whose host
    code compiles on those threads, it is left alone.
    """
    if "PJRT_NPROC" not in os.environ and "NPROC" not in os.environ and only_cpu():
        os.environ["PJRT_NPROC"] = "1"


@dataclass(frozen=True)
class Default:
    """Over how many devices a run goes where nothing is asked for."""

    seeds: int = 1
    nets: int = 1


def default_devices(
    num_seeds: int, learn_apart: bool, seeds: int | None = None, nets: int | None = None
) -> Default:
    """A device for each core, for the seeds first; `seeds` and `nets` where they are given."""
    seeds = seeds or most_devices(num_seeds, num_cores() // (nets or 1))
    return Default(seeds, nets or (2 if learn_apart and num_cores() >= 2 * seeds else 1))


def make_cpu_devices(
    options: "Options", num_processes: int = 1, learn_apart: bool = False
) -> Default:
    """Let JAX make as many CPU devices as are asked for; before anything is computed.

    `learn_apart`: whether the networks of a seed can have a device each.

    Returns:
        over how many devices the run goes on CPU where nothing is asked for: the seeds over one for
        each core, as far as each gets equally many seeds; the networks over two where that leaves
        cores. 1 where JAX has begun already, or was given a number of devices: it keeps what it
        has, and `spread` tells if that is not enough.
    """
    use_one_thread()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return Default()
    there = getattr(jax.config, "jax_num_cpu_devices")  # noqa: B009  (types know it not)
    default = Default()
    if num_processes == options.env_devices == 1 and there <= 0 and only_cpu():
        default = default_devices(
            options.num_seeds, learn_apart, options.seed_devices, options.net_devices
        )
    asked = (options.seed_devices or default.seeds) * options.env_devices // num_processes
    asked *= options.net_devices or default.nets
    if asked > max(1, there):
        try:
            jax.config.update("jax_num_cpu_devices", asked)
        except RuntimeError:
            return Default()
    return default


def num_cores() -> int:
    """Cores that this process may use; fewer than there are where it is bound to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def most_devices(num_seeds: int, available: int) -> int:
    """How many of the devices can have equally many seeds each."""
    return max((n for n in range(1, available + 1) if num_seeds % n == 0), default=1)


def choose_net_devices(options: "Options", learn_apart: bool, default: Default) -> int:
    """Over how many devices the networks of a seed go.

    Raises:
        ValueError: they cannot learn apart, or not so.
    """
    asked = options.net_devices
    if asked is None:
        return default.nets if learn_apart and options.env_devices == 1 else 1
    if asked == 2 and not learn_apart:
        raise ValueError(
            "net_devices = 2 needs --learn-apart (ppo and sac have it): else the networks wait for "
            "each other after every gradient"
        )
    if asked == 2 and options.env_devices > 1:
        raise ValueError(
            f"net_devices = 2 and env_devices = {options.env_devices}: one of them must be 1"
        )
    if asked == 2 and jax.process_count() > 1:
        raise ValueError(
            f"net_devices = 2 is for one process, but there are {jax.process_count()}: leave it out"
        )
    return asked


def spread(
    options: "Options",
    train: Train[Any],
    num_envs: int,
    default: Default = Default(),
    num_net_devices: int = 1,
) -> SpreadTrain:
    """Return the run of all seeds on the devices that `options` ask for.

    `default` is what `make_cpu_devices` returned, `num_net_devices` what `choose_net_devices` did.

    Raises:
        ValueError: there are not so many, or seeds or environments cannot be cut so.
    """
    num_seed_devices = choose_seed_devices(options, default.seeds, num_net_devices)
    env_devices, available = options.env_devices, jax.device_count()
    told = f"seed_devices * env_devices = {num_seed_devices} * {env_devices}"
    if num_net_devices > 1:
        told = f"seed_devices * net_devices = {num_seed_devices} * {num_net_devices}"
    asked = num_seed_devices * env_devices * num_net_devices
    if asked > available:
        raise ValueError(
            f"{told} = {asked}, but there are {available} {jax.default_backend()} device(s): "
            "lower one of them"
        )
    if jax.process_count() > 1 and asked != available:
        raise ValueError(
            f"{told} = {asked} must be all {available} devices of the {jax.process_count()} "
            "processes"
        )
    check_seeds(options.num_seeds, num_seed_devices)
    if num_envs % env_devices:
        raise ValueError(f"num_envs = {num_envs} must be a multiple of env_devices = {env_devices}")
    mesh = sharding.make_mesh(num_seed_devices, env_devices, num_net_devices=num_net_devices)
    return sharding.spread(train, mesh, num_envs, options.lanes.replace("-", " "))


def spread_agents(options: "Options", train: Train[Any]) -> SpreadTrain:
    """Return what spreads a sweep's agents, settings times seeds, over devices.

    Raises:
        ValueError: there are not so many.
    """
    num_devices, available = options.seed_devices, jax.local_device_count()
    if num_devices is None:
        num_devices = 1 if jax.default_backend() == "cpu" else available
    if num_devices > available:
        raise ValueError(
            f"seed_devices = {num_devices}, but there are {available} {jax.default_backend()} "
            "device(s): lower it"
        )
    mesh = sharding.make_mesh(num_devices)
    return sharding.spread(train, mesh, 1, options.lanes.replace("-", " "))


def choose_seed_devices(options: "Options", cpu_devices: int = 1, num_net_devices: int = 1) -> int:
    """As many as are asked for; else all there are of several accelerators, and `cpu_devices`.

    Not more than can have equally many seeds each; all of them where there are several processes.
    """
    if options.seed_devices is not None:
        return options.seed_devices
    available = jax.device_count() // (options.env_devices * num_net_devices)
    if jax.process_count() > 1:
        return max(1, available)
    if jax.default_backend() == "cpu":
        return cpu_devices
    return most_devices(options.num_seeds, available)


def check_seeds(num_seeds: int, num_seed_devices: int) -> None:
    """Raise ValueError unless the seeds can be cut into equal parts."""
    if num_seeds % num_seed_devices:
        raise ValueError(
            f"num_seeds = {num_seeds} must be a multiple of seed_devices = {num_seed_devices}"
        )


def told(spread: SpreadTrain) -> str:
    """Where the run is, for people; nothing of a single device."""
    if spread.mesh.size == 1:
        return ""
    processes = f" of {n} processes" if (n := jax.process_count()) > 1 else ""
    shape = spread.mesh.shape
    seeds, envs, nets = (shape[name] for name in (sharding.SEEDS, sharding.ENVS, NETS))
    cut = f" (seeds over {seeds}, environments over {envs})" if envs > 1 else ""
    cut = f" (seeds over {seeds}, networks over {nets})" if nets > 1 else cut
    return f" on {spread.mesh.size} devices{processes}{cut}"
