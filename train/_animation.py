"""An episode of MicroRacer as a GIF, by the environment's own pictures."""

from collections.abc import Callable
from pathlib import Path

import jax

from jaxrl.envs import Ending, MicroRacer
from jaxrl.envs.micro_racer import EnvParams
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
