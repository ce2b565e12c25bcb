"""The track law of MicroRacer: random numbers -> midline -> borders -> raster -> obstacles ->
packed bits.

Source: github.com/asperti/MicroRacer, `tracks.py` (MIT); paper: Asperti & Del Brutto (2022), arXiv
2203.10494. Lengths are in the original's units (nominal road width 0.04), angles in radians,
counter-clockwise; the car drives clockwise. Everything has a fixed shape and runs under `jit`:
there is no retry, because none of 30,000 tracks drawn with the original left its raster (cells
outside would simply be dropped).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ._lidar import CELLS_PER_UNIT, RASTER, clear_cells, pack_cells, scan

ROAD_WIDTH = 0.04
NUM_CURVES = 20  # uniforms drawn; 19 distinct knots
NUM_OBSTACLES = 6
_BORDER_POINTS = 120
_BORDER_LINES = 2000  # radial lines that fill the road
LINE_CELLS = 64  # longest such line; the longest of 20,000 tracks: see tests/envs/test_tracks.py
OBSTACLE_CELLS = 32  # longest obstacle line
_KNOT_GAP = 2 * np.pi / 19
_CHICANE_OFFSETS = np.array([-1 / 3, -1 / 25, 0, 1 / 25, 1 / 3]) * _KNOT_GAP
_CHICANE_SCALE = np.array([1, 1.02, 1, 0.98, 1])  # flag true; false: the reverse


def _find_too_small() -> np.ndarray:
    """[n, m, k]: 1 where trunc(m / n * k) in float64 is one less than the quotient, for m <= n."""
    n, m, k = np.ogrid[:LINE_CELLS, :LINE_CELLS, :LINE_CELLS]
    n = np.maximum(n, 1)
    return ((m * k) // n - np.trunc(m / n * k).astype(int)).astype(np.int8) * (m <= n)


_TOO_SMALL = _find_too_small()


@struct.dataclass
class Draws:
    """The random numbers behind one track, in the order in which the original draws them."""

    radius_u: jax.Array  # (20,) in [0, 1)
    chicane_knot: jax.Array  # () int32 in 1..17; ignored without chicanes
    chicane_flag: jax.Array  # () bool: first outward, then inward
    obstacle_u: jax.Array  # (8,) in [pi/8, pi/4); entries 1..6 are used; ignored without obstacles
    obstacle_side: jax.Array  # (6,) offset from the outer border, 0.034 or 0.006


@struct.dataclass
class Spline:
    """A closed C2 curve of cubic pieces; the last knot is the first one period later.

    Its parameter, an angle, is a sum of two floats: one near 2 pi is off by up to 2.4e-7, which
    moves points by a thousandth of a cell where the road is steep, and some cells with them.
    """

    knots: jax.Array  # (n,) increasing parameter
    knots_low: jax.Array  # (n,) to be added to it
    points: jax.Array  # (n, 2); the last equals the first
    slopes: jax.Array  # (n, 2) derivative by the parameter


@struct.dataclass
class Track:
    """One track, unpacked."""

    midline: Spline  # 20 or 24 knots, parameter = polar angle of the knots
    inner: Spline  # 120 knots, parameter = own polar angle
    outer: Spline  # 120 knots, parameter = own polar angle
    obstacles: jax.Array  # (6 or 0, 2, 2) segments: [[x, y] at theta, [x, y] at theta - pi/150]
    road: jax.Array  # (1300, 1300) bool, x first: drivable cells, obstacles removed


@struct.dataclass
class TrackBank:
    """Tracks that environments share: `params.tracks`. Leading axis T; 435 kB a track."""

    road: jax.Array  # (T, NUM_WORDS) uint32: drivable cells, packed
    clear: jax.Array  # (T, NUM_WORDS) uint32: cells that do not stop the lidar, packed
    start: jax.Array  # (T, 2) float32: midline(0) = (r_0, 0)
    heading: jax.Array  # (T, 2) float32: unit vector of travel at the start
    start_counts: jax.Array  # (T, 19) uint8: the lidar scan at the start
    length: jax.Array  # (T,) float32: of the midline, one lap
    midline: jax.Array  # (T, 120, 2) float32: points, for pictures
    inner: jax.Array  # (T, 120, 2) float32
    outer: jax.Array  # (T, 120, 2) float32
    obstacles: jax.Array  # (T, 6 or 0, 2, 2) float32: segments

    @property
    def num_tracks(self) -> int:
        """How many tracks there are to choose from."""
        return self.road.shape[-2]


def make_tracks(
    key: jax.Array, num_tracks: int, *, obstacles: bool = True, chicanes: bool = True
) -> TrackBank:
    """Generate a bank of random tracks, one after the other (bounded memory); one compile per
    `num_tracks`.

    Refresh a bank, or build one of unseen tracks: `params.replace(tracks=make_tracks(key, 512))`.

    Raises:
        ValueError: if num_tracks is not in 1..30000 (cell addresses are 32-bit).
    """
    if not 1 <= num_tracks <= 30_000:
        raise ValueError(f"num_tracks = {num_tracks} must lie in 1..30000")
    return _make_tracks(key, num_tracks, obstacles, chicanes)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _make_tracks(key: jax.Array, num_tracks: int, obstacles: bool, chicanes: bool) -> TrackBank:
    def one(key: jax.Array) -> TrackBank:
        draws = sample_draws(key)
        return pack_track(track_from_draws(draws, obstacles=obstacles, chicanes=chicanes))

    return jax.lax.map(one, jax.random.split(key, num_tracks))


def sample_draws(key: jax.Array) -> Draws:
    """Draw the random numbers of one track, distributed as in the original."""
    key_radius, key_knot, key_flag, key_window, key_side = jax.random.split(key, 5)
    window = jax.random.uniform(key_window, (8,), jnp.float32, np.pi / 8, np.pi / 4)
    is_far = jax.random.bernoulli(key_side, shape=(NUM_OBSTACLES,))
    return Draws(
        radius_u=jax.random.uniform(key_radius, (NUM_CURVES,), jnp.float32),
        chicane_knot=jax.random.randint(key_knot, (), 1, 18, jnp.int32),
        chicane_flag=jax.random.bernoulli(key_flag),
        obstacle_u=window,
        obstacle_side=jnp.where(is_far, 0.85 * ROAD_WIDTH, 0.15 * ROAD_WIDTH).astype(jnp.float32),
    )


def track_from_draws(draws: Draws, *, obstacles: bool = True, chicanes: bool = True) -> Track:
    """Build the track that the original builds from these random numbers."""
    midline = midline_from_draws(draws, chicanes=chicanes)
    inner, outer = borders(midline)
    road = draw_road(inner, outer)
    segments = jnp.zeros((0, 2, 2), jnp.float32)
    if obstacles:
        segments = obstacle_segments(outer, draws)
        road = remove_obstacles(road, segments)
    return Track(midline=midline, inner=inner, outer=outer, obstacles=segments, road=road)


def pack_track(track: Track) -> TrackBank:
    """One entry of a bank (no leading axis): packed bitmaps, start and the start's lidar scan."""
    clear = pack_cells(clear_cells(track.road))
    start = evaluate(track.midline, jnp.zeros((), jnp.float32))
    backward = evaluate_slope(track.midline, jnp.zeros((), jnp.float32))
    heading = -backward / jnp.linalg.norm(backward)  # clockwise
    fine = evaluate(track.midline, *_grid(2400))
    return TrackBank(
        road=pack_cells(track.road),
        clear=clear,
        start=start,
        heading=heading,
        start_counts=scan(clear[None], jnp.int32(0), start, heading),
        length=jnp.sum(jnp.linalg.norm(fine - jnp.roll(fine, 1, axis=0), axis=-1)),
        midline=evaluate(track.midline, *_grid(_BORDER_POINTS)),
        inner=track.inner.points,
        outer=track.outer.points,
        obstacles=track.obstacles,
    )


def smooth_radii(u: jax.Array) -> jax.Array:
    """One in-place sweep that pulls each of 20 numbers toward its neighbours; (20,) -> (20,).

    u_i <- clip(u_i, (s - 1)/2, (s + 1)/2) with s = u_{i-1} + u_{i+1}, circular, updated values used
    at once. One sweep limits the second difference, it does not guarantee it.
    """

    def pull(i: jax.Array, u: jax.Array) -> jax.Array:
        s = u[i - 1] + u[(i + 1) % NUM_CURVES]
        return u.at[i].set(jnp.clip(u[i], (s - 1) / 2, (s + 1) / 2))

    return jax.lax.fori_loop(0, NUM_CURVES, pull, u)


def midline_from_draws(draws: Draws, *, chicanes: bool = True) -> Spline:
    """The midline: a periodic spline through 20 knots, or 24 with a chicane."""
    radius = 0.7 + smooth_radii(draws.radius_u.astype(jnp.float32)) / 2
    radius = radius.at[-1].set(radius[0])  # the 20th was a neighbour in the sweep, nothing more
    angles, angles_low = _grid(NUM_CURVES - 1, end=True)
    units = _grid_units(NUM_CURVES - 1, end=True)
    points = radius[:, None] * units
    if not chicanes:
        return fit_spline(angles, points, angles_low)

    # Knot c becomes five, on the chord between its neighbours; the 2nd and 4th are pushed apart.
    c = draws.chicane_knot
    before, after = points[c - 1], points[c + 1]
    five, five_low = _two_sum(angles[c], jnp.asarray(_CHICANE_OFFSETS, jnp.float32))
    five_low = five_low + angles_low[c]
    rays = _rotate(units[c][None, :], np.cos(_CHICANE_OFFSETS), np.sin(_CHICANE_OFFSETS))
    along = _cross(before, after - before) / _cross(rays, (after - before)[None, :])
    scale = _CHICANE_SCALE.astype(np.float32)
    along = along * jnp.where(draws.chicane_flag, scale, scale[::-1])
    i = jnp.arange(NUM_CURVES + 4)
    old = jnp.where(i < c, i, jnp.maximum(i - 4, 0))
    new = jnp.clip(i - c, 0, 4)
    is_new = (i >= c) & (i <= c + 4)
    return fit_spline(
        jnp.where(is_new, five[new], angles[old]),
        jnp.where(is_new[:, None], (along[:, None] * rays)[new], points[old]),
        jnp.where(is_new, five_low[new], angles_low[old]),
    )


def borders(midline: Spline) -> tuple[Spline, Spline]:
    """The inner and the outer border: splines through 120 offset points, each in its own polar
    angle.

    120 whether or not there is a chicane: its sharpest part falls between the samples, and the road
    that is driven follows the samples, not the midline.
    """
    t = _grid(_BORDER_POINTS - 1, end=True)
    points, slopes = evaluate(midline, *t), evaluate_slope(midline, *t)
    normals = _normal(slopes)
    return (
        _polar_spline(points + ROAD_WIDTH / 2 * normals),
        _polar_spline(points - ROAD_WIDTH / 2 * normals),
    )


def draw_road(inner: Spline, outer: Spline) -> jax.Array:
    """Fill the road between the borders: 2000 radial lines of 3 x 3 stamps -> (1300, 1300) bool."""
    angles = _grid(_BORDER_LINES)
    starts, ends = cell(evaluate(inner, *angles)), cell(evaluate(outer, *angles))
    cells, is_used = jax.vmap(partial(line_cells, max_cells=LINE_CELLS))(starts, ends)
    cells = jnp.where(is_used[..., None], cells, RASTER).reshape(-1, 2)  # unused: dropped
    cells = jnp.where(jnp.any(cells < 0, axis=-1, keepdims=True), RASTER, cells)  # -1 would wrap
    road = jnp.zeros((RASTER, RASTER), bool).at[cells[:, 0], cells[:, 1]].set(True, mode="drop")
    wide = jnp.pad(road, ((1, 1), (0, 0)))
    road = wide[:-2] | wide[1:-1] | wide[2:]
    wide = jnp.pad(road, ((0, 0), (1, 1)))
    return wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]


def obstacle_segments(outer: Spline, draws: Draws) -> jax.Array:
    """Six segments (6, 2, 2), one in each window of the outer border's angle."""
    windows = np.arange(1, NUM_OBSTACLES + 1) * np.pi / 4
    windows = windows[:, None] - np.array([0.0, np.pi / 150])  # (6, 2)
    high, low = _split(windows)
    theta, rest = _two_sum(high, draws.obstacle_u[1:7].astype(jnp.float32)[:, None])
    theta = theta, rest + low
    offset = draws.obstacle_side.astype(jnp.float32)[:, None, None]
    return evaluate(outer, *theta) + offset * _normal(evaluate_slope(outer, *theta))


def remove_obstacles(road: jax.Array, segments: jax.Array) -> jax.Array:
    """Clear the squares [-5, +5) x [-5, +5) along each segment, from theta - pi/150 to theta."""
    ends = cell(segments)
    cells, is_used = jax.vmap(partial(line_cells, max_cells=OBSTACLE_CELLS))(ends[:, 1], ends[:, 0])
    brush = np.stack(np.meshgrid(np.arange(-5, 5), np.arange(-5, 5), indexing="ij"), axis=-1)
    cells = cells[:, :, None, None, :] + brush.astype(np.int32)[None, None]
    cells = jnp.where(is_used[:, :, None, None, None], cells, RASTER).reshape(-1, 2)
    cells = jnp.where(jnp.any(cells < 0, axis=-1, keepdims=True), RASTER, cells)
    return road.at[cells[:, 0], cells[:, 1]].set(False, mode="drop")


def cell(points: jax.Array) -> jax.Array:
    """Raster cell of points (..., 2), int32; truncated, so that cell 650 is twice as wide."""
    return (points * CELLS_PER_UNIT).astype(jnp.int32) + RASTER // 2


def line_cells(start: jax.Array, end: jax.Array, max_cells: int) -> tuple[jax.Array, jax.Array]:
    """Cells of a line, both ends included: start, end (2,) int32 -> cells (max_cells, 2), is_used
    (max_cells,).

    The longer axis (x on ties) advances by one, the other by the slope, truncated toward the start;
    a line of no length has no cells. Sums are in integers, but as the original multiplies a float64
    slope, whole numbers come out one too small now and then (15 / 22 * 22 = 14.999...): so here.
    """
    delta = end - start
    num_steps = jnp.max(jnp.abs(delta))
    k = jnp.arange(max_cells, dtype=jnp.int32)
    product = k[:, None] * jnp.abs(delta)[None, :]
    offsets = jax.lax.div(product, jnp.maximum(num_steps, 1))  # on the longer axis k exactly
    shorter = jnp.abs(delta)[None, :], k[:, None]
    offsets = offsets - jnp.asarray(_TOO_SMALL)[jnp.minimum(num_steps, LINE_CELLS - 1), *shorter]
    return start[None, :] + offsets * jnp.sign(delta)[None, :], (k <= num_steps) & (num_steps > 0)


def fit_spline(knots: jax.Array, points: jax.Array, knots_low: jax.Array | float = 0.0) -> Spline:
    """The closed C2 cubic spline through points (n, 2) at increasing knots + knots_low (n,).

    The last point is the first. The slopes d solve the cyclic system h_i d_{i-1} + 2 (h_{i-1} +
    h_i) d_i + h_{i-1} d_{i+1} = 3 (h_i m_{i-1} + h_{i-1} m_i), with h the intervals and m the
    chords' slopes.
    """
    n = knots.shape[0] - 1
    knots_low = jnp.broadcast_to(jnp.asarray(knots_low, knots.dtype), knots.shape)
    h = jnp.diff(knots) + jnp.diff(knots_low)
    m = (points[1:] - points[:-1]) / h[:, None]
    h_before, m_before = jnp.roll(h, 1), jnp.roll(m, 1, axis=0)
    eye = jnp.eye(n, dtype=knots.dtype)
    matrix = (
        h[:, None] * jnp.roll(eye, -1, axis=1)
        + 2 * (h_before + h)[:, None] * eye
        + h_before[:, None] * jnp.roll(eye, 1, axis=1)
    )
    slopes = jnp.linalg.solve(matrix, 3 * (h[:, None] * m_before + h_before[:, None] * m))
    slopes = jnp.concatenate([slopes, slopes[:1]])
    return Spline(knots=knots, knots_low=knots_low, points=points, slopes=slopes)


def evaluate(spline: Spline, t: jax.Array, t_low: jax.Array | float = 0.0) -> jax.Array:
    """Points (..., 2) of the curve at parameters t + t_low (...), wrapped into the period."""
    i, u, h = _locate(spline, t, t_low)
    p, q = spline.points[i], spline.points[i + 1]
    a, b = h * spline.slopes[i], h * spline.slopes[i + 1]
    # p plus a correction: keeps the rounding error at that of p
    return p + u * (a + u * (3 * (q - p) - 2 * a - b + u * (a + b - 2 * (q - p))))


def evaluate_slope(spline: Spline, t: jax.Array, t_low: jax.Array | float = 0.0) -> jax.Array:
    """Derivative by the parameter (..., 2) at t + t_low (...), wrapped into the period."""
    i, u, h = _locate(spline, t, t_low)
    chord = (spline.points[i + 1] - spline.points[i]) / h
    a, b = spline.slopes[i], spline.slopes[i + 1]
    return a + u * (6 * chord - 4 * a - 2 * b + u * (3 * (a + b) - 6 * chord))


def _locate(spline, t, t_low):
    """Piece (...), place within it in [0, 1] (..., 1) and its length (..., 1)."""
    knots, low = spline.knots, spline.knots_low
    period, period_low = _two_sum(knots[-1], -knots[0])
    period_low = period_low + low[-1] - low[0]
    num_turns = jnp.floor((t - knots[0]) / period)
    t, rest = _two_sum(t, -num_turns * period)  # exact for one turn, as needed here
    t_low = t_low + rest - num_turns * period_low
    i = jnp.searchsorted(knots, t, side="right", method="compare_all") - 1
    i = jnp.clip(i, 0, len(knots) - 2)
    h = (knots[i + 1] - knots[i]) + (low[i + 1] - low[i])
    u = ((t - knots[i]) + (t_low - low[i])) / h
    return i, u[..., None], h[..., None]


def _polar_spline(points: jax.Array) -> Spline:
    """A closed spline in the polar angle of its 120 points, which lie around the origin once.

    Measured from the angles 2 pi k / 119, from which they are never far. (The original unwraps the
    angles one after the other; the two differ for borders that fold back, never seen in 30,000.)
    """
    angles, angles_low = _grid(len(points) - 1, end=True)
    cos, sin = _grid_units(len(points) - 1, end=True).T
    turned = _rotate(points, cos, -sin)
    angles, rest = _two_sum(angles, jnp.arctan2(turned[:, 1], turned[:, 0]))
    # The last point is the first, one turn later: to the last bit.
    (period,), (period_low,) = _split(np.array([2 * np.pi]))
    last, last_rest = _two_sum(angles[0], period)
    low = rest + angles_low
    return fit_spline(
        angles.at[-1].set(last),
        points.at[-1].set(points[0]),
        low.at[-1].set(last_rest + low[0] + period_low),
    )


def _normal(slopes: jax.Array) -> jax.Array:
    """Unit vectors left of slopes (..., 2): toward the origin, as curves run counter-clockwise."""
    left = jnp.stack([-slopes[..., 1], slopes[..., 0]], axis=-1)
    return left / jnp.linalg.norm(left, axis=-1, keepdims=True)


def _split(x: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """A float64 constant as a sum of two float32."""
    high = x.astype(np.float32)
    return jnp.asarray(high), jnp.asarray((x - high).astype(np.float32))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b rounded, and what the rounding lost, exactly (Knuth, TAOCP 2, 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _grid(num: int, end: bool = False) -> tuple[jax.Array, jax.Array]:
    """`num` equal steps around the circle as sums of two floats; with `end` also 2 pi itself."""
    return _split(2 * np.pi * np.arange(num + end) / num)


def _grid_units(num: int, end: bool = False) -> jax.Array:
    """Unit vectors (num, 2) at the angles of `_grid`."""
    angles = 2 * np.pi * np.arange(num + end) / num
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1), jnp.float32)


def _rotate(points: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray):
    """Points (n, 2) turned left by angles given by cos, sin (n,)."""
    cos, sin = jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32)
    x, y = points[..., 0], points[..., 1]
    return jnp.stack([cos * x - sin * y, cos * y + sin * x], axis=-1)


def _cross(a: jax.Array, b: jax.Array) -> jax.Array:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
