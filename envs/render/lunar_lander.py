"""Pictures of LunarLander, in the colours of Gymnasium's: black sky, white moon, purple lander.

The flames show the throttles of the last step; Gymnasium has particles there.
"""

from collections.abc import Callable

import jax
import numpy as np
from PIL import Image, ImageDraw

from .._contacts import HULL_VERTICES, LEG_VERTICES
from .._lander_start import HEIGHT, WIDTH
from ..lunar_lander import HELIPAD_Y, SCALE, EnvParams, EnvState, LanderEnding, LunarLander
from .micro_racer import save_animation as save_animation

SKY, MOON = (0, 0, 0), (255, 255, 255)
BODY, OUTLINE = (128, 102, 230), (77, 77, 128)
POLE, FLAG = (255, 255, 255), (204, 204, 0)
FLAME, CORE = (255, 140, 40), (255, 225, 120)
SHARPNESS = 2  # drawn this many times larger, then reduced: smooth edges


def render(state: EnvState, params: EnvParams, *, width: int = 600) -> np.ndarray:
    """Draw one state (no leading axes): RGB frame (2/3 width, width, 3) uint8, y upward.

    Raises:
        ValueError: if the width is less than 60 pixels.
    """
    del params
    if width < 60:
        raise ValueError(f"width = {width} must be at least 60 pixels")
    state = jax.device_get(state)
    scale = width * SHARPNESS / WIDTH  # pixels per metre
    line = max(round(scale / SCALE), SHARPNESS)  # a pixel of Gymnasium's, at least one of ours
    size = (width * SHARPNESS, round(HEIGHT * scale))
    picture = Image.new("RGB", size, SKY)
    brush = ImageDraw.Draw(picture)

    def pixels(points):
        points = np.asarray(points, float)
        return [(x * scale, size[1] - y * scale) for x, y in points]

    ground = [(2.0 * i, float(y)) for i, y in enumerate(state.terrain)]
    brush.polygon(pixels([(0.0, -1.0), *ground, (WIDTH, -1.0)]), fill=MOON)
    for x in (0.4 * WIDTH, 0.6 * WIDTH):
        top = HELIPAD_Y + 50 / SCALE
        # one whole pixel of the finished frame: half in two it would be grey
        (left, above), (_, below) = pixels([(x, top), (x, HELIPAD_Y)])
        left = SHARPNESS * round(left / SHARPNESS)
        brush.rectangle((left, above, left + line - 1, below), fill=POLE)
        tip = (x + 25 / SCALE, top - 5 / SCALE)
        brush.polygon(pixels([(x, top), (x, top - 10 / SCALE), tip]), fill=FLAG)

    world = state.world
    for flame in _flames(state):
        brush.polygon(pixels(_place(flame, world.hull)), fill=FLAME)
        inner = 0.5 * (flame + flame[:2].mean(axis=0))
        brush.polygon(pixels(_place(inner, world.hull)), fill=CORE)
    parts = [(HULL_VERTICES, world.hull)]
    parts += [(LEG_VERTICES, jax.tree.map(lambda a, j=j: a[j], world.leg)) for j in (0, 1)]
    for vertices, pose in parts:
        corners = pixels(_place(vertices, pose))
        brush.polygon(corners, fill=BODY)
        brush.line([*corners, corners[0]], fill=OUTLINE, width=3 * line // 2)
    small = picture.resize((width, round(HEIGHT * width / WIDTH)), Image.Resampling.BOX)
    return np.asarray(small)


def pixel(x: float, y: float, *, width: int = 600) -> tuple[int, int]:
    """Row and column of a point [m] of the scene in a frame."""
    scale = width / WIDTH
    return round(HEIGHT * scale - y * scale), round(x * scale)


def render_episode(
    states: EnvState, params: EnvParams, *, width: int = 450, every: int = 2
) -> list[np.ndarray]:
    """Frames of an episode: every second of its states (T, ...), 25 a second, and the last."""
    states = jax.device_get(states)
    num_states = len(states.time)
    frames = []
    for i in sorted({*range(0, num_states, every), num_states - 1}):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        frames.append(render(state, params, width=width))
    return frames


def fly(
    env: LunarLander, params: EnvParams, act: Callable[[jax.Array], jax.Array], key: jax.Array
) -> EnvState:
    """States (T + 1, ...) of an episode flown by `act(obs) -> action`, both ends included."""

    def step(carry, key):
        obs, state = carry
        obs, state, _, _, info = env.step_env(key, state, act(obs), params)  # no reset
        return (obs, state), (state, info["ending"])

    @jax.jit
    def episode(key):
        key, key_reset = jax.random.split(key)
        obs, first = env.reset_env(key_reset, params)
        keys = jax.random.split(key, int(params.max_steps_in_episode))
        _, (rest, ending) = jax.lax.scan(step, (obs, first), keys)
        states = jax.tree.map(lambda a, b: jax.numpy.concatenate([a[None], b]), first, rest)
        return states, ending

    states, ending = jax.device_get(episode(key))
    ended = ending != LanderEnding.NONE
    num_states = int(ended.argmax()) + 2 if ended.any() else len(ended) + 1
    return jax.tree.map(lambda leaf: leaf[:num_states], states)


def _place(points, pose):
    """Points (n, 2) of a body in the scene [m]."""
    sin, cos = np.sin(pose.a), np.cos(pose.a)
    x, y = np.asarray(points, float).T
    return np.stack([cos * x - sin * y + pose.x, sin * x + cos * y + pose.y], axis=1)


def _flames(state):
    """Triangles (3, 2) in the hull's frame, the two first points at the nozzle."""
    main, side = float(state.throttle[0]), float(state.throttle[1])
    bottom = float(HULL_VERTICES[0, 1])
    flames = []
    if main > 0:
        flames.append([(-0.2, bottom), (0.2, bottom), (0.0, bottom - 1.1 * main)])
    if side:  # the engine on the other side pushes this way
        x = -np.sign(side) * 0.55
        y = 14 / SCALE - 0.1
        flames.append([(x, y + 0.1), (x, y - 0.1), (x - np.sign(side) * 0.6 * abs(side), y)])
    return [np.array(flame) for flame in flames]
