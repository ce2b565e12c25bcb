"""Pictures of the Mars rover: its states as a strip, what each pays, values and a policy."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..mars_rover import LEFT, RIGHT, EnvParams, EnvState, MarsRover

SKY, GROUND, DUST = (250, 226, 200), (204, 120, 80), (176, 94, 60)
INK, LABEL, PAPER, ROW = (58, 36, 28), (140, 98, 76), (255, 252, 247), (246, 238, 228)
LOW, HIGH = np.array([250, 241, 228]), np.array([243, 166, 72])  # by the value of a state
BODY, PANEL, WHEEL, ARROW, FLAG = (208, 214, 222), (40, 80, 150), (46, 44, 48), (24, 92, 140), INK
SHARPNESS = 3  # drawn this many times larger, then reduced: smooth edges
MIN_CELL = 40  # [pixels] narrower states cannot be read
INFO_ROW = 0.42  # height of a row of numbers or arrows, in widths of a state
MARGIN = 0.62  # width of the column with the names of the rows, likewise


def render(
    state: EnvState,
    params: EnvParams,
    *,
    terminal: Sequence[int] = (),
    values: Any = None,
    policy: Any = None,
    size: int = 720,
) -> np.ndarray:
    """Draw one state (no leading axes): RGB frame (H, size, 3) uint8, 10 ms.

    Args:
        state, params: of the environment. terminal: indices of the terminal states, drawn with a
            flag and without an arrow.
        values: (length,) to write into the states and to colour them by; None: no such row.
        policy: (length,) actions, or (length, 2) probabilities of left and right, drawn as arrows,
            both where both have some (a tie); None: no such row.
        size: width of the frame in pixels; at least 40 a state, and one for the margin.

    Raises:
        ValueError: size is too small, or values or policy have another shape.
    """
    rewards = np.asarray(params.rewards, float)
    length = len(rewards)
    if size < MIN_CELL * (length + 1):
        raise ValueError(
            f"size = {size} must be at least {MIN_CELL * (length + 1)} pixels for {length} states"
        )
    if values is not None and np.shape(values) != (length,):
        raise ValueError(f"values of shape {np.shape(values)} must have shape ({length},)")
    if policy is not None and np.shape(policy) not in ((length,), (length, 2)):
        raise ValueError(
            f"policy of shape {np.shape(policy)} must have shape ({length},) or ({length}, 2)"
        )
    strip = _Strip(size, length)
    strip.scene(terminal)
    strip.rover(int(state.position))
    strip.numbers("reward", rewards, None)
    if values is not None:
        strip.numbers("value", np.asarray(values, float), _colours(np.asarray(values, float)))
    if policy is not None:
        strip.arrows("policy", _directions(np.asarray(policy)), terminal)
    return strip.frame()


def render_episode(
    states: EnvState,
    params: EnvParams,
    *,
    terminal: Sequence[int] = (),
    values: Any = None,
    policy: Any = None,
    size: int = 720,
) -> list[np.ndarray]:
    """Frames of an episode, one for each of its states (T, ...)."""
    states = jax.device_get(states)
    return [
        render(
            jax.tree.map(lambda leaf, i=i: leaf[i], states),
            params,
            terminal=terminal,
            values=values,
            policy=policy,
            size=size,
        )
        for i in range(len(states.time))
    ]


def drive(
    env: MarsRover, params: EnvParams, act: Callable[[jax.Array], jax.Array], key: jax.Array
) -> EnvState:
    """States (T + 1, ...) of an episode driven by `act(obs) -> action`, both ends included."""

    def step(carry, key):
        obs, state = carry
        obs, state, *_ = env.step_env(key, state, act(obs), params)  # no reset: the end is wanted
        return (obs, state), state

    @jax.jit
    def episode(key):
        key_reset, key_steps = jax.random.split(key)
        obs, first = env.reset_env(key_reset, params)
        keys = jax.random.split(key_steps, int(params.max_steps_in_episode))
        _, rest = jax.lax.scan(step, (obs, first), keys)
        return jax.tree.map(lambda a, b: jax.numpy.concatenate([a[None], b]), first, rest)

    states = jax.device_get(episode(key))
    num_states = int(states.ended.argmax()) + 1 if states.ended.any() else len(states.ended)
    return jax.tree.map(lambda leaf: leaf[:num_states], states)


def cell(size: int, length: int, index: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of the square in which a state's rover is drawn."""
    left, width = (round(x / SHARPNESS) for x in _geometry(size, length, index))
    return left, 0, left + width, width


class _Strip:
    """A picture that grows downward, row by row; all lengths in its own, finer pixels."""

    def __init__(self, size: int, length: int):
        self._size, self._length = size, length
        _, self._cell = _geometry(size, length, 0)
        tall = round(self._cell * (1 + 3 * INFO_ROW)) + 1
        self._picture = Image.new("RGB", (size * SHARPNESS, tall), PAPER)
        self._brush = ImageDraw.Draw(self._picture)
        self._bottom = 0.0

    def _left(self, index: int) -> float:
        return _geometry(self._size, self._length, index)[0]

    def scene(self, terminal: Sequence[int]) -> None:
        """Sky, ground, flags and the indices."""
        brush, c = self._brush, self._cell
        x0, x1 = self._left(0), self._left(self._length)
        brush.rectangle((x0, 0, x1, 0.76 * c), fill=SKY)
        brush.rectangle((x0, 0.76 * c, x1, c), fill=GROUND)
        for i in range(self._length):
            x = self._left(i)
            for j, (dx, dy, r) in enumerate(
                ((0.24, 0.93, 0.05), (0.56, 0.87, 0.03), (0.78, 0.95, 0.04))
            ):
                wiggle = 0.07 * ((3 * i + j) % 4 - 1.5) * c  # craters that do not repeat
                middle = (x + dx * c + wiggle, dy * c)
                box = (middle[0] - 2 * r * c, middle[1] - r * c / 2)
                brush.ellipse((*box, box[0] + 4 * r * c, box[1] + r * c), fill=DUST)
            if i:
                brush.line((x, 0, x, c), fill=PAPER, width=max(round(0.015 * c), 1))
            brush.text((x + 0.06 * c, 0.05 * c), str(i), LABEL, _font(0.13 * c), anchor="la")
            if i in terminal:
                pole = x + 0.88 * c
                brush.line((pole, 0.16 * c, pole, 0.8 * c), fill=FLAG, width=round(0.025 * c))
                brush.polygon(
                    [(pole, 0.16 * c), (pole - 0.22 * c, 0.24 * c), (pole, 0.32 * c)], fill=FLAG
                )
        self._bottom = c

    def rover(self, index: int) -> None:
        """Body, panel, mast and wheels, on the ground of a state."""
        brush, c = self._brush, self._cell
        x, y = self._left(index) + 0.44 * c, 0.82 * c  # where the middle wheel touches the ground

        def box(x0, y0, x1, y1, fill):
            brush.rounded_rectangle(
                (x + x0 * c, y + y0 * c, x + x1 * c, y + y1 * c), radius=0.02 * c, fill=fill
            )

        box(0.08, -0.50, 0.115, -0.28, WHEEL)  # mast and camera
        box(0.03, -0.56, 0.17, -0.48, BODY)
        brush.ellipse((x + 0.11 * c, y - 0.545 * c, x + 0.16 * c, y - 0.495 * c), fill=WHEEL)
        box(-0.24, -0.29, 0.24, -0.13, BODY)
        box(-0.29, -0.335, 0.05, -0.285, PANEL)
        for dx in (-0.19, 0.0, 0.19):
            brush.ellipse((x + (dx - 0.075) * c, y - 0.15 * c, x + (dx + 0.075) * c, y), fill=WHEEL)
            brush.ellipse(
                (x + (dx - 0.03) * c, y - 0.105 * c, x + (dx + 0.03) * c, y - 0.045 * c), fill=BODY
            )

    def _row(self, name: str, colours: Sequence[tuple[int, int, int]]) -> float:
        """Draw the boxes of the next row and its name; return the middle of the row."""
        brush, c, top = self._brush, self._cell, self._bottom
        self._bottom = top + INFO_ROW * c
        for i, colour in enumerate(colours):
            box = (self._left(i), top, self._left(i + 1), self._bottom)
            brush.rectangle(box, fill=colour, outline=PAPER, width=max(round(0.015 * c), 1))
        middle = (top + self._bottom) / 2
        place = (self._left(0) - 0.08 * c, middle)
        brush.text(place, name, LABEL, _font(0.15 * c), anchor="rm")
        return middle

    def numbers(self, name: str, values: np.ndarray, colours: Any) -> None:
        """A row of numbers."""
        middle = self._row(name, colours or [ROW] * self._length)
        for i, value in enumerate(values):
            place = (self._left(i) + self._cell / 2, middle)
            text = _number(value)
            font = _font(min(0.22, 1.3 / max(len(text), 1)) * self._cell)
            self._brush.text(place, text, INK, font, anchor="mm")

    def arrows(self, name: str, directions: np.ndarray, terminal: Sequence[int]) -> None:
        """A row of arrows; directions (length, 2) bool."""
        middle = self._row(name, [ROW] * self._length)
        c = self._cell
        for i, (left, right) in enumerate(directions):
            if i in terminal:
                continue
            x = self._left(i) + c / 2
            back = 0.0 if left and right else 0.2  # one arrow has its tail, two share it
            for sign, shown in ((-1, left), (1, right)):
                if shown:
                    self._brush.line(
                        (x - sign * back * c, middle, x + sign * 0.2 * c, middle),
                        fill=ARROW,
                        width=round(0.05 * c),
                    )
                    tip = x + sign * 0.32 * c
                    wing = x + sign * 0.14 * c
                    self._brush.polygon(
                        [(tip, middle), (wing, middle - 0.11 * c), (wing, middle + 0.11 * c)],
                        fill=ARROW,
                    )

    def frame(self) -> np.ndarray:
        """(H, size, 3) uint8, as tall as its rows."""
        rows = round(self._bottom / SHARPNESS)
        whole = self._picture.crop((0, 0, self._picture.width, rows * SHARPNESS))
        return np.asarray(whole.resize((self._size, rows), Image.Resampling.BOX))


def _geometry(size: int, length: int, index: int) -> tuple[float, float]:
    """Left edge of a state and width of a state, in the fine pixels."""
    width = size * SHARPNESS / (length + MARGIN)
    return (MARGIN + index) * width, width


def _directions(policy: np.ndarray) -> np.ndarray:
    """(length, 2) bool: whether the rover may choose left, right."""
    if policy.ndim == 1:
        return policy[:, None] == np.array([LEFT, RIGHT])
    return policy > 0


def _colours(values: np.ndarray) -> list[tuple[int, int, int]]:
    """From pale (the lowest value) to strong (the highest)."""
    span = float(values.max() - values.min())
    share = (values - values.min()) / span if span > 0 else np.zeros(len(values))
    colours = LOW + share[:, None] * (HIGH - LOW)
    return [(int(r), int(g), int(b)) for r, g, b in colours]


def _number(value: float) -> str:
    """At most four digits: 100, 12.5, 0.025, 1e+05."""
    return f"{value:.4g}"


@cache
def _font(size: float) -> Any:
    return ImageFont.load_default(max(round(size), 6))
