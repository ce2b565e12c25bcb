"""The lidar of MicroRacer, and the packed bitmaps that it reads.

A track's raster has 1300 x 1300 cells of 0.002 length units. The original truncates coordinates
toward zero, so its cell 650 is twice as wide as the others; here that row and that column stand
twice, and a cell is a floor, which costs one addition (`_read`). One bit a cell, 32 cells in x to a
uint32 word, words in a row along y: a cache line of 16 words is a patch of 32 x 16 cells. Around
the raster lies a margin of wall as wide as the lidar's longest stride, so no ray leaves the bitmap
before it has stopped.
"""

import jax
import jax.numpy as jnp
import numpy as np

NUM_RAYS = 19
RAY_SPACING = np.pi / 54  # [rad], 3.33 degrees
RASTER = 1300  # cells a side
CELLS_PER_UNIT = 500.0
MAX_COUNT = 240  # samples a ray; 2.34 units, more than the longest chord of the ring of all tracks
_SIDE = 1312  # bits a side: 5 of margin, 1301, 6 of margin; a multiple of 32
_LOW = 5
_ORIGIN = RASTER // 2 + 1 + _LOW  # the bit of floor 0
NUM_WORDS = _SIDE // 32 * _SIDE  # of one packed bitmap

# The original's fan, bit for bit: ray 0 is the rightmost, both constants go through float32.
_FAN = float(np.float32(np.pi / 3))
_RAY_ANGLES = -_FAN / 2 + float(np.float32(_FAN / 18)) * np.arange(NUM_RAYS)
# direction (2,) @ (2, 19): the direction turned by the angle of each ray
_TO_COS = np.stack([np.cos(_RAY_ANGLES), -np.sin(_RAY_ANGLES)]).astype(np.float32)
_TO_SIN = np.stack([np.sin(_RAY_ANGLES), np.cos(_RAY_ANGLES)]).astype(np.float32)

_CHUNK = 16  # samples of every open ray between two looks at which rays are still open
_SHARES = (3, 5)  # a third of the rays is open after one chunk, a fifth of those after the next


def pack_cells(cells: jax.Array) -> jax.Array:
    """Pack a raster (1300, 1300) bool, x first, into words (NUM_WORDS,) uint32; margins False."""
    twice = np.r_[: RASTER // 2 + 1, RASTER // 2 : RASTER]
    high = _SIDE - _LOW - len(twice)
    bits = jnp.pad(cells[twice][:, twice], (_LOW, high)).reshape(_SIDE // 32, 32, _SIDE)
    shift = jnp.arange(32, dtype=jnp.uint32)[None, :, None]
    return jnp.sum(bits.astype(jnp.uint32) << shift, axis=1, dtype=jnp.uint32).reshape(-1)


def unpack_cells(words: jax.Array) -> jax.Array:
    """The inverse of `pack_cells`: words (NUM_WORDS,) uint32 -> raster (1300, 1300) bool."""
    shift = jnp.arange(32, dtype=jnp.uint32)[None, :, None]
    bits = (words.reshape(-1, 1, _SIDE) >> shift) & jnp.uint32(1)
    once = np.delete(np.arange(RASTER + 1), RASTER // 2) + _LOW
    return bits.reshape(_SIDE, _SIDE)[once][:, once].astype(bool)


def clear_cells(road: jax.Array) -> jax.Array:
    """Cells whose four edge neighbours are all road, (1300, 1300) bool: those do not stop the
    lidar.

    The cell itself need not be road (a pinhole would not stop a ray), as in the original. Outside
    the raster there is no road.
    """
    wide = jnp.pad(road, 1)
    return wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def is_on_road(words: jax.Array, track: jax.Array, position: jax.Array) -> jax.Array:
    """Whether the cell under a point is set, () bool.

    words (T, NUM_WORDS) uint32, track () int32, position (2,) float32 [length units]. A point
    outside the raster is not on the road (the original wraps around or raises IndexError there).
    """
    xy = jnp.clip(position * CELLS_PER_UNIT + (_ORIGIN - 0.5), 0.0, _SIDE - 1.0)
    bit = _read(words.reshape(-1), _first_word(track), xy[0], xy[1])
    return (bit & jnp.uint32(1)).astype(bool)


def scan(
    words: jax.Array, track: jax.Array, position: jax.Array, direction: jax.Array
) -> jax.Array:
    """Count, for each of 19 rays, the samples before the first that is not clear: (19,) uint8.

    words (T, NUM_WORDS) uint32 of clear cells, track () int32, position (2,) float32, direction
    (2,) float32 unit vector of travel. Ray 0 is the rightmost (30 degrees clockwise). Sample k lies
    at distance `reading(k)`.
    """
    # Products of matrices, because XLA fuses nothing into one: else each ray would compute anew how
    # the direction came about.
    cos = jnp.matmul(direction, _TO_COS, precision=jax.lax.Precision.HIGHEST)
    sin = jnp.matmul(direction, _TO_SIN, precision=jax.lax.Precision.HIGHEST)
    xy = position * CELLS_PER_UNIT + (_ORIGIN - 0.5)
    first_word, x, y = (
        jnp.broadcast_to(a, (NUM_RAYS,)) for a in (_first_word(track), xy[0], xy[1])
    )
    return _march(words.reshape(-1), first_word, x, y, cos, sin).astype(jnp.uint8)


def reading(count: jax.Array) -> jax.Array:
    """Distance of sample `count`, float32: ten strides of 1/250, then strides of 1/100."""
    # In cells, then one rounding: equal inside and outside of jit.
    return 0.002 * _sample_cells(count.astype(jnp.int32))


@jax.custom_batching.custom_vmap
def _march(
    words: jax.Array,
    first_word: jax.Array,
    x: jax.Array,
    y: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> jax.Array:
    """Clear samples of n rays (n,) uint32, all arguments but words (W,) being (n,).

    Most rays end within one chunk, a few run on for a hundred samples. So the rays that are still
    open are gathered into shorter arrays, those that are open after the next chunk into yet shorter
    ones. That pays only across cars: hence the batching rule, which makes of a batch of marches one
    long one.
    """
    rays = (first_word, x, y, cos, sin)
    is_open = (x > 0).astype(jnp.uint32)  # always; a constant would let XLA unroll the first loop
    return _continue(words, rays, is_open, 0, _SHARES if len(x) >= 512 else ())


@_march.def_vmap
def _march_many(axis_size, in_batched, words, *rays):
    batched = [
        ray if is_batched else jnp.broadcast_to(ray, (axis_size, *ray.shape))
        for ray, is_batched in zip(rays, in_batched[1:], strict=True)
    ]
    if in_batched[0]:  # as many banks as members: one long bank
        offset = jnp.arange(axis_size, dtype=jnp.uint32) * jnp.uint32(words.shape[-1])
        batched[0] = batched[0] + offset[:, None]
    counts = _march(words.reshape(-1), *(ray.reshape(-1) for ray in batched))
    return counts.reshape(batched[0].shape), True


def _continue(words, rays, is_open, num_done, shares):
    """Counts (n,) uint32 of rays of which those with is_open (n,) uint32 have num_done clear
    samples.

    Each chunk runs in a `while_loop` and depends on its counter, the first one too, though it runs
    but once: what enters a loop is in memory, while outside XLA would compute the rays anew, sines
    and all, for each of the 16 samples (8 times slower).
    """
    first_word, x, y, cos, sin = rays
    limit = num_done + _CHUNK if shares else MAX_COUNT

    def is_running(carry):
        num_done, is_open, _ = carry
        return (num_done < limit) & (jnp.max(is_open) > 0)

    def chunk(carry):
        num_done, is_open, count = carry
        k = jnp.arange(_CHUNK, dtype=jnp.uint32)[:, None]
        cells = _sample_cells(num_done + 1 + k.astype(jnp.int32))
        bits = _read(
            words,
            first_word[None, :],
            x[None, :] + cells * cos[None, :],
            y[None, :] + cells * sin[None, :],
        )
        clear = jnp.sum((bits & jnp.uint32(1)) << k, axis=0, dtype=jnp.uint32) * is_open
        leading = clear & ~(clear + jnp.uint32(1))  # the ones below the lowest zero
        is_open = (clear == 2**_CHUNK - 1).astype(jnp.uint32)
        return num_done + _CHUNK, is_open, count + jax.lax.population_count(leading)

    carry = jnp.int32(num_done), is_open, is_open * jnp.uint32(num_done)
    _, is_open, count = jax.lax.while_loop(is_running, chunk, carry)
    if not shares:
        return count

    def finish_some(carry):
        is_open, count = carry
        n = len(is_open)
        size = max(n // shares[0] // 64, 1) * 64  # odd sizes are slow
        index = _first_nonzero(is_open, size)  # n where there are no more
        taken = tuple(ray.at[index].get(mode="clip") for ray in rays)
        ended = _continue(words, taken, (index < n).astype(jnp.uint32), limit, shares[1:])
        put = {"mode": "drop", "unique_indices": True}
        return is_open.at[index].set(0, **put), count.at[index].set(ended, **put)

    return jax.lax.while_loop(lambda carry: jnp.max(carry[0]) > 0, finish_some, (is_open, count))[1]


def _sample_cells(k):
    """Distance [cells] of sample k, int32: ten strides of 2, then strides of 5."""
    return jnp.where(k <= 10, 2 * k, 5 * k - 30).astype(jnp.float32)


def _first_nonzero(flags, size):
    """Indices of the first `size` ones of flags (n,), then n."""
    n = len(flags)
    rank = jnp.cumsum(flags.astype(jnp.int32)) - 1
    rank = jnp.where(flags > 0, rank, size)
    index = jnp.full(size, n, jnp.int32)
    return index.at[rank].set(jnp.arange(n, dtype=jnp.int32), mode="drop", unique_indices=True)


# 2^23, added to a smaller number, rounds it to an integer, the low bits of the float.
_MAGIC = np.float32(2**23)
_MAGIC_BITS = 0x4B000000


def _first_word(track: jax.Array) -> jax.Array:
    """Address, uint32, of a track's first word, less what `_read` adds through the magic bits."""
    excess = (_MAGIC_BITS // 32 * _SIDE + _MAGIC_BITS) % 2**32
    return track.astype(jnp.uint32) * jnp.uint32(NUM_WORDS) - jnp.uint32(excess)


def _read(words: jax.Array, first_word: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The bit at (x, y) [cells + _ORIGIN - 1/2, so that rounding is a floor], in the lowest bit,
    uint32.

    The higher bits are rubbish. A ray that has already stopped may point outside of the bitmap: XLA
    clamps the address and the bit is not used.
    """
    i = jax.lax.bitcast_convert_type(x + _MAGIC, jnp.uint32)
    j = jax.lax.bitcast_convert_type(y + _MAGIC, jnp.uint32)
    address = first_word + (i >> 5) * jnp.uint32(_SIDE) + j
    rows = jax.lax.GatherDimensionNumbers((), (0,), (0,))
    word = jax.lax.gather(words, address[..., None], rows, (1,), mode="promise_in_bounds")
    return word >> (i & jnp.uint32(31))
