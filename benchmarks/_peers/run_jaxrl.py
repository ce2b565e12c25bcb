"""Ours trains, or steps environments: `python -m benchmarks._peers.run_jaxrl JSON`.

As our scripts do, one thread for a CPU program, malloc hands back what compiling leaves, several
seeds are spread over the cores as over devices (`--seed-devices`), or the networks of one that
learn apart (`--net-devices`); on several devices the run goes in chunks of updates: in a single
program what YNNPACK keeps grows (`benchmarks/LOG.md`). A chunk costs 5 ms, so there are 10 to 20 of
them here, not 200. The evaluation, not timed, is of 128 episodes; actions are drawn from a
stochastic policy, as the peers do, and are DQN's best.
"""

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._peers import measure
from jaxrl import rollout, sharding, spaces
from jaxrl.apart import NETS
from train import _devices, _memory

CHUNKS = 10  # of a run over several devices, or up to twice as many
PACKAGES = ("jaxrl", "gymnax", "jax", "flax", "optax")


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as `settings` say: agent, env, config, num_seeds, num_runs, first_seed."""
    _devices.use_one_thread()
    num_seeds, config = settings["num_seeds"], settings["config"]
    devices = _devices.default_devices(num_seeds, config.get("learn_apart", False))
    apart = devices.nets > 1
    jax.config.update("jax_num_cpu_devices", devices.seeds * devices.nets)
    from train._envs import make_env  # computes: after the devices are made
    from train._run import machine

    setup = make_env(settings["env"])
    env, params = setup.env, setup.params
    agent = importlib.import_module(f"jaxrl.agents.{settings['agent']}")
    if "hidden" in config:
        config["hidden"] = tuple(config["hidden"])
    config = agent.Config(**config)
    run = agent.make_train(config, env, params, *([NETS] if apart else []))
    act = agent.make_act(config, *spaces.read(env, params))
    best = settings["agent"] == "dqn"

    def train(key: jax.Array) -> Any:
        return run(key)[0]  # no losses or episodes' returns, as the peers report none

    def score(trained: Any, key: jax.Array) -> jax.Array:
        if apart and num_seeds == 1:
            trained = jax.tree.map(lambda x: x[0], trained)
        policy = agent.get_policy(trained)
        episodes = rollout.evaluate(
            env, params, lambda obs, k: act(policy, obs, None if best else k), key, 128
        )
        return episodes.returns.mean()

    mesh = sharding.make_mesh(devices.seeds, num_net_devices=devices.nets)
    spread = sharding.spread(run, mesh, 1)

    def in_chunks(keys: Any) -> Callable[[Any], Any]:
        """Compile what starts the seeds and a chunk of updates; return the whole run of them."""
        at_most = max(1, run.num_updates // CHUNKS)
        size = max(n for n in range(1, at_most + 1) if run.num_updates % n == 0)
        keys = spread.on_every_device(keys.reshape(-1))
        init, shapes = spread.compile_init(keys), spread.shapes(keys)
        where = spread.shardings(shapes)

        chunk = spread.each(lambda state: run.run(state, size)[0])
        jitted = jax.jit(chunk, in_shardings=(where,), out_shardings=where, donate_argnums=0)
        compiled = jitted.lower(shapes).compile()

        def train_all(keys: Any) -> Any:
            states = init(spread.on_every_device(keys.reshape(-1)))
            for _ in range(run.num_updates // size):
                states = compiled(states)
            return states

        return train_all

    names = ("num_seeds", "num_runs", "first_seed")
    numbers = (settings[name] for name in names)
    result = measure.train_jax(
        train,
        score,
        jax.random.key,
        *numbers,
        build=in_chunks if mesh.size > 1 else None,
        compiled_then=_memory.give_back,
    )
    about = {"steps": run.total_steps, "machine": machine()}
    return {**result, **about, "versions": measure.versions(*PACKAGES)}


def step(settings: dict[str, Any]) -> dict[str, Any]:
    """Step environments with random actions through `jaxrl.rollout`, as the learners do.

    So what is random in the environment is drawn ahead.
    """
    from benchmarks._peers import run_gymnax
    from train._envs import make_env
    from train._run import machine

    setup = make_env(settings["env"])
    env, params = setup.env, setup.params

    def reset(key: jax.Array, num_envs: int) -> rollout.Actors:
        return rollout.reset(env, params, key, num_envs)

    def draw(key: jax.Array, num_steps: int, num_envs: int) -> rollout.Draws:
        return rollout.draw(env, params, key, num_steps, num_envs)

    def one_step(actors: rollout.Actors, action: jax.Array, drawn: rollout.Draws) -> Any:
        actors, transition, _ = rollout.step(env, params, actors, action, drawn)
        done = transition.terminated | transition.truncated
        return actors, jnp.sum(transition.reward) + jnp.sum(done)

    result = run_gymnax.measure_rates(
        reset, one_step, env.action_space(params), settings["num_envs"], settings["seconds"], draw
    )
    return {**result, "machine": machine(), "versions": measure.versions(*PACKAGES)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given.get("about") == "machine":
        from train._run import machine

        print(json.dumps({"machine": machine()}))
    else:
        print(json.dumps(step(given) if "seconds" in given else main(given)))
