"""A training run on many devices: seeds (or settings) along one axis of a mesh, environments along
the other.

    mesh = make_mesh(num_seed_devices=4, num_env_devices=2)
    run = spread(train, mesh, num_envs=config.num_envs)
    states = run.init(jax.random.split(key, 8))
    states, metrics = run.run(states, num_updates)

Lanes (seeds) never talk to each other: each device gets its own. The environments of a lane are cut
along the other axis; what belongs to them (their states, the replay's columns) lies with them,
parameters on all of them, and the compiler puts in the sums of gradients: the same learning as on
one device, up to the order of those sums. `jax.sharding` throughout, so a mesh over the devices of
several processes (`jax.distributed`) works as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.checks import check_choice, check_count
from jaxrl.types import Metrics, Train

SEEDS, ENVS = "seeds", "envs"
LANES = ("side by side", "one by one")

# where the environments' axis is, by the field of a train state (its axis of lanes left out)
ENV_AXIS = {"actors": 0, "noise": 0, "discounted_return": 0, "replay": 1}


def make_mesh(
    num_seed_devices: int = 1,
    num_env_devices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Return a mesh (seeds, envs) over the first devices there are, of all processes.

    Raises:
        ValueError: there are not so many devices, or some of a process's would be left out where
            there are several processes.
    """
    check_count("num_seed_devices", num_seed_devices)
    check_count("num_env_devices", num_env_devices)
    devices = jax.devices() if devices is None else list(devices)
    asked = num_seed_devices * num_env_devices
    if asked > len(devices):
        raise ValueError(
            f"num_seed_devices * num_env_devices = {num_seed_devices} * {num_env_devices} = "
            f"{asked}, but there are {len(devices)} devices"
        )
    if jax.process_count() > 1 and asked != len(devices):
        raise ValueError(
            f"num_seed_devices * num_env_devices = {num_seed_devices} * {num_env_devices} = "
            f"{asked} must be all {len(devices)} devices of the {jax.process_count()} processes"
        )
    return jax.make_mesh(
        (num_seed_devices, num_env_devices),
        (SEEDS, ENVS),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[:asked],
    )


@dataclass(frozen=True)
class SpreadTrain:
    """A training run of many lanes on a mesh; every array's leading axis is that of the lanes."""

    train: Train[Any]
    mesh: Mesh
    num_envs: int
    lanes: str

    def init(self, keys: jax.Array) -> Any:
        """Return the states before the first update, of keys (num_lanes,), where they belong."""
        check_lanes(keys.shape[0], self.mesh)
        shapes = jax.eval_shape(jax.vmap(self.train.init), keys)
        return jax.jit(self._each(self.train.init), out_shardings=self.shardings(shapes))(keys)

    def compile(self, states: Any, num_updates: int) -> Callable[[Any], tuple[Any, Metrics]]:
        """Compile `num_updates` updates of states like these (or their shapes).

        The states are donated. Metrics (num_lanes, num_updates) come back on every device, so that
        every process can read them.
        """
        where = self.shardings(states)
        run = self._each(lambda state: self.train.run(state, num_updates))
        jitted = jax.jit(
            run,
            in_shardings=(where,),
            out_shardings=(where, NamedSharding(self.mesh, P())),
            donate_argnums=0,
        )
        return jitted.lower(states).compile()

    def run(self, states: Any, num_updates: int) -> tuple[Any, Metrics]:
        """Go on for `num_updates` updates of every lane."""
        return self.compile(states, num_updates)(states)

    def shardings(self, states: Any) -> Any:
        """Where each array of the states (or of their shapes) lies."""

        def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
            axis = ENV_AXIS.get(getattr(path[0], "name", ""))
            if axis is None or x.ndim < axis + 2 or x.shape[axis + 1] != self.num_envs:
                return NamedSharding(self.mesh, P(SEEDS))
            return NamedSharding(self.mesh, P(SEEDS, *(None,) * axis, ENVS))

        return jax.tree_util.tree_map_with_path(one, states)

    def _each(self, one: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Apply a function of one lane to many, each device its own."""
        many = self._local(one)
        if self.mesh.size == 1:
            return many
        return jax.shard_map(
            many,
            mesh=self.mesh,
            in_specs=P(SEEDS),
            out_specs=P(SEEDS),
            # nothing is left to the compiler where environments stay whole: bit for bit one device
            axis_names={SEEDS} if self.mesh.shape[ENVS] > 1 else {SEEDS, ENVS},
            check_vma=False,
        )

    def _local(self, one: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Apply a function of one lane to the lanes of one device."""

        def many(lanes: Any) -> Any:
            if jax.tree.leaves(lanes)[0].shape[0] == 1:  # bit for bit the run of one seed
                out = one(jax.tree.map(lambda x: x[0], lanes))
                return jax.tree.map(lambda x: jnp.expand_dims(x, 0), out)
            return jax.vmap(one)(lanes) if self.lanes == LANES[0] else jax.lax.map(one, lanes)

        return many


def spread(
    train: Train[Any], mesh: Mesh, num_envs: int, lanes: str = "side by side"
) -> SpreadTrain:
    """Return `train` for many lanes on `mesh`.

    Args:
        train: of any agent.
        mesh: see `make_mesh`.
        num_envs: environments of a lane, to know their axis by.
        lanes: those of one device go "side by side" (vmap: fast, the same to rounding) or "one by
            one" (each lane is bit for bit the run of its key alone, however many devices and lanes
            there are). A device with a single lane is exact either way.

    Raises:
        ValueError: the environments can't be cut into equal parts, or `lanes` is neither.
    """
    check_choice("lanes", lanes, LANES)
    check_count("num_envs", num_envs)
    if num_envs % mesh.shape[ENVS]:
        raise ValueError(
            f"num_envs = {num_envs} must be a multiple of num_env_devices = {mesh.shape[ENVS]}"
        )
    return SpreadTrain(train, mesh, num_envs, lanes)


def check_lanes(num_lanes: int, mesh: Mesh) -> None:
    """Raise ValueError unless the lanes can be cut into equal parts."""
    if num_lanes % mesh.shape[SEEDS]:
        raise ValueError(
            f"{num_lanes} lanes (seeds times settings) must be a multiple of num_seed_devices = "
            f"{mesh.shape[SEEDS]}"
        )
