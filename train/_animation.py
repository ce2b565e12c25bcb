"""An episode as a GIF, by the environment's own pictures."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs import Ending, LanderEnding, LunarLander, MarsRover, MicroRacer
from jaxrl.envs import lunar_lander as lander
from jaxrl.envs import mars_rover as rover
from jaxrl.envs.micro_racer import EnvParams
from jaxrl.envs.render import lunar_lander as render_lander
from jaxrl.envs.render import mars_rover as render_rover
from jaxrl.envs.render import micro_racer as render


def micro_racer(
    act: Callable[[jax.Array], jax.Array],
    env: MicroRacer,
    params: EnvParams,
    key: jax.Array,
    path: Path,
) -> str:
    """Drive one episode with `act(obs) -> action` and write it to `path`; return what it shows.

    The track is the one that `env.reset(key, params)` starts on.
    """
    states = render.drive(env, params, act, key)
    render.save_animation(render.render_episode(states, params), path)
    ending = Ending(int(states.ending[-1]))
    how = "time limit" if ending == Ending.NONE else ending.name.lower().replace("_", " ")
    return f"one episode, {how} after {int(states.time[-1])} steps"


def mars_rover(
    act: Callable[[jax.Array], jax.Array],
    env: MarsRover,
    params: rover.EnvParams,
    key: jax.Array,
    path: Path,
) -> str:
    """Drive one episode with `act(obs) -> action`, whose choice in every state is drawn as arrows.

    Returns what the GIF at `path` shows.
    """
    states = render_rover.drive(env, params, act, key)
    everywhere = rover.EnvState(
        time=jnp.zeros(env.length, jnp.int32),
        position=jnp.arange(env.length, dtype=jnp.int32),
        ended=jnp.zeros(env.length, bool),
    )
    obs = jax.vmap(lambda state: env.observe(key, state, None, params))(everywhere)
    frames = render_rover.render_episode(
        states,
        params,
        terminal=env.terminal,
        policy=np.asarray(jax.vmap(act)(obs)),
        size=max(720, render_rover.MIN_CELL * (env.length + 1)),
    )
    render.save_animation(frames, path, fps=2)
    how = "ended" if states.ended[-1] else "time limit"
    total = float(np.asarray(params.rewards)[states.position[:-1]].sum())
    return f"one episode, {how} after {int(states.time[-1])} steps, return {total:g}"


def lunar_lander(
    act: Callable[[jax.Array], jax.Array],
    env: LunarLander,
    params: lander.EnvParams,
    key: jax.Array,
    path: Path,
) -> str:
    """Fly one episode with `act(obs) -> action` and write it to `path`; return what it shows."""
    states = render_lander.fly(env, params, act, key)
    frames = render_lander.render_episode(states, params)
    render_lander.save_animation(frames, path)
    ending = LanderEnding(int(lander.ending_of(jax.tree.map(lambda x: x[-1], states.world))))
    how = "time limit" if ending == LanderEnding.NONE else ending.name.lower().replace("_", " ")
    return f"one episode, {how} after {int(states.time[-1])} steps"
