"""Runs spread over eight forced CPU devices: the same learning as on one."""

from functools import cache

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl.agents import ppo, sac
from jaxrl.sharding import SpreadTrain, make_mesh, spread

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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(
    ("make", "said"),
    [
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
