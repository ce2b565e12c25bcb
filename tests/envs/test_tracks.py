"""The track law and the lidar, piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import _lidar, _tracks


def draws(radius_u=None, knot=5, flag=True, u=np.pi / 6, side=0.034):
    radius_u = np.full(20, 0.6) if radius_u is None else radius_u
    return _tracks.Draws(
        radius_u=jnp.asarray(radius_u, jnp.float32),
        chicane_knot=jnp.int32(knot),
        chicane_flag=jnp.asarray(flag),
        obstacle_u=jnp.full(8, u, jnp.float32),
        obstacle_side=jnp.full(6, side, jnp.float32),
    )


@pytest.fixture(scope="module")
def bank():
    return _tracks.make_tracks(jax.random.key(3), 4)


@pytest.fixture(scope="module")
def circle():
    """Radius 1 all around: u = 0.6, no chicane; obstacles in the middle of their windows."""
    build = jax.jit(_tracks.track_from_draws, static_argnames=("obstacles", "chicanes"))
    return build(draws(), obstacles=True, chicanes=False)


def test_smoothing_by_hand():
    u = np.zeros(20)
    u[3] = 1.0
    # i = 2: s = 0 + 1, bounds [0, 1], stays 0. i = 3: s = 0, bounds [-1/2, 1/2], becomes 1/2.
    expected = np.zeros(20)
    expected[3] = 0.5
    np.testing.assert_allclose(_tracks.smooth_radii(jnp.asarray(u)), expected)


def test_smoothing_uses_updated_values_at_once():
    u = np.zeros(20)
    u[0], u[1] = 1.0, 1.0
    u[19] = 0.0
    # i = 0: s = u_19 + u_1 = 1, bounds [0, 1]: stays 1. i = 1: s = 1 + 0: bounds [0, 1]: stays 1.
    np.testing.assert_allclose(_tracks.smooth_radii(jnp.asarray(u)), u)
    u = np.zeros(20)
    u[0], u[2] = 1.0, 1.0
    # i = 0: s = 0, becomes 1/2. i = 1: s = 1/2 + 1, bounds [1/4, 5/4], becomes 1/4.
    # i = 2: s = 1/4 + 0, bounds [-3/8, 5/8], becomes 5/8. The old u_0 would have made u_1 = 1/2.
    smooth = _tracks.smooth_radii(jnp.asarray(u))
    np.testing.assert_allclose(smooth[:4], [0.5, 0.25, 0.625, 0.0])


def test_spline_of_a_circle():
    angles = jnp.linspace(0, 2 * np.pi, 41)
    points = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    spline = _tracks.fit_spline(angles, points)
    t = jnp.asarray([0.0, 0.1, 3.0, 6.2, 6.2 + 2 * np.pi, -0.3])  # wraps with the period
    expected = np.stack([np.cos(t), np.sin(t)], axis=1)
    np.testing.assert_allclose(_tracks.evaluate(spline, t), expected, atol=2e-6)
    expected = np.stack([-np.sin(t), np.cos(t)], axis=1)
    np.testing.assert_allclose(_tracks.evaluate_slope(spline, t), expected, atol=2e-4)


def test_spline_goes_through_uneven_knots():
    knots = jnp.asarray([0.0, 0.1, 1.0, 3.0, 3.05, 6.0])
    points = (
        jax.random.normal(jax.random.key(0), (6, 2))
        .at[-1]
        .set(jax.random.normal(jax.random.key(0), (6, 2))[0])
    )
    spline = _tracks.fit_spline(knots, points)
    np.testing.assert_allclose(_tracks.evaluate(spline, knots), points, atol=1e-5)
    # C2: the slope of the slope agrees on the two sides of a knot
    second = jax.jit(jax.vmap(jax.jacfwd(lambda t: _tracks.evaluate_slope(spline, t))))
    left, right = second(knots[1:-1] - 1e-4), second(knots[1:-1] + 1e-4)
    np.testing.assert_allclose(left, right, rtol=0.02, atol=0.2 * np.abs(right).mean())


def test_circle_has_the_nominal_borders(circle):
    t = jnp.linspace(0, 2 * np.pi, 50)
    for spline, radius in [(circle.inner, 0.98), (circle.outer, 1.02)]:
        points = _tracks.evaluate(spline, t)
        np.testing.assert_allclose(np.hypot(*points.T), radius, atol=1e-4)
        np.testing.assert_allclose(points[:, 1], radius * np.sin(t), atol=1e-4)


def test_circle_has_obstacles_in_their_windows(circle):
    angle = np.arctan2(circle.obstacles[..., 1], circle.obstacles[..., 0]) % (2 * np.pi)
    expected = np.arange(1, 7) * np.pi / 4 + np.pi / 6
    np.testing.assert_allclose(angle[:, 0], expected, atol=1e-3)
    np.testing.assert_allclose(angle[:, 1], expected - np.pi / 150, atol=1e-3)
    radius = np.linalg.norm(circle.obstacles, axis=-1)
    np.testing.assert_allclose(radius, 1.02 - 0.034, atol=1e-4)  # measured from the outer border
    i, j = np.asarray(_tracks.cell(circle.obstacles[:, 0])).T
    assert not circle.road[i, j].any()  # a hole in the road
    i, j = np.asarray(_tracks.cell(jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))).T
    assert circle.road[i, j].all()


def test_obstacle_brush_is_lopsided():
    road = jnp.ones((1300, 1300), bool)
    start, end = [0.1, 0.2], [0.1, 0.204]  # cells (700, 750) and (700, 752)
    cleared = ~_tracks.remove_obstacles(road, jnp.asarray([[end, start]]))
    expected = np.zeros((1300, 1300), bool)
    expected[695:705, 745:757] = True  # [-5, +5) around 750, 751, 752
    np.testing.assert_array_equal(cleared, expected)


def test_chicane_knots_lie_on_the_chord():
    rng = np.random.default_rng(0)
    radius_u = rng.uniform(0.4, 0.8, 20)
    for knot, flag in [(1, True), (9, False), (17, True)]:
        spline = _tracks.midline_from_draws(draws(radius_u, knot, flag))
        plain = _tracks.midline_from_draws(draws(radius_u), chicanes=False)
        gap = 2 * np.pi / 19
        five = np.asarray(spline.knots)[knot : knot + 5]
        np.testing.assert_allclose(
            five, knot * gap + gap * np.array([-1 / 3, -0.04, 0, 0.04, 1 / 3]), atol=1e-5
        )
        scale = np.array([1, 1.02, 1, 0.98, 1])
        points = np.asarray(spline.points)[knot : knot + 5]
        points = points / (scale if flag else scale[::-1])[:, None]
        before, after = np.asarray(plain.points)[[knot - 1, knot + 1]]
        chord, offsets = after - before, points - before
        np.testing.assert_allclose(
            chord[0] * offsets[:, 1] - chord[1] * offsets[:, 0], 0, atol=1e-6
        )
        np.testing.assert_allclose(np.arctan2(*points.T[::-1]) % (2 * np.pi), five, atol=1e-5)
        np.testing.assert_array_equal(spline.points[:knot], plain.points[:knot])
        np.testing.assert_array_equal(spline.points[knot + 5 :], plain.points[knot + 1 :])


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ((3, 1), [(0, 0), (1, 0), (2, 0), (3, 1)]),  # y truncated
        ((-2, -4), [(0, 0), (0, -1), (-1, -2), (-1, -3), (-2, -4)]),  # toward the start
        ((2, -2), [(0, 0), (1, -1), (2, -2)]),
        ((0, 0), []),
    ],
    ids=str,
)
def test_line_by_hand(end, expected):
    cells, is_used = _tracks.line_cells(jnp.zeros(2, jnp.int32), jnp.asarray(end, jnp.int32), 8)
    assert [tuple(c) for c in np.asarray(cells)[np.asarray(is_used)]] == expected


def test_lines_round_as_float64_slopes_do():
    # 15 / 22 * 22 = 14.999... in float64: the original's line ends one cell short
    for n, m in [(22, 15), (22, 14), (37, 11), (44, 30), (49, 1), (63, 62)]:
        for sign in (1, -1):
            end = jnp.asarray([n, sign * m], jnp.int32)
            cells, is_used = _tracks.line_cells(jnp.zeros(2, jnp.int32), end, 64)
            k = np.arange(n + 1)
            expected = np.stack([k, np.trunc(sign * m / n * k)], axis=1)
            np.testing.assert_array_equal(cells[is_used], expected)


def test_an_angle_is_the_sum_of_two_floats():
    exact = 2 * np.pi * np.arange(2000) / 2000
    high, low = (np.asarray(a, float) for a in _tracks._grid(2000))
    assert np.abs(high - exact).max() > 1e-7
    assert np.abs(high + low - exact).max() < 1e-13
    total, rest = jax.jit(_tracks._two_sum)(jnp.float32(6.0), jnp.float32(1e-7))
    assert (total, rest) == (6.0, np.float32(1e-7))  # not simplified away


def test_cells_truncate_toward_zero():
    points = jnp.asarray([[0.0019, -0.0019], [0.0021, -0.0021], [-1.3, 1.2999]])
    np.testing.assert_array_equal(_tracks.cell(points), [[650, 650], [651, 649], [0, 1299]])


def test_packing_is_reversible_and_clear_is_the_four_neighbours():
    road = jax.random.bernoulli(jax.random.key(0), 0.8, (1300, 1300))
    np.testing.assert_array_equal(_lidar.unpack_cells(_lidar.pack_cells(road)), road)
    clear = np.asarray(_lidar.clear_cells(road))
    road = np.pad(np.asarray(road), 1)
    for x, y in [(0, 0), (17, 1299), (500, 600), (501, 600), (1299, 3)]:
        four = road[x, y + 1] & road[x + 2, y + 1] & road[x + 1, y] & road[x + 1, y + 2]
        assert clear[x, y] == four


def test_draws_follow_the_law():
    keys = jax.random.split(jax.random.key(0), 2000)
    d = jax.jit(jax.vmap(_tracks.sample_draws))(keys)
    assert set(np.unique(d.chicane_knot)) == set(range(1, 18))
    assert 0.46 < np.mean(d.chicane_flag) < 0.54
    assert d.obstacle_u.min() >= np.pi / 8 - 1e-6
    assert d.obstacle_u.max() <= np.pi / 4
    np.testing.assert_allclose(np.unique(d.obstacle_side), [0.006, 0.034])
    np.testing.assert_allclose(d.radius_u.mean(axis=0), 0.5, atol=0.03)


def test_no_line_is_cut_and_no_track_leaves_the_raster():
    def extremes(key):
        d = _tracks.sample_draws(key)
        inner, outer = _tracks.borders(_tracks.midline_from_draws(d))
        angles = jnp.linspace(0, 2 * np.pi, 2000)
        ends, starts = _tracks.evaluate(outer, angles), _tracks.evaluate(inner, angles)
        segments = _tracks.cell(_tracks.obstacle_segments(outer, d))
        return (
            jnp.max(jnp.abs(_tracks.cell(ends) - _tracks.cell(starts))),
            jnp.max(jnp.abs(segments[:, 0] - segments[:, 1])),
            jnp.max(jnp.abs(ends)),
            jnp.minimum(jnp.min(jnp.diff(inner.knots)), jnp.min(jnp.diff(outer.knots))),
        )

    keys = jax.random.split(jax.random.key(1), 300)
    line, segment, furthest, gap = jax.jit(lambda keys: jax.lax.map(extremes, keys))(keys)
    assert line.max() < _tracks.LINE_CELLS, line.max()
    assert segment.max() < _tracks.OBSTACLE_CELLS, segment.max()
    assert furthest.max() < 1.3, furthest.max()
    assert gap.min() > 0, gap.min()  # no border folds back in polar angle


def test_bank_is_a_function_of_its_key(bank):
    again = _tracks.make_tracks(jax.random.key(3), 4)
    jax.tree.map(np.testing.assert_array_equal, bank, again)
    assert len(np.unique(np.asarray(bank.start[:, 0]))) == 4  # four different tracks
    assert bank.num_tracks == 4
    assert 5.6 < bank.length.min() < bank.length.max() < 8.0  # the original: 5.66 .. 7.93


def test_bank_starts_on_the_road_and_looks_along_it(bank):
    for i in range(4):
        road = np.asarray(_lidar.unpack_cells(bank.road[i]))
        x, y = _tracks.cell(bank.start[i])
        assert road[x, y]
        assert 60_000 < road.sum() < 95_000  # the original: about 79,000
        assert bank.heading[i, 1] < 0  # clockwise: down at the positive x axis
        assert bank.start_counts[i].max() > 10


def test_scan_is_the_naive_march(bank):
    """Against the rule written as a loop over one ray and one sample at a time."""
    rng = np.random.default_rng(0)
    for i in range(4):
        clear = np.asarray(_lidar.unpack_cells(bank.clear[i]))
        k = rng.integers(120)
        position = np.asarray(bank.midline[i, k]) + rng.uniform(-0.01, 0.01, 2)
        heading = rng.uniform(-np.pi, np.pi)
        direction = jnp.asarray([np.cos(heading), np.sin(heading)], jnp.float32)
        position = jnp.asarray(position, jnp.float32)
        counts = _lidar.scan(bank.clear, jnp.int32(i), position, direction)
        for ray in range(19):
            angle = heading + (ray - 9) * np.pi / 54
            count, distance = 0, 0.004
            while True:
                x, y = np.asarray(position, float) + distance * np.array(
                    [np.cos(angle), np.sin(angle)]
                )
                if not clear[int(500 * x) + 650, int(500 * y) + 650]:
                    break
                count += 1
                distance += 0.004 if count < 10 else 0.01
            assert counts[ray] == count, (i, ray)


@pytest.fixture(scope="module")
def cars(bank):
    """600 places near the midlines, looking roughly along them: track, position, direction."""
    rng = np.random.default_rng(1)
    track = rng.integers(0, 4, 600)
    position = np.asarray(bank.midline)[track, rng.integers(0, 120, 600)]
    angle = np.arctan2(*position.T[::-1]) - np.pi / 2 + rng.uniform(-0.5, 0.5, 600)
    position = position + rng.uniform(-0.01, 0.01, (600, 2))
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return jnp.asarray(track, jnp.int32), *(
        jnp.asarray(a, jnp.float32) for a in (position, direction)
    )


def test_a_batch_of_scans_is_that_many_scans(bank, cars):
    """The batching rule gathers open rays across cars, 11,400 rays here; alone it does not."""
    together = jax.vmap(_lidar.scan, in_axes=(None, 0, 0, 0))(bank.clear, *cars)
    alone = jax.lax.map(lambda car: _lidar.scan(bank.clear, *car), cars)
    np.testing.assert_array_equal(together, alone)
    assert together.max() > 48  # all stages were needed
    # and where every ray stays open there are more than the shorter arrays hold
    empty = jnp.full((1, _lidar.NUM_WORDS), 0xFFFFFFFF, jnp.uint32)
    zeros = jnp.zeros(600, jnp.int32)
    counts = jax.vmap(_lidar.scan, in_axes=(None, 0, 0, 0))(empty, zeros, *cars[1:])
    assert (counts == _lidar.MAX_COUNT).all()


def test_scans_in_a_batch_of_batches_and_of_banks(bank, cars):
    once = jax.vmap(_lidar.scan, in_axes=(None, 0, 0, 0))
    flat = once(bank.clear, *cars)
    nested = [a.reshape(4, 150, *a.shape[1:]) for a in cars]
    twice = jax.vmap(once, in_axes=(None, 0, 0, 0))(bank.clear, *nested)
    np.testing.assert_array_equal(twice.reshape(600, 19), flat)
    banks = jnp.stack([bank.clear, bank.clear[::-1]])
    per_bank = jax.vmap(once, in_axes=(0, None, None, None))(banks, *cars)
    np.testing.assert_array_equal(per_bank[0], flat)
    np.testing.assert_array_equal(per_bank[1], once(bank.clear[::-1], *cars))


def test_scan_of_an_empty_world_ends():
    words = jnp.full((1, _lidar.NUM_WORDS), 0xFFFFFFFF, jnp.uint32)
    direction = jnp.asarray([1.0, 0.0])
    counts = _lidar.scan(words, jnp.int32(0), jnp.zeros(2), direction)
    assert (counts == _lidar.MAX_COUNT).all()


@pytest.mark.parametrize("point", [(1.4, 0.0), (-1.4, 0.0), (0.0, 9.0), (0.0, -9e9)])
def test_there_is_no_road_outside_the_raster(point):
    words = _lidar.pack_cells(jnp.ones((1300, 1300), bool))[None]
    assert _lidar.is_on_road(words, jnp.int32(0), jnp.zeros(2))
    assert not _lidar.is_on_road(words, jnp.int32(0), jnp.asarray(point, jnp.float32))


def test_lattice_by_hand():
    counts = jnp.asarray([0, 1, 10, 11, 20], jnp.uint8)
    np.testing.assert_allclose(_lidar.reading(counts), [0, 0.004, 0.04, 0.05, 0.14], atol=1e-7)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="num_tracks = 0"):
        _tracks.make_tracks(jax.random.key(0), 0)
