"""gymnax steps its own environments: `python -m benchmarks._peers.run_gymnax JSON`.

Runs in any environment that has gymnax, before or after 1.0 (steps of 5 or of 6 values): a scan
over `vmap(env.step)` with random actions, automatic resets included.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnax
import jax
import jax.numpy as jnp

from benchmarks._peers import measure

STEPS = 65_536  # environment steps of one call, about
BLOCK = 64  # steps of each environment that are drawn for at once, by those who do; divides all


def measure_rates(
    reset: Callable[[jax.Array, int], Any],
    step: Callable[[Any, Any, Any], tuple[Any, jax.Array]],
    action_space: Any,
    num_envs: Sequence[int],
    seconds: float,
    draw: Callable[[Any, int, int], Any] | None = None,
) -> dict[str, Any]:
    """Environment steps per second for each number of environments side by side.

    Args:
        reset: `reset(key, num_envs) -> state` of all.
        step: `step(state, action, key) -> (state, ())`; the sum keeps every step in the program.
        action_space: gymnax's.
        num_envs: numbers of environments.
        seconds: to measure for, each.
        draw: `draw(key, num_steps, num_envs)` draws ahead what `step` takes in place of its key,
            leaves (num_steps, ...).
    """
    rates, compile_s = {}, {}
    for num in num_envs:
        num_steps = max(STEPS // num, BLOCK)

        def run(state: Any, key: jax.Array, num: int = num, num_steps: int = num_steps) -> Any:
            def random_action(key: jax.Array) -> jax.Array:
                if hasattr(action_space, "n"):
                    return jax.random.randint(key, (num,), 0, action_space.n)
                shape = (num, *action_space.shape)
                low, high = action_space.low, action_space.high
                return jax.random.uniform(key, shape, minval=low, maxval=high)

            def one(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
                key_act, key_env = jax.random.split(key)
                return step(state, random_action(key_act), key_env)

            def one_drawn(state: Any, inputs: tuple[jax.Array, Any]) -> tuple[Any, jax.Array]:
                key_act, drawn = inputs
                return step(state, random_action(key_act), drawn)

            def block(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
                assert draw is not None
                key_act, key_env = jax.random.split(key)
                inputs = jax.random.split(key_act, BLOCK), draw(key_env, BLOCK, num)
                state, seen = jax.lax.scan(one_drawn, state, inputs)
                return state, jnp.sum(seen)

            if draw is None:
                state, seen = jax.lax.scan(one, state, jax.random.split(key, num_steps))
            else:
                keys = jax.random.split(key, num_steps // BLOCK)
                state, seen = jax.lax.scan(block, state, keys)
            return state, jnp.sum(seen)

        state = jax.jit(reset, static_argnums=1)(jax.random.PRNGKey(0), num)
        program = jax.jit(run)
        key = jax.random.PRNGKey(1)
        compiled, compile_s[str(num)], _ = measure.timed(program.lower(state, key).compile)
        state, _ = jax.block_until_ready(compiled(state, key))
        calls, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            calls += 1
            state, _ = jax.block_until_ready(compiled(state, jax.random.PRNGKey(1 + calls)))
        rates[str(num)] = calls * num * num_steps / (time.perf_counter() - begin)
    return {"rates": rates, "compile_s": max(compile_s.values()), "peak_mb": measure.peak_mb()}


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Step as `settings` say: env, num_envs (several), seconds."""
    env, params = gymnax.make(settings["env"])

    def reset(key: jax.Array, num_envs: int) -> Any:
        keys = jax.random.split(key, num_envs)
        return jax.vmap(env.reset, in_axes=(0, None))(keys, params)[1]

    def step(state: Any, action: jax.Array, key: jax.Array) -> Any:
        keys = jax.random.split(key, action.shape[0])
        out = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, params)
        obs, state, reward = out[:3]
        return state, jnp.sum(reward) + sum(jnp.sum(x) for x in jax.tree.leaves(obs))

    space = env.action_space(params)
    result = measure_rates(reset, step, space, settings["num_envs"], settings["seconds"])
    return {**result, "versions": measure.versions("gymnax", "jax")}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
