"""Pictures of MicroRacer: the whole track, the car's surroundings in the middle, the lidar's rays.

What is drawn as road are the cells of the bitmap that the car is judged by, nothing smoother.
"""

import colorsys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .._lidar import CELLS_PER_UNIT, NUM_RAYS, RASTER, RAY_SPACING, reading, unpack_cells
from .._tracks import ROAD_WIDTH, TrackBank
from ..micro_racer import Ending, EnvParams, EnvState, MicroRacer

GRASS, ROAD, KERB = (196, 213, 176), (66, 70, 79), (236, 236, 230)
OBSTACLE, TRAIL, CAR, INK = (222, 98, 48), (250, 205, 84), (208, 32, 44), (38, 44, 40)
NEAR, FAR = np.array([240, 84, 60]), np.array([84, 220, 150])  # rays, by their reading
FAR_READING = 0.3
RACE_COLOURS = (  # of the cars of a race, told apart on road and grass; more are mixed from hues
    (214, 39, 40),
    (31, 119, 230),
    (255, 170, 20),
    (148, 60, 200),
    (0, 170, 170),
    (240, 110, 190),
    (140, 86, 75),
    (20, 20, 20),
)
LENS_REACH = 0.14  # length units from the middle of the lens to its rim
LENS_RADIUS = 0.50  # of the lens on the map, length units: fits into the ring, whose hole has 0.58
SHARPNESS = 2  # drawn this many times larger, then reduced: smooth edges


def render(state: EnvState, params: EnvParams, *, size: int = 720) -> np.ndarray:
    """Draw one state (no leading axes): RGB frame (size, size, 3) uint8, y upward, 0.1 s.

    For many states of one episode use `render_episode`, which draws the track once.

    Raises:
        ValueError: if size is less than 64 pixels.
    """
    return TrackPicture(params.tracks, int(state.track), size).frame(jax.device_get(state))


def render_episode(
    states: EnvState, params: EnvParams, *, size: int = 480, every: int = 4
) -> list[np.ndarray]:
    """Frames (size, size, 3) of an episode: every fourth of its states (T, ...), and the last."""
    states = jax.device_get(states)
    num_states = len(states.time)
    picture = TrackPicture(params.tracks, int(states.track[0]), size)
    frames = []
    for i in sorted({*range(0, num_states, every), num_states - 1}):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        frames.append(picture.frame(state, trail=np.asarray(states.position[: i + 1])))
    return frames


def render_race(
    states: EnvState, names: Sequence[str], params: EnvParams, *, size: int = 720, every: int = 4
) -> list[np.ndarray]:
    """Frames (size, size, 3) of a race: every fourth step of all cars, and the last one.

    Args:
        states: leaves (T, D, ...) of D cars on one track from the same start; a car that has ended
            keeps its last state.
        names: D names for the board inside the ring.
        params: what the cars were driven with.
        size: of a frame in pixels; names are hard to read below 480.
        every: steps between two frames.

    Raises:
        ValueError: there are no cars, not one name a car, or they are on different tracks.
    """
    states = jax.device_get(states)
    num_states, num_cars = states.time.shape
    if not num_cars or len(names) != num_cars:
        raise ValueError(f"names = {list(names)!r} must be one for each of {num_cars} cars")
    if (states.track != states.track[0, 0]).any():
        raise ValueError("states: all cars of a race must be on the same track")
    picture = TrackPicture(params.tracks, int(states.track[0, 0]), size)
    limit = int(params.max_steps_in_episode)
    frames = []
    for i in sorted({*range(0, num_states, every), num_states - 1}):
        cars = [jax.tree.map(lambda leaf, i=i, d=d: leaf[i, d], states) for d in range(num_cars)]
        trails = [np.asarray(states.position[: i + 1, d]) for d in range(num_cars)]
        frames.append(picture.race_frame(cars, names, trails, limit))
    return frames


def race_colours(num_cars: int) -> list[tuple[int, int, int]]:
    """A colour for each car: the named ones, or evenly spaced hues where those do not suffice."""
    if num_cars <= len(RACE_COLOURS):
        return list(RACE_COLOURS[:num_cars])
    hues = (i / num_cars for i in range(num_cars))
    lightness = (0.42, 0.58)  # neighbours in hue differ in this as well
    mixed = [colorsys.hls_to_rgb(hue, lightness[i % 2], 0.85) for i, hue in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in mixed]


def race_order(cars: Sequence[EnvState], max_steps: int) -> list[int]:
    """Cars (single states) from the first to the last: finished by steps, running by way, ended."""

    def rank(d: int) -> tuple[int, float]:
        ending, time = int(cars[d].ending), int(cars[d].time)
        if ending == Ending.COMPLETED:
            return 0, time
        return int(ending != Ending.NONE or time >= max_steps) + 1, float(cars[d].angle)

    return sorted(range(len(cars)), key=rank)


def drive(
    env: MicroRacer, params: EnvParams, act: Callable[[jax.Array], jax.Array], key: jax.Array
) -> EnvState:
    """States (T + 1, ...) of an episode driven by `act(obs) -> action`, both ends included."""

    def step(carry, _):
        obs, state = carry
        obs, state, *_ = env.step_env(key, state, act(obs), params)  # no reset: the end is wanted
        return (obs, state), state

    @jax.jit
    def episode(key):
        obs, first = env.reset_env(key, params)
        _, rest = jax.lax.scan(step, (obs, first), length=int(params.max_steps_in_episode))
        return jax.tree.map(lambda a, b: jax.numpy.concatenate([a[None], b]), first, rest)

    states = jax.device_get(episode(key))
    ended = states.ending != Ending.NONE
    num_states = int(ended.argmax()) + 1 if ended.any() else len(ended)
    return jax.tree.map(lambda leaf: leaf[:num_states], states)


def save_animation(frames: Sequence[np.ndarray], path: Path | str, *, fps: int = 25) -> None:
    """Write frames (H, W, 3) uint8 as .gif, or as .mp4 where imageio has ffmpeg; rests on the last
    one.

    Raises:
        ValueError: if the name ends otherwise, or there are no frames.
    """
    path = Path(path)
    if not len(frames):
        raise ValueError("there are no frames to save")
    frames = [*frames, *[frames[-1]] * fps]
    if path.suffix == ".gif":
        # one palette for all, so that nothing flickers, of frames that show all there is
        some = np.concatenate([frames[i] for i in np.linspace(0, len(frames) - 1, 8).astype(int)])
        palette = Image.fromarray(some).quantize(128)
        images = [
            Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames
        ]
        duration = max(round(1000 / fps), 20)  # [ms]; viewers slow down shorter ones
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    elif path.suffix == ".mp4":
        import imageio.v3

        imageio.v3.imwrite(path, np.stack(frames), fps=fps)
    else:
        raise ValueError(f"{path.name} must end in .gif or .mp4")


class TrackPicture:
    """The picture of one track of a bank, onto which cars are drawn."""

    def __init__(self, tracks: TrackBank, index: int, size: int):
        if size < 64:
            raise ValueError(f"size = {size} must be at least 64 pixels")
        self.size = size
        self._side = size * SHARPNESS
        road = np.asarray(unpack_cells(tracks.road[index]))
        inner, outer, start = (
            np.asarray(a[index]) for a in (tracks.inner, tracks.outer, tracks.start)
        )
        self._cells = Image.fromarray(_paint(road, inner, outer, start))
        self._reach = 1.04 * float(np.abs(outer).max())  # half the side of the map, length units
        self._map = self._view((0.0, 0.0), self._reach, self._side, Image.Resampling.BOX)
        self._lens_side = 2 * int(self._side * LENS_RADIUS / self._reach / 2)

    def frame(self, state: EnvState, trail: np.ndarray | None = None) -> np.ndarray:
        """Draw a state, after the positions (T, 2) driven so far: (size, size, 3) uint8."""
        picture = self._map.copy()
        brush = ImageDraw.Draw(picture)
        unit = self._side / 720  # line widths are given for 720 pixels

        if trail is not None and len(trail) > 1:
            points = self._pixels(trail, (0.0, 0.0), self._reach, self._side)
            brush.line([tuple(p) for p in points], fill=TRAIL, width=max(round(2.5 * unit), 1))
        self._draw_rays(brush, state, (0.0, 0.0), self._reach, self._side, width=1.0 * unit)
        self._draw_car(brush, state, (0.0, 0.0), self._reach, self._side, length=13 * unit)

        lens = self._view(state.position, LENS_REACH, self._lens_side, Image.Resampling.NEAREST)
        glass = ImageDraw.Draw(lens)
        where = (state.position, LENS_REACH, self._lens_side)
        if trail is not None and len(trail) > 1:
            points = self._pixels(trail[-100:], *where)
            glass.line([tuple(p) for p in points], fill=TRAIL, width=max(round(3 * unit), 1))
        self._draw_rays(glass, state, *where, width=2.0 * unit)
        self._draw_car(glass, state, *where, length=24 * unit)
        mask = Image.new("L", lens.size, 0)
        ImageDraw.Draw(mask).ellipse((0, 0, lens.width - 1, lens.height - 1), fill=255)
        corner = (self._side - self._lens_side) // 2
        picture.paste(lens, (corner, corner), mask)
        rim = (corner, corner, corner + self._lens_side, corner + self._lens_side)
        brush.ellipse(rim, outline=INK, width=max(round(2.5 * unit), 1))

        self._write(brush, state, unit)
        small = picture.resize((self.size, self.size), Image.Resampling.BOX)
        return np.asarray(small)

    def race_frame(
        self,
        cars: Sequence[EnvState],
        names: Sequence[str],
        trails: Sequence[np.ndarray],
        max_steps: int,
    ) -> np.ndarray:
        """Draw several cars after their positions (T, 2) so far, and the board: (size, size, 3)."""
        picture = self._map.copy()
        brush = ImageDraw.Draw(picture)
        unit = self._side / 720
        where = ((0.0, 0.0), self._reach, self._side)
        colours = race_colours(len(cars))
        order = race_order(cars, max_steps)
        for d in order:  # the last car above the others, as the leader has the road for itself
            if len(trails[d]) > 1:
                points = [tuple(p) for p in self._pixels(trails[d], *where)]
                brush.line(points, fill=colours[d], width=max(round(1.2 * unit), 1))
        for d in order:
            if int(cars[d].ending) > Ending.COMPLETED:
                x, y = self._pixels(cars[d].position, *where)
                arm, width = 6 * unit, max(round(3 * unit), 1)
                brush.line((x - arm, y - arm, x + arm, y + arm), fill=colours[d], width=width)
                brush.line((x - arm, y + arm, x + arm, y - arm), fill=colours[d], width=width)
            else:
                self._draw_car(brush, cars[d], *where, length=18 * unit, colour=colours[d])
        self._write_board(brush, cars, names, order, colours, max_steps)
        return np.asarray(picture.resize((self.size, self.size), Image.Resampling.BOX))

    def pixel(self, position: np.ndarray) -> tuple[int, int]:
        """Row and column of a position on the map of a frame."""
        x, y = self._pixels(np.asarray(position), (0.0, 0.0), self._reach, self.size)
        return int(y), int(x)

    def _view(self, middle, reach, side, resample):
        """The cells within `reach` of `middle` as a square picture of `side` pixels."""
        x, y = np.asarray(middle, float) * CELLS_PER_UNIT + RASTER / 2
        y, reach = RASTER - y, reach * CELLS_PER_UNIT
        left, top = int(np.floor(x - reach)), int(np.floor(y - reach))
        extent = int(np.ceil(2 * reach)) + 1
        around = Image.new("RGB", (extent, extent), GRASS)
        around.paste(self._cells, (-left, -top))
        x, y = float(x - left), float(y - top)
        return around.resize((side, side), resample, (x - reach, y - reach, x + reach, y + reach))

    @staticmethod
    def _pixels(points, middle, reach, side):
        """Points (..., 2) -> pixels (..., 2) [column, row] of a view, y upward."""
        away = (np.asarray(points, float) - np.asarray(middle, float)) / reach
        return (away * (1, -1) + 1) * side / 2

    def _draw_car(self, brush, state, middle, reach, side, length, colour=CAR):
        forward = _heading(state) * (1, -1) * length
        left = np.array([forward[1], -forward[0]]) * 0.45
        nose = self._pixels(state.position, middle, reach, side)  # the point that is judged
        corners = [nose, nose - forward + left, nose - 0.75 * forward, nose - forward - left]
        brush.polygon([tuple(c) for c in corners], fill=colour, outline=KERB)

    def _draw_rays(self, brush, state, middle, reach, side, width):
        if int(state.ending) > Ending.COMPLETED:
            return  # the scan is older than the step
        readings = np.asarray(reading(jax.numpy.asarray(state.counts)))
        x, y = _heading(state)
        angles = np.arctan2(y, x) + (np.arange(NUM_RAYS) - NUM_RAYS // 2) * RAY_SPACING
        ends = state.position + readings[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        start = tuple(self._pixels(state.position, middle, reach, side))
        for end, length in zip(self._pixels(ends, middle, reach, side), readings, strict=True):
            share = min(length / FAR_READING, 1.0)
            colour = tuple(int(c) for c in (1 - share) * NEAR + share * FAR)
            brush.line([start, tuple(end)], fill=colour, width=max(round(width), 1))

    def _write_board(self, brush, cars, names, order, colours, max_steps):
        """Places, names and how far each car is, inside the ring."""
        half_width = 0.46 / self._reach * self._side / 2  # with half_height inside the hole's 0.58
        half_height = 0.33 / self._reach * self._side / 2
        row = min(2 * half_height / (len(cars) + 1), 0.1 * self._side / self._reach)
        middle = self._side / 2
        left, right = middle - half_width, middle + half_width
        font = _font(max(round(0.62 * row), 6))
        y = middle - row * (len(cars) + 1) / 2 + row / 2
        step = max(int(car.time) for car in cars)
        brush.text((middle, y), f"step {step}", fill=INK, font=font, anchor="mm")
        finished = [int(c.time) for c in cars if int(c.ending) == Ending.COMPLETED]
        for d in order:
            y += row
            box = (left, y - 0.25 * row, left + 0.5 * row, y + 0.25 * row)
            brush.rectangle(box, fill=colours[d])
            state = _race_state(cars[d], finished, max_steps)
            brush.text((right, y), state, fill=INK, font=font, anchor="rm")
            room = right - left - 0.9 * row - brush.textlength(state, font=font)
            name = _shorten(str(names[d]), room, lambda text: brush.textlength(text, font=font))
            brush.text((left + 0.7 * row, y), name, fill=INK, font=font, anchor="lm")

    def _write(self, brush, state, unit):
        large, small = _font(round(21 * unit)), _font(round(14 * unit))
        speed = float(np.hypot(*state.velocity))
        lap = float(np.clip(-state.angle / (2 * np.pi), 0, 1))
        ending = Ending(int(state.ending))
        edge, far = 16 * unit, self._side - 16 * unit

        def label(x, y, anchor, name, value, colour=INK):
            brush.text((x, y), name, fill=INK, font=small, anchor=anchor)
            brush.text((x, y + 18 * unit), value, fill=colour, font=large, anchor=anchor)

        label(edge, edge, "la", "step", f"{int(state.time)}")
        label(far, edge, "ra", "speed", f"{speed:.2f}")
        bottom = far - 40 * unit
        label(edge, bottom, "la", "lap", f"{100 * lap:.0f} %")
        if ending != Ending.NONE:
            colour = (24, 110, 60) if ending == Ending.COMPLETED else CAR
            label(far, bottom, "ra", "ended", ending.name.lower().replace("_", " "), colour)


def _paint(road, inner, outer, start):
    """Colours (1300, 1300, 3) of the cells, as a picture: row 0 is the largest y."""
    ring = Image.new("1", (RASTER, RASTER))
    brush = ImageDraw.Draw(ring)
    for border, is_in in ((outer, 1), (inner, 0)):
        cells = border * CELLS_PER_UNIT + RASTER / 2
        brush.polygon([tuple(c) for c in cells], fill=is_in)
    surrounded = _erode(road)
    blocked = np.asarray(ring).T & ~road  # x first, as the raster
    blocked &= ~_erode(~_erode(blocked))  # without the slivers along the borders
    colours = np.empty((RASTER, RASTER, 3), np.uint8)
    colours[:] = GRASS
    colours[road] = ROAD
    colours[road & ~surrounded] = KERB
    colours[blocked] = OBSTACLE
    # a chequered line of 6 cells where the lap begins and ends
    x, y = (np.arange(RASTER) - RASTER / 2 + 0.5)[:, None], (np.arange(RASTER) - RASTER / 2 + 0.5)
    across = np.abs(x / CELLS_PER_UNIT - start[0]) < ROAD_WIDTH
    line = road & surrounded & across & (np.abs(y - start[1] * CELLS_PER_UNIT) < 3)[None, :]
    white = (np.floor(x / 3) + np.floor(y / 3)[None, :]) % 2 == 0
    colours[line] = np.where(white[..., None], 250, 20)[line]
    return np.ascontiguousarray(colours.transpose(1, 0, 2)[::-1])


def _race_state(car, finished, max_steps):
    """What the board says of a car: its place and steps, how it ended, or its share of the lap."""
    ending, time = Ending(int(car.ending)), int(car.time)
    if ending == Ending.COMPLETED:
        return f"{1 + sum(other < time for other in finished)}. in {time}"
    if ending != Ending.NONE:
        return ending.name.lower().replace("_", " ")
    if time >= max_steps:
        return "time limit"
    return f"{100 * float(np.clip(-car.angle / (2 * np.pi), 0, 1)):.0f} %"


def _shorten(text, room, length):
    """The text, or its beginning and an ellipsis where it is longer than there is room."""
    if length(text) <= room:
        return text
    while text and length(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _erode(cells):
    """Cells whose four edge neighbours and itself are set."""
    wide = np.pad(cells, 1)
    return cells & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def _heading(state):
    speed = float(np.hypot(*state.velocity))
    return np.asarray(state.velocity, float) / speed if speed > 0 else np.array([1.0, 0.0])


@cache
def _font(size):
    return ImageFont.load_default(size)
