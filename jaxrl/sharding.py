"""A training run on many devices: seeds (or settings) along one axis of a mesh, the environments of
each along another, or its networks along a third.

    mesh = make_mesh(num_seed_devices=4, num_env_devices=2)
    run = spread(train, mesh, num_envs=config.num_envs)
    states = run.init(jax.random.split(key, 8))
    states, metrics = run.run(states, num_updates)

Lanes (seeds) never talk to each other: each device gets its own. The environments of a lane are cut
along the other axis; what belongs to them (their states, the replay's columns) lies with them,
parameters on all of them, and the compiler puts in the sums of gradients: the same learning as on
one device, up to the order of those sums. Networks that learn apart (`jaxrl.apart`) do so on a
device each, and all else is done by both: the same learning, up to rounding. `jax.sharding`
throughout: a mesh over the devices of several processes (`jax.distributed`) is the same program,
run by each of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.apart import NETS
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
    num_net_devices: int = 1,
) -> Mesh:
    """Return a mesh (seeds, envs, nets) over the first devices there are, of all processes.

    Raises:
        ValueError: there are not so many devices, or some of a process's would be left out where
            there are several processes; or environments and networks are both to be cut.
    """
    check_count("num_seed_devices", num_seed_devices)
    check_count("num_env_devices", num_env_devices)
    check_count("num_net_devices", num_net_devices)
    if num_env_devices > 1 and num_net_devices > 1:
        raise ValueError(
            f"num_env_devices = {num_env_devices} and num_net_devices = {num_net_devices}: one of "
            "them must be 1"
        )
    devices = jax.devices() if devices is None else list(devices)
    shape = (num_seed_devices, num_env_devices, num_net_devices)
    asked = math.prod(shape)
    told = "num_seed_devices * num_env_devices"
    told += f" = {num_seed_devices} * {num_env_devices}"
    if num_net_devices > 1:
        told = f"num_seed_devices * num_net_devices = {num_seed_devices} * {num_net_devices}"
    if asked > len(devices):
        raise ValueError(f"{told} = {asked}, but there are {len(devices)} devices")
    if jax.process_count() > 1 and asked != len(devices):
        raise ValueError(
            f"{told} = {asked} must be all {len(devices)} devices of the {jax.process_count()} "
            "processes"
        )
    return jax.make_mesh(
        shape,
        (SEEDS, ENVS, NETS),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices[:asked],
    )


@dataclass(frozen=True)
class SpreadTrain:
    """A training run of many lanes on a mesh; every array's leading axis is that of the lanes."""

    train: Train[Any]
    mesh: Mesh
    num_envs: int
    lanes: str

    def lanes_at_once(self, num_lanes: int) -> int:
        """How many lanes go side by side on a device; with 1 each is exact, whatever the mesh."""
        return num_lanes // self.mesh.shape[SEEDS] if self.lanes == LANES[0] else 1

    def init(self, keys: Any) -> Any:
        """Return the states before the first update, of keys (num_lanes,), where they belong."""
        keys = self.on_every_device(keys)
        return self.compile_init(keys)(keys)

    def compile_init(self, keys: Any) -> Callable[[Any], Any]:
        """Compile `init`; the result takes keys that lie on every device (`on_every_device`)."""
        where = self.shardings(self._shapes(keys))
        return jax.jit(self.each(self.train.init), out_shardings=where).lower(keys).compile()

    def shapes(self, keys: Any) -> Any:
        """Return shapes, types and shardings of the states: a template of a checkpoint."""
        shapes = self._shapes(keys)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            self.shardings(shapes),
        )

    def compile(self, states: Any, num_updates: int) -> Callable[[Any], tuple[Any, Metrics]]:
        """Compile `num_updates` updates of states like these (or their shapes).

        The states are donated. Metrics (num_lanes, num_updates) come back on every device, so that
        every process can read them.
        """
        where = self.shardings(states)
        run = self.each(lambda state: self.train.run(state, num_updates))
        jitted = jax.jit(
            run,
            in_shardings=(where,),
            out_shardings=(where, self.everywhere),
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

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every device has a copy of."""
        return NamedSharding(self.mesh, P())

    @property
    def by_lane(self) -> NamedSharding:
        """The sharding of lanes that are not cut any further."""
        return NamedSharding(self.mesh, P(SEEDS))

    def on_every_device(self, tree: Any) -> Any:
        """Give every device a copy of arrays that each process has alike; nothing is compared."""

        def one(x: Any) -> jax.Array:
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                data = one(jax.random.key_data(x))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.everywhere, lambda index: x[index])

        return jax.tree.map(one, tree)

    def readable(self, tree: Any) -> Any:
        """Return the arrays so that this process can read them whole, whoever has them."""
        if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
            return tree
        return jax.jit(lambda t: t, out_shardings=self.everywhere)(tree)

    def each(self, one: Callable[..., Any], num_shared: int = 0) -> Callable[..., Any]:
        """Apply `one(lane, *shared)` to many lanes, each device its own; to be jitted.

        Args:
            one: a pure function of one lane and of `num_shared` arguments that are all lanes'.
            num_shared: how many.
        """
        many = self._local(one)
        if self.mesh.size == 1:
            return many
        return jax.shard_map(
            many,
            mesh=self.mesh,
            in_specs=(P(SEEDS), *(P(),) * num_shared),
            out_specs=P(SEEDS),
            # nothing is left to the compiler where environments stay whole: bit for bit one device
            axis_names={SEEDS} if self.mesh.shape[ENVS] > 1 else {SEEDS, ENVS, NETS},
            check_vma=False,
        )

    def _local(self, one: Callable[..., Any]) -> Callable[..., Any]:
        """Apply a function of one lane to the lanes of one device."""

        def many(lanes: Any, *shared: Any) -> Any:
            def alone(lane: Any) -> Any:
                return one(lane, *shared)

            if jax.tree.leaves(lanes)[0].shape[0] == 1:  # bit for bit the run of one seed
                out = alone(jax.tree.map(lambda x: x[0], lanes))
                return jax.tree.map(lambda x: jnp.expand_dims(x, 0), out)
            return jax.vmap(alone)(lanes) if self.lanes == LANES[0] else jax.lax.map(alone, lanes)

        return many

    def _shapes(self, keys: Any) -> Any:
        check_lanes(jax.tree.leaves(keys)[0].shape[0], self.mesh)
        return jax.eval_shape(jax.vmap(self.train.init), keys)


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
