"""Runs spread over eight forced CPU devices: the same learning as on one."""

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl import apart, checkpoint
from jaxrl.agents import ppo, sac
from jaxrl.apart import NETS
from jaxrl.sharding import SpreadTrain, make_mesh, spread

ROOT = Path(__file__).parents[1]
NUM_ENVS, UPDATES = 16, 10
PPO = ppo.Config(num_envs=NUM_ENVS, num_steps=16, total_steps=16 * 16 * UPDATES, hidden=(16,))
SAC = sac.Config(
    num_envs=NUM_ENVS,
    num_steps=5,
    total_steps=16 * 5 * UPDATES,
    learning_starts=80,
    batch_size=32,
    buffer_size=800,
    hidden=(16,),
)
KEYS = jax.random.split(jax.random.key(0), 8)


@cache
def train(name: str):
    """A short run of an agent."""
    agent, config, env = {"ppo": (ppo, PPO, "CartPole-v1"), "sac": (sac, SAC, "Pendulum-v1")}[name]
    return agent.make_train(config, *gymnax.make(env))


@cache
def train_apart(name: str, net_axis: str | None = None):
    """A short run of an agent whose networks learn apart."""
    agent, config, env = {"ppo": (ppo, PPO, "CartPole-v1"), "sac": (sac, SAC, "Pendulum-v1")}[name]
    return agent.make_train(config.replace(learn_apart=True), *gymnax.make(env), net_axis)


@cache
def alone(name: str, seed: int):
    """Parameters and metrics of one key's run on one device."""
    one = train(name)
    state, metrics = jax.jit(lambda s: one.run(s, UPDATES))(jax.jit(one.init)(KEYS[seed]))
    return jax.device_get((state.params, metrics))


def ran(run: SpreadTrain, keys: jax.Array):
    """Where the states lie, then parameters and metrics at the end."""
    states = run.init(keys)
    states, metrics = run.run(states, UPDATES)
    return states, jax.device_get((states.params, metrics))


def lane(tree, i: int):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_environments_on_eight_devices_learn_the_same(name):
    """Data-parallel: equal to one device within float tolerance after 10 updates."""
    run = spread(train(name), make_mesh(1, 8), NUM_ENVS)
    states, found = ran(run, KEYS[:1])
    assert len(states.actors.obs.sharding.device_set) == 8
    assert states.actors.obs.sharding.spec == P("seeds", "envs")
    assert states.actors.obs.addressable_shards[0].data.shape[1] == NUM_ENVS // 8
    start = lane(jax.device_get(run.init(KEYS[:1]).params), 0)
    params, metrics = lane(found, 0)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
    ]
    assert max(moved) > 1e-3  # it has learnt at all
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (params, metrics),
        alone(name, 0),
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_devices", "num_seeds", "lanes"),
    [(8, 8, "side by side"), pytest.param(2, 4, "one by one", marks=pytest.mark.slow)],
)
def test_seeds_over_devices_are_bit_identical(num_devices, num_seeds, lanes):
    """Every seed is the run of its key alone, to the last bit, metrics included."""
    run = spread(train("ppo"), make_mesh(num_devices), NUM_ENVS, lanes)
    states, found = ran(run, KEYS[:num_seeds])
    assert len(states.num_updates.sharding.device_set) == num_devices
    for seed in (0, num_seeds - 1):
        jax.tree.map(np.testing.assert_array_equal, lane(found, seed), alone("ppo", seed))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lanes_side_by_side_on_two_devices_end_and_agree():
    """Two programs of vmapped lanes at once: hung while initial weights used batched LAPACK."""
    run = spread(train("ppo"), make_mesh(2), NUM_ENVS)
    states = run.init(KEYS[:4])
    updates = run.compile(states, UPDATES)
    for _ in range(5):
        states, metrics = updates(run.init(KEYS[:4]))
        found = jax.device_get((states.params, metrics))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        lane(found, 3)[0],
        alone("ppo", 3)[0],
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
def test_networks_on_two_devices_learn_as_on_one(name):
    """Whatever is in the state, the optimiser's moments too, on both devices; and the metrics."""
    one, two = (
        spread(train_apart(name, axis), make_mesh(2, num_net_devices=num), NUM_ENVS)
        for axis, num in ((None, 1), (NETS, 2))
    )
    expected, found = (run.run(run.init(KEYS[:2]), UPDATES) for run in (one, two))
    assert len(found[0].num_updates.sharding.device_set) == 4
    copies = {}
    for shard in jax.tree.leaves(found[0].params)[0].addressable_shards:
        copies.setdefault(shard.index[0].start, []).append(np.asarray(shard.data))
    for first, second in copies.values():
        np.testing.assert_array_equal(first, second)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        # PPO's to the last bit here; in SAC XLA fuses otherwise
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def in_two(parts, num: int = 2):
    """The results of the parts on `num` devices, an axis of devices first."""
    mesh = make_mesh(num_net_devices=num)
    run = jax.shard_map(
        lambda: jax.tree.map(lambda x: x[None], apart.call(parts, NETS)),
        mesh=mesh,
        in_specs=(),
        out_specs=P(NETS),
        check_vma=False,
    )
    return jax.jit(run)()


def test_apart_hands_every_device_the_bits_of_all_parts():
    odd = jnp.array([-0.0, jnp.nan, jnp.inf, 1e-42, -3.5], jnp.float32)
    more = jnp.array([1, -7], jnp.int16), jnp.array([True, False]), jnp.uint8(200)
    parts = [lambda: (odd, {"a": more}), lambda: (jnp.int32(-(2**31)), {"b": odd[::-1]})]
    expected = apart.call(parts, None)
    found = in_two(parts)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        for device in (0, 1):
            assert np.asarray(b)[device].tobytes() == np.asarray(a).tobytes()


def test_apart_runs_a_part_on_its_device_alone():
    """Both count what they are called with: the other device's count stays at zero."""
    counted = []

    def count(device):
        counted.append(int(device))

    def part():
        jax.debug.callback(count, jax.lax.axis_index(NETS))
        return (jnp.zeros(()),)

    jax.block_until_ready(in_two([part, lambda: (jnp.ones(()),)]))
    jax.effects_barrier()
    assert counted == [0]


def test_parts_without_a_device_each_are_refused():
    one = [lambda: (jnp.zeros(()),)] * 3
    with pytest.raises(ValueError, match=r"'nets' has 2 device.* 3 parts"):
        in_two(one)


@pytest.mark.parametrize("agent", [ppo, sac])
def test_networks_that_wait_for_each_other_cannot_be_put_apart(agent):
    config, env = {ppo: (PPO, "CartPole-v1"), sac: (SAC, "Pendulum-v1")}[agent]
    with pytest.raises(ValueError, match="net_axis = 'nets' needs learn_apart = True"):
        agent.make_train(config, *gymnax.make(env), NETS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_mesh(5, num_net_devices=2), r"num_net_devices = 5 \* 2 = 10, but .* 8 dev"),
        (lambda: make_mesh(1, 2, num_net_devices=2), "num_net_devices = 2: one of them must be 1"),
        (lambda: make_mesh(9), r"num_seed_devices \* num_env_devices = 9 \* 1 = 9.* 8 devices"),
        (lambda: make_mesh(0), "num_seed_devices"),
        (lambda: spread(train("ppo"), make_mesh(1, 3), NUM_ENVS), r"num_envs = 16 .* = 3"),
        (lambda: spread(train("ppo"), make_mesh(), NUM_ENVS, "fast"), "lanes"),
        (lambda: spread(train("ppo"), make_mesh(3), NUM_ENVS).init(KEYS[:4]), "4 lanes .* = 3"),
    ],
)
def test_what_cannot_be_cut_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_mesh_of_one_device_is_the_plain_run():
    run = spread(train("ppo"), make_mesh(), NUM_ENVS)
    _, found = ran(run, jnp.stack([KEYS[5]]))
    jax.tree.map(np.testing.assert_array_equal, lane(found, 0), alone("ppo", 5))


# several processes --------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

folder, coordinator, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(coordinator, 2, index, initialization_timeout=120)

from jaxrl import checkpoint, sharding
from jaxrl.types import Train


@struct.dataclass
class State:
    total: jax.Array
    actors: jax.Array  # one number for each of two environments
    key: jax.Array


def update(state):
    total = state.total + state.actors.sum()
    return state.replace(total=total, actors=state.actors + 1.0), {"total": total}


train = Train(lambda key: State(jnp.zeros(()), jnp.zeros(2), key), update, 6, 2)
keys = jax.random.split(jax.random.key(0), 2)
for mesh in (sharding.make_mesh(2, 1), sharding.make_mesh(1, 2)):
    run = sharding.spread(train, mesh, 2)
    states, metrics = run.run(run.init(keys), 3)
    # 0, then 2 of two environments at 1, then 4: the sums after each
    np.testing.assert_array_equal(np.asarray(metrics["total"]), [[0.0, 2.0, 6.0]] * 2)
    place = f"{folder}/{mesh.shape['envs']}"
    with checkpoint.Checkpoints(place) as checkpoints:
        snapshot = checkpoint.to_host(states)
        run.run(states, 1)  # takes the states: the snapshot is a copy
        checkpoints.save(3, snapshot, {"note": 1}, score=2.0)
    restored = checkpoint.restore(place, run.shapes(keys))
    assert (restored.step, restored.metadata, restored.score) == (3, {"note": 1}, 2.0)
    where = jax.tree.map(lambda x: x.sharding, restored.state)
    assert where == run.shardings(restored.state)
    _, metrics = run.run(restored.state, 3)
    np.testing.assert_array_equal(np.asarray(metrics["total"]), [[12.0, 20.0, 30.0]] * 2)
"""


@pytest.mark.timeout(600)
def test_two_processes_run_save_and_restore(tmp_path):
    """Over two processes, lanes and then environments: the sums by hand, also after a restore."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), coordinator]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    # what two processes wrote, one reads: lane 1 after three updates
    shapes = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2, 2), jnp.float32)
    found, _ = checkpoint.find(tmp_path / "1")
    assert [leaf["shape"] for leaf in found["leaves"]] == [[*x.shape] for x in shapes] + [[2]]
    arrays = checkpoint._read_arrays(tmp_path / "1" / "3", ["00000", "00001", "00002"])
    np.testing.assert_array_equal(arrays["00000"], [6.0, 6.0])
    np.testing.assert_array_equal(arrays["00001"], np.full((2, 2), 3.0))
