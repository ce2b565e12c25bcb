"""The lidar of MicroRacer, and the packed bitmaps that it reads.

A track's raster is 1300 x 1300 cells of 0.002 length units. It is kept as one bit a cell, 32 cells (8 in x,
4 in y) to a uint32 word, with a margin of 6 cells of wall on each side. Six, because the longest stride of
the lidar is five cells: no ray can leave the bitmap without having read a wall.
"""

import jax
import jax.numpy as jnp
import numpy as np

NUM_RAYS = 19
RAY_SPACING = np.pi / 54  # [rad], 3.33 degrees
RASTER = 1300  # cells a side
CELLS_PER_UNIT = 500.0
MARGIN = 6  # cells of wall around the raster
_ORIGIN = 650 + MARGIN  # the cell of coordinate 0, the margin counted
_SIDE = RASTER + 2 * MARGIN
_ROWS, _COLS = _SIDE // 8, _SIDE // 4  # words in x and in y
NUM_WORDS = _ROWS * _COLS  # of one packed bitmap
MAX_COUNT = (
    255  # samples a ray; 2.49 units, more than the longest chord of the ring that holds every track
)

# The original's fan, bit for bit: ray 0 is the rightmost, both constants go through float32.
_FAN = float(np.float32(np.pi / 3))
_RAY_ANGLES = -_FAN / 2 + float(np.float32(_FAN / 18)) * np.arange(NUM_RAYS)
_RAY_COS = np.cos(_RAY_ANGLES).astype(np.float32)
_RAY_SIN = np.sin(_RAY_ANGLES).astype(np.float32)


def pack_cells(cells: jax.Array) -> jax.Array:
    """Pack a raster (1300, 1300) bool, x first, into words (NUM_WORDS,) uint32; the margin reads False."""
    cells = jnp.pad(cells, MARGIN).reshape(_ROWS, 8, _COLS, 4)
    bits = cells.transpose(0, 2, 1, 3).reshape(NUM_WORDS, 32).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32)[None, :], axis=-1, dtype=jnp.uint32)


def unpack_cells(words: jax.Array) -> jax.Array:
    """The inverse of `pack_cells`: words (NUM_WORDS,) uint32 -> raster (1300, 1300) bool."""
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None, :]) & jnp.uint32(1)
    cells = bits.astype(bool).reshape(_ROWS, _COLS, 8, 4).transpose(0, 2, 1, 3)
    return cells.reshape(_SIDE, _SIDE)[MARGIN:-MARGIN, MARGIN:-MARGIN]


def clear_cells(road: jax.Array) -> jax.Array:
    """Cells whose four edge neighbours are all road, (1300, 1300) bool: where the lidar does not stop.

    The cell itself need not be road (a pinhole would not stop a ray): so is the original's test. Outside the
    raster there is no road.
    """
    wide = jnp.pad(road, 1)
    return wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def is_on_road(words: jax.Array, track: jax.Array, position: jax.Array) -> jax.Array:
    """Whether the cell under a point is set. words (T, NUM_WORDS) uint32, track () int32, position (2,) -> () bool.

    A point outside the raster is not on the road (the original wraps around or raises IndexError there).
    """
    cells = jnp.clip(position * CELLS_PER_UNIT, -_ORIGIN, _SIDE - 1 - _ORIGIN)
    return _read(words.reshape(-1), track * NUM_WORDS, cells[0], cells[1]).astype(bool)


def scan(
    words: jax.Array, track: jax.Array, position: jax.Array, direction: jax.Array
) -> jax.Array:
    """Count, for each of 19 rays, the samples before the first blocked one.

    words (T, NUM_WORDS) uint32 of clear cells, track () int32, position (2,), direction (2,) unit vector of
    travel -> (19,) uint8. Ray 0 is the rightmost (30 degrees clockwise). Sample k lies at `reading(k)`.
    """
    flat, base = words.reshape(-1), track * NUM_WORDS
    x, y = position[0] * CELLS_PER_UNIT, position[1] * CELLS_PER_UNIT
    cos = direction[0] * _RAY_COS - direction[1] * _RAY_SIN  # (19,)
    sin = direction[1] * _RAY_COS + direction[0] * _RAY_SIN

    def march(carry):
        num_done, is_open, count = carry
        for k in range(1, _CHUNK + 1):
            cells = _sample_cells(num_done + k)
            is_open = is_open & _read(flat, base, x + cells * cos, y + cells * sin)
            count = count + is_open
        return num_done + _CHUNK, is_open, count

    def is_running(carry):
        num_done, is_open, _ = carry
        return jnp.any(is_open > 0) & (num_done + _CHUNK <= MAX_COUNT)

    start = (jnp.int32(0), jnp.ones(NUM_RAYS, jnp.uint32), jnp.zeros(NUM_RAYS, jnp.uint32))
    _, _, count = jax.lax.while_loop(is_running, march, start)
    return count.astype(jnp.uint8)


def reading(count: jax.Array) -> jax.Array:
    """Distance of sample `count` in length units: ten strides of 1/250, then strides of 1/100."""
    return 0.002 * _sample_cells(
        count.astype(jnp.int32)
    )  # one rounding: equal inside and outside jit


_CHUNK = 15  # samples between two looks at whether any ray is still open


def _sample_cells(k: jax.Array) -> jax.Array:
    """`reading(k)` in cells, exactly: 2 k up to 20, then 5 a stride."""
    return jnp.where(k <= 10, 2 * k, 5 * k - 30).astype(jnp.float32)


def _read(flat: jax.Array, base: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The bit, uint32, of the cell at (x, y) [cells]; truncated toward zero, so cell 0 is twice as wide.

    A ray that has already met a wall may point outside; XLA clamps the index and the bit is not used.
    """
    i, j = x.astype(jnp.int32) + _ORIGIN, y.astype(jnp.int32) + _ORIGIN
    word = flat.at[base + (i >> 3) * _COLS + (j >> 2)].get(mode="promise_in_bounds")
    return (word >> (((i & 7) << 2) | (j & 3)).astype(jnp.uint32)) & jnp.uint32(1)
