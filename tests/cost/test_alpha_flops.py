"""Alpha-FLOPs: the formula by hand, the published data, fits that recover what was planted."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.cost import alpha_flops as af
from jaxrl.cost.alpha_flops import Shape
from jaxrl.cost.flops import count

# the formula --------------------------------------------------------------------------------------


def test_a_convolution_by_hand():
    shape = Shape(10, 20, 3, 5, 3, 3)
    assert shape.macs == 200 * 15 * 9
    assert shape.flops == 54_000
    # S_K = 1 + ln 9 = 3.19722; (3.19722 + 0.001 (200 - 3.19722)) / 200 = 0.016970
    expected = 0.0169701**0.56
    assert af.alpha(shape) == pytest.approx(expected, rel=1e-4)
    assert af.alpha_flops(shape) == pytest.approx(54_000 * expected, rel=1e-4)
    assert af.predicted_ms(shape) == pytest.approx(0.0375 * 0.027 * expected, rel=1e-4)


def test_a_dense_layer_has_alpha_one_and_its_batch_is_spatial():
    assert af.alpha(af.dense(64, 32)) == 1.0
    assert af.dense(64, 32).macs == 2048
    assert af.alpha(af.dense(64, 32, batch=50)) == af.alpha(Shape(5, 10, 64, 32))
    assert af.alpha(af.dense(64, 32, batch=50)) == pytest.approx(((1 + 0.02 * 49) / 50) ** 0.99)


def test_alpha_above_one_is_not_clamped():
    # a 3 x 3 kernel on a 1 x 1 map: ((S_K + 0.001 (1 - S_K)) / 1) ** 0.56, S_K = 3.197
    assert af.alpha(Shape(1, 1, 8, 8, 3, 3)) == pytest.approx(1.92, abs=0.005)


def test_conventions_differ_by_the_logarithm_of_the_side():
    for k in (1, 3, 5):
        shape = Shape(4, 4, 8, 8, k, k)
        (beta, gamma), s = (af.REPLICATION.area.beta, af.REPLICATION.area.gamma), 16.0
        if k == 1:
            beta, gamma = af.REPLICATION.point.beta, af.REPLICATION.point.gamma
        s_k = 1 + np.log(k)
        expected = ((s_k + beta * (s - s_k)) / s) ** gamma
        assert af.alpha(shape, af.REPLICATION) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="convention = 'edge' must be one of 'area', 'side'"):
        af.Constants(af.PUBLISHED.point, af.PUBLISHED.area, convention="edge")


def test_a_data_sheet_is_a_roofline():
    # 100 GB/s and 1 TFLOP/s at 80 %: 4 MB of weights in 0.05 ms, 2 MFLOP in 0.0025 ms
    sheet = af.data_sheet(100.0, 1.0)
    assert sheet.point == af.KernelClass(pytest.approx(0.05), 1.0, pytest.approx(0.05))
    ms = af.predicted_ms(af.dense(1000, 1000, batch=np.array([1, 101])), sheet)
    assert ms == pytest.approx([0.05, 0.05 + 100 * 0.0025])
    with pytest.raises(ValueError, match="peak_TFLOP_per_s = 0 must lie in"):
        af.data_sheet(100.0, 0)
    with pytest.raises(ValueError, match="beta = 5 must be <= 1"):
        af.data_sheet(100.0, 0.01)


def test_the_floor_is_the_shortest_time():
    constants = af.Constants(af.PUBLISHED.point, af.PUBLISHED.area, floor_ms=0.2)
    shapes = af.dense(np.array([8, 8192]), np.array([8, 8192]))
    assert af.predicted_ms(shapes, constants) == pytest.approx([0.2, 0.0375 * 8192**2 / 1e6])


def test_a_counted_program_is_the_sum_of_its_layers():
    def net(x, w, v):
        h = jax.nn.relu(jax.lax.conv(x, w, (1, 1), "VALID"))  # (2, 5, 7, 7)
        return h.reshape(2, -1) @ v

    def many(x, w, v):
        return jax.lax.scan(lambda c, _: (c, net(x, w, v)), 0.0, length=10)[1]

    args = jnp.zeros((2, 3, 9, 9)), jnp.zeros((5, 3, 3, 3)), jnp.zeros((245, 4))
    expected = af.alpha_flops(Shape(7, 7, 3, 5, 3, 3, batch=2)) + af.alpha_flops(
        af.dense(245, 4, batch=2)
    )
    assert af.of_cost(count(many, *args)) == pytest.approx(10 * expected)
    # a gradient counts as its forward layer; the first layer has no input gradient
    gradient = count(jax.grad(lambda w, v: net(args[0], w, v).sum(), argnums=(0, 1)), *args[1:])
    conv, last = (
        af.alpha_flops(s) for s in (Shape(7, 7, 3, 5, 3, 3, batch=2), af.dense(245, 4, batch=2))
    )
    assert af.of_cost(gradient) == pytest.approx(2 * conv + 2 * last)
    assert af.of_cost(count(jnp.sin, jnp.zeros(3))) == 0.0


# the published data -------------------------------------------------------------------------------


def read(path):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {k: np.array([r[k] for r in rows]) for k in rows[0]}


def shapes_of(table):
    names = ("H", "W", "Cin", "Cout", "K1", "K2")
    return Shape(*(table[name].astype(float) for name in names))


@pytest.fixture(scope="module")
def measured(reference_dir):
    table = read(reference_dir / "alpha_flops_measured.csv")
    return shapes_of(table), table["measured_ms"].astype(float)


def spearman(x, y):
    from scipy.stats import spearmanr

    return float(spearmanr(x, y)[0])


@pytest.mark.reference
def test_every_published_row(reference_dir):
    table = read(reference_dir / "alpha_flops_expected.csv")
    shape = shapes_of(table)
    assert len(shape.macs) > 0
    for name, value in {
        "macs": shape.macs,
        "flops": shape.flops,
        "alpha": af.alpha(shape),
        "alpha_flops": af.alpha_flops(shape),
        "predicted_ms": af.predicted_ms(shape),
    }.items():
        np.testing.assert_allclose(value, table[name].astype(float), rtol=1e-12, err_msg=name)


@pytest.mark.reference
def test_time_follows_alpha_flops_and_not_flops(measured):
    shape, ms = measured
    index = af.alpha_flops(shape)
    assert np.corrcoef(ms, shape.flops)[0, 1] == pytest.approx(0.561, abs=5e-4)
    assert np.corrcoef(ms, index)[0, 1] == pytest.approx(0.988, abs=5e-4)
    assert spearman(ms, shape.flops) == pytest.approx(0.706, abs=5e-4)
    assert spearman(ms, index) == pytest.approx(0.987, abs=5e-4)
    error = np.abs(af.predicted_ms(shape) / ms - 1)
    assert np.median(error) == pytest.approx(0.127, abs=5e-4)


@pytest.mark.reference
def test_the_area_convention_is_that_of_the_published_constants(measured):
    shape, ms = measured

    def r2(convention):
        constants = af.Constants(af.PUBLISHED.point, af.PUBLISHED.area, convention)
        residual = ms - af.predicted_ms(shape, constants)
        return 1 - np.sum(residual**2) / np.sum((ms - ms.mean()) ** 2)

    assert r2("area") == pytest.approx(0.975, abs=1e-3)
    assert r2("side") == pytest.approx(0.923, abs=1e-3)


@pytest.mark.reference
def test_a_launch_floor_halves_the_large_errors(measured):
    shape, ms = measured

    def p90(floor_ms):
        constants = af.Constants(af.PUBLISHED.point, af.PUBLISHED.area, floor_ms=floor_ms)
        return np.quantile(np.abs(af.predicted_ms(shape, constants) / ms - 1), 0.9)

    assert p90(0.0) == pytest.approx(0.57, abs=0.01)
    assert p90(0.243) == pytest.approx(0.30, abs=0.01)


@pytest.mark.reference
def test_a_fit_to_the_published_data(measured):
    fit = af.fit_layers(*measured)
    assert fit.log_rmse <= 0.18
    assert fit.errors.median == pytest.approx(0.093, abs=0.005)
    assert fit.errors.p90 == pytest.approx(0.245, abs=0.01)
    assert fit.errors.cv_median == pytest.approx(0.096, abs=0.005)
    assert fit.constants.point.beta == pytest.approx(0.0219, rel=0.05)
    assert fit.constants.point.gamma == pytest.approx(1.062, rel=0.02)
    assert fit.constants.floor_ms == pytest.approx(0.243, rel=0.05)


# fits ---------------------------------------------------------------------------------------------

PLANTED = af.Constants(
    af.KernelClass(0.05, 0.9, 0.02), af.KernelClass(0.01, 0.7, 0.02), floor_ms=0.003
)


def test_calibration_recovers_planted_constants():
    fit = af.calibrate(time_ms=lambda shape: af.predicted_ms(shape, PLANTED))
    assert fit.log_rmse < 1e-3
    assert fit.errors.cv_median < 1e-3
    assert fit.constants.floor_ms == pytest.approx(0.003, rel=1e-2)
    for name in ("point", "area"):
        found, planted = getattr(fit.constants, name), getattr(PLANTED, name)
        assert (found.beta, found.gamma, found.T) == pytest.approx(
            (planted.beta, planted.gamma, planted.T), rel=0.05
        )
    assert "calibrated on cpu" in fit.constants.source


def test_the_cross_validated_error_is_that_of_new_layers():
    """With noise of 20 % the fit cannot be better than about 13 %, the median of |N(0, 0.2)|."""
    noise = np.random.default_rng(1).normal(0.0, 0.2, af.calibration_grid().macs.shape)
    fit = af.calibrate(time_ms=lambda shape: af.predicted_ms(shape, PLANTED) * np.exp(noise))
    assert 0.09 < fit.errors.cv_median < 0.2
    assert fit.errors.cv_p90 > fit.errors.cv_median
    truth = af.predicted_ms(af.calibration_grid(), PLANTED)
    found = af.predicted_ms(af.calibration_grid(), fit.constants)
    assert np.median(np.abs(found / truth - 1)) < 0.1
    assert "cross-validated (5 folds" in str(fit.errors)


def test_a_class_without_layers_keeps_the_published_constants():
    shape = af.dense(np.array([64, 256, 1024, 4096] * 5), 64, np.repeat(4 ** np.arange(5), 4))
    fit = af.fit_layers(shape, af.predicted_ms(shape, PLANTED))
    assert (fit.constants.area.beta, fit.constants.area.gamma) == (0.001, 0.56)
    assert "K > 1 not measured" in fit.constants.source
    assert fit.log_rmse < 1e-3
    assert fit.constants.point.gamma == pytest.approx(0.9, rel=0.05)


def test_bad_measurements_are_refused():
    shape = af.dense(np.arange(1, 11), 8)
    with pytest.raises(ValueError, match="measured_ms has 1 times that are not positive"):
        af.fit_layers(shape, [0.0, *range(1, 10)])
    with pytest.raises(ValueError, match="4 measured layers are too few"):
        af.fit_layers(af.dense(np.arange(1, 5), 8), np.ones(4))


def test_layers_are_timed_as_the_layers_they_are():
    shape = Shape(*np.array([[1, 1, 8, 16, 1, 1, 4], [6, 5, 3, 4, 3, 3, 2]]).T)
    for row, expected in zip(
        [(1, 1, 8, 16, 1, 1, 4), (6, 5, 3, 4, 3, 3, 2)], shape.macs, strict=True
    ):
        function, args = af.layer_program(*row)
        assert count(function, *args).nominal_macs == expected
    times = af.time_layers(shape, num_repeats=2)
    assert times.shape == (2,)
    assert (times > 0).all()


def test_runs_recover_planted_prices():
    rng = np.random.default_rng(0)
    features = {
        "flops": rng.uniform(1e9, 1e12, 9),
        "env_steps": rng.uniform(1e4, 1e6, 9),
        "sequential_steps": rng.uniform(1e2, 1e4, 9),
    }
    prices = {"flops": 2e-11, "env_steps": 3e-6, "sequential_steps": 4e-4}
    seconds = sum(prices[k] * features[k] for k in prices)
    fit = af.fit_runs(features, seconds)
    assert fit.coefficients == pytest.approx(prices, rel=1e-6)
    assert fit.errors.cv_median < 1e-6
    assert fit.errors.num_folds == 9
    assert fit.predict(flops=1e11, env_steps=1e5, sequential_steps=1e3) == pytest.approx(2.7)
    with pytest.raises(ValueError, match="must be env_steps, flops, sequential_steps"):
        fit.predict(flops=1e11)
    with pytest.raises(ValueError, match="4 runs are too few for 3 features: 5"):
        af.fit_runs({k: v[:4] for k, v in features.items()}, seconds[:4])


def test_each_run_is_predicted_from_the_others():
    # relative least squares with one feature: c = sum(1 / y) / sum(1 / y^2)
    # all: 2.5 / 2.25, errors 1/9, 1/9, 4/9. Without a 1: 1.5 / 1.25 = 1.2, error 0.2; without the
    # 2: c = 1, error 0.5
    errors = af.fit_runs({"a": [1.0, 1.0, 1.0]}, [1.0, 1.0, 2.0]).errors
    assert errors.median == pytest.approx(1 / 9)
    assert errors.cv_median == pytest.approx(0.2)
    assert errors.cv_p90 == pytest.approx(0.2 + 0.8 * 0.3)


def test_no_run_has_a_negative_price():
    """What falls as another feature rises is noise, not a refund."""
    features = {"a": np.array([1.0, 2, 3, 4, 5]), "b": np.array([5.0, 4, 3, 2, 1])}
    fit = af.fit_runs(features, 2 * features["a"] - 0.2 * features["b"])
    assert fit.coefficients["b"] == 0.0
    assert fit.errors.cv_median > 0.01
