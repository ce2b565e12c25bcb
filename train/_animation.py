"""An episode of MicroRacer as a GIF: the whole track, and the car's surroundings in its middle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from jaxrl.envs import Ending, MicroRacer
from jaxrl.envs._lidar import CELLS_PER_UNIT, RASTER, unpack_cells
from jaxrl.envs.micro_racer import EnvParams

SIZE = 650  # pixels a side: two cells a pixel
INSET = 260  # pixels a side of the surroundings, magnified INSET / (2 * REACH) pixels a cell
REACH = 65  # cells to each side
STEPS_PER_FRAME = 4
GRASS, ROAD, TRAIL, CAR, INK = (
    (214, 226, 206),
    (70, 74, 82),
    (250, 196, 60),
    (220, 40, 40),
    (30, 30, 30),
)


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
    states = drive(act, env, params, key)
    road = np.asarray(unpack_cells(params.tracks.road[states.track[0]]))
    frames = [draw(road, states, i) for i in [*range(0, len(states.time) - 1, STEPS_PER_FRAME), -1]]
    frames += [frames[-1]] * 20  # rest on the result
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, loop=0)
    num_steps = int(states.time[-1])
    return f"one episode, {how_it_ended(states)} after {num_steps} steps"


def drive(
    act: Callable[[jax.Array], jax.Array], env: MicroRacer, params: EnvParams, key: jax.Array
) -> Any:
    """Return the states of one episode, start and end included, as arrays (num_steps + 1, ...)."""

    def one_step(carry: Any, __: None) -> tuple[Any, Any]:
        obs, state = carry
        # no auto-reset: the last state is wanted
        obs, state, *_ = env.step_env(key, state, act(obs), params)
        return (obs, state), state

    def episode() -> tuple[Any, Any]:
        obs, start = env.reset_env(key, params)
        _, states = jax.lax.scan(one_step, (obs, start), length=int(params.max_steps_in_episode))
        return start, states

    start, states = jax.device_get(jax.jit(episode)())
    ended = states.ending != Ending.NONE
    num_steps = int(ended.argmax()) + 1 if ended.any() else len(ended)
    return jax.tree.map(
        lambda first, rest: np.concatenate([first[None], rest[:num_steps]]), start, states
    )


def how_it_ended(states: Any) -> str:
    """The ending in words."""
    ending = Ending(int(states.ending[-1]))
    return "time limit" if ending == Ending.NONE else ending.name.lower().replace("_", " ")


def pixels(position: np.ndarray) -> np.ndarray:
    """Positions (..., 2) -> (column, row) in a picture of one pixel a cell, y upward."""
    cells = position * CELLS_PER_UNIT + RASTER / 2
    return np.stack([cells[..., 0], RASTER - cells[..., 1]], axis=-1)


def draw(road: np.ndarray, states: Any, i: int) -> Image.Image:
    """Draw the state number `i`; road (1300, 1300) bool, x first."""
    cells = np.where(road.T[::-1, :, None], ROAD, GRASS).astype(np.uint8)
    large = Image.fromarray(cells)
    trail = pixels(states.position[: i + 1] if i >= 0 else states.position)
    brush = ImageDraw.Draw(large)
    if len(trail) > 1:
        brush.line([tuple(p) for p in trail], fill=TRAIL, width=4)
    (x, y), (vx, vy) = trail[-1], states.velocity[i]
    forward = np.array([vx, -vy]) / max(float(np.hypot(vx, vy)), 1e-6)
    side = np.array([-forward[1], forward[0]])
    corners = [trail[-1] + 9 * forward, trail[-1] - 6 * forward + 5 * side]
    corners.append(trail[-1] - 6 * forward - 5 * side)
    brush.polygon([tuple(c) for c in corners], fill=CAR)

    near = large.crop((int(x) - REACH, int(y) - REACH, int(x) + REACH, int(y) + REACH))
    brush.ellipse((x - 12, y - 12, x + 12, y + 12), fill=CAR)
    picture = large.resize((SIZE, SIZE), Image.Resampling.BOX)
    corner = (SIZE - INSET) // 2
    picture.paste(near.resize((INSET, INSET), Image.Resampling.BILINEAR), (corner, corner))
    brush = ImageDraw.Draw(picture)
    brush.rectangle((corner, corner, corner + INSET, corner + INSET), outline=INK)
    lap = 100 * float(np.clip(-states.angle[i] / (2 * np.pi), 0, 1))
    text = f"step {int(states.time[i])}   speed {np.hypot(vx, vy):.2f}   lap {lap:.0f} %"
    if i == -1:
        text += f"   {how_it_ended(states)}"
    brush.text((corner, corner - 18), text, fill=INK)
    return picture.quantize(32, dither=Image.Dither.NONE)
