"""Alpha-FLOPs: FLOPs weighted by how well a layer's shape runs in parallel; fits to your device.

Asperti, Evangelista and Marzolla, "Dissecting FLOPs along input dimensions for GreenAI cost
estimations" (2021, https://arxiv.org/abs/2107.11949). Of a convolution with an output map of
S = H W positions, a kernel K1 x K2 and channels Cin -> Cout, with S_K = 1 + ln(K1 K2),

    alpha(S) = ((S_K + beta (S - S_K)) / S) ** gamma
    macs = S Cin Cout K1 K2,  flops = 2 macs,  alpha_flops = alpha flops
    predicted_ms = max(floor_ms, T alpha macs / 1e6)

A dense layer is a 1 x 1 convolution; its batch goes on the spatial axis, S = batch. The authors'
code calls MACs "FLOPS": here both have their own name, and T is in ms for a million MACs.

alpha_flops are an index: with the published constants they compare networks, not devices. Those
constants are of one laptop GPU of 2019; on other devices the thesis holds (FLOPs alone do not tell
the time), the numbers do not, and on a CPU they can rank layers worse than plain FLOPs. Times come
only from a fit to your device (`calibrate`, `fit_runs`), with the cross-validated error beside it.

Extensions, not in the paper: batched convolutions (S = batch H W), groups (Cin / groups), strides
(S of the output map), gradients (forward layer's alpha, see `jaxrl.cost.flops`). Everything here
runs on the host in float64.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.checks import check_choice, check_count, check_real
from jaxrl.cost.flops import Cost

Array = Any  # int, float or NumPy array of them


@dataclass(frozen=True)
class Shape:
    """A convolution, or many: every field a number or an array; a dense layer is H = W = K = 1."""

    H: Array  # of the output map
    W: Array
    Cin: Array  # that one output value sees: of its group
    Cout: Array
    K1: Array = 1
    K2: Array = 1
    batch: Array = 1

    @property
    def S(self) -> np.ndarray:
        """Positions of the output map, of the whole batch."""
        return _real(self.batch) * _real(self.H) * _real(self.W)

    @property
    def macs(self) -> np.ndarray:
        """Multiply-accumulates, forward, taps on padding included."""
        return self.S * _real(self.Cin) * _real(self.Cout) * _real(self.K1) * _real(self.K2)

    @property
    def flops(self) -> np.ndarray:
        """FLOPs: two for each multiply-accumulate."""
        return 2.0 * self.macs


def dense(Din: Array, Dout: Array, batch: Array = 1) -> Shape:
    """Return the shape of a dense layer Din -> Dout."""
    return Shape(1, 1, Din, Dout, batch=batch)


@dataclass(frozen=True)
class KernelClass:
    """Constants of one class of kernels."""

    beta: float  # what is left of the work at an endless S
    gamma: float
    T: float  # ms for a million MACs at S = S_K


@dataclass(frozen=True)
class Constants:
    """Constants of the formula, with what they belong to."""

    point: KernelClass  # K1 K2 = 1: dense layers and 1 x 1 convolutions
    area: KernelClass  # K1 K2 > 1
    convention: str = "area"  # S_K = 1 + ln(K1 K2), or "side": 1 + ln(sqrt(K1 K2))
    floor_ms: float = 0.0  # shortest time of a layer: its launch
    source: str = ""

    def __post_init__(self):
        check_choice("convention", self.convention, ("area", "side"))
        check_real("floor_ms", self.floor_ms, 0.0, np.inf)


PUBLISHED = Constants(
    KernelClass(0.02, 0.99, 0.0375),
    KernelClass(0.001, 0.56, 0.0375),
    source="Asperti, Evangelista, Marzolla 2021 (arXiv 2107.11949), NVIDIA Quadro T2000",
)
REPLICATION = Constants(
    KernelClass(0.00972514, 1.1779239, 0.00549217),
    KernelClass(0.00785036, 1.0601711, 0.00401956),
    convention="side",
    source="Barba Roque, Cruz 2026 (arXiv 2608.14550), NVIDIA RTX 4090",
)


def data_sheet(bandwidth_GB_per_s: float, peak_TFLOP_per_s: float) -> Constants:
    """Return uncalibrated constants of a device from its data sheet.

    With K = 1 and gamma = 1 the formula is an additive roofline, T ((1 - beta) weights + beta
    weights S): the weights (4 bytes each) are read once, then comes the arithmetic. Both rates are
    taken at 80 % of the sheet's. An estimate for orders of magnitude, not a calibration.

    Raises:
        ValueError: a rate is not positive, or the arithmetic would be slower than the memory.
    """
    check_real("bandwidth_GB_per_s", bandwidth_GB_per_s, 0.0, np.inf, above=True)
    check_real("peak_TFLOP_per_s", peak_TFLOP_per_s, 0.0, np.inf, above=True)
    T = 4.0 / (0.8 * bandwidth_GB_per_s)
    beta = 2e-3 / (0.8 * peak_TFLOP_per_s) / T
    if beta > 1.0:
        raise ValueError(
            f"peak_TFLOP_per_s = {peak_TFLOP_per_s} is too small for bandwidth_GB_per_s = "
            f"{bandwidth_GB_per_s}: beta = {beta:.3g} must be <= 1"
        )
    both = KernelClass(beta, 1.0, T)
    source = f"data sheet: {bandwidth_GB_per_s:g} GB/s, {peak_TFLOP_per_s:g} TFLOP/s"
    return Constants(both, both, source=source)


def alpha(shape: Shape, constants: Constants = PUBLISHED) -> np.ndarray:
    """alpha(S) of each layer; above 1 where S < S_K, as in the paper."""
    beta, gamma, _ = _per_layer(shape, constants)
    return _alpha(shape, constants.convention, beta, gamma)


def alpha_flops(shape: Shape, constants: Constants = PUBLISHED) -> np.ndarray:
    """Alpha-FLOPs of each layer."""
    return alpha(shape, constants) * shape.flops


def predicted_ms(shape: Shape, constants: Constants = PUBLISHED) -> np.ndarray:
    """Time [ms] of each layer on the device that the constants belong to."""
    _, _, T = _per_layer(shape, constants)
    return np.maximum(constants.floor_ms, T * alpha(shape, constants) * shape.macs / 1e6)


def of_cost(cost: Cost, constants: Constants = PUBLISHED) -> float:
    """Alpha-FLOPs of all dense layers and convolutions of a counted program, gradients included.

    A gradient counts as its forward layer. Elementwise work has no alpha and is not in it.
    """
    if not cost.layers:
        return 0.0
    rows = [(x.S, 1, x.Cin, x.Cout, x.K1, x.K2, n) for x, n in cost.layers.items()]
    *columns, times = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    return float(np.sum(times * alpha_flops(Shape(*columns), constants)))


def _real(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def _is_point(shape: Shape) -> np.ndarray:
    return _real(shape.K1) * _real(shape.K2) == 1.0


def _per_layer(shape: Shape, constants: Constants) -> tuple[np.ndarray, ...]:
    """(beta, gamma, T) of each layer, by its kernel's class."""
    point = _is_point(shape)
    return tuple(
        np.where(point, getattr(constants.point, name), getattr(constants.area, name))
        for name in ("beta", "gamma", "T")
    )


def _alpha(shape: Shape, convention: str, beta: Array, gamma: Array) -> np.ndarray:
    log_area = np.log(_real(shape.K1) * _real(shape.K2))
    s_k = 1.0 + (log_area if convention == "area" else 0.5 * log_area)
    return ((s_k + beta * (shape.S - s_k)) / shape.S) ** gamma


# Calibration: layers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Relative errors |predicted / measured - 1| of a fit, and of predictions never fitted to."""

    median: float
    p90: float
    cv_median: float  # cross-validated: each part predicted from the others
    cv_p90: float
    num_points: int
    num_folds: int

    def __str__(self) -> str:
        """Say them in per cent."""
        return (
            f"median error {100 * self.median:.1f} %, 90th percentile {100 * self.p90:.1f} %; "
            f"cross-validated ({self.num_folds} folds of {self.num_points} points) "
            f"{100 * self.cv_median:.1f} % and {100 * self.cv_p90:.1f} %"
        )


@dataclass(frozen=True)
class LayerFit:
    """Constants fitted to measured layers, and how far they can be trusted."""

    constants: Constants
    errors: Errors
    log_rmse: float  # root mean square of log(predicted / measured)


def fit_layers(
    shape: Shape, measured_ms: Array, convention: str = "area", num_folds: int = 5, source: str = ""
) -> LayerFit:
    """Fit (beta, gamma) of both classes, one T and the floor: least squares on log time.

    Where K > 1 the parameters are not separately identifiable: judge a fit by its errors, not by
    its parameters. A class without a layer keeps the published beta and gamma.

    Args:
        shape: n layers, fields broadcastable to (n,).
        measured_ms: (n,) their times.
        convention: of S_K, "area" or "side".
        num_folds: of the cross-validation; at least 2.
        source: what the constants will say of themselves.

    Raises:
        ValueError: a time is not positive, or there are fewer layers than parameters and folds.
    """
    ms = _real(measured_ms).reshape(-1)
    columns = [np.broadcast_to(_real(x), ms.shape) for x in vars(shape).values()]
    check_choice("convention", convention, ("area", "side"))
    check_count("num_folds", num_folds, minimum=2)
    if not np.all(ms > 0.0):
        raise ValueError(f"measured_ms has {int(np.sum(~(ms > 0.0)))} times that are not positive")
    if len(ms) < 8 or num_folds > len(ms):
        raise ValueError(
            f"{len(ms)} measured layers are too few: 6 parameters and {num_folds} folds need "
            f"{max(8, num_folds)}"
        )

    def fit(rows: np.ndarray) -> Constants:
        return _fit_constants(Shape(*(c[rows] for c in columns)), ms[rows], convention, source)

    def predict(constants: Constants, rows: np.ndarray) -> np.ndarray:
        return predicted_ms(Shape(*(c[rows] for c in columns)), constants)

    if np.all(_is_point(shape)):
        source = f"{source} (K > 1 not measured: beta and gamma as published)".strip()
    elif not np.any(_is_point(shape)):
        source = f"{source} (K = 1 not measured: beta and gamma as published)".strip()
    constants = fit(np.arange(len(ms)))
    errors = _cross_validate(fit, predict, ms, num_folds)
    log_ratio = np.log(predict(constants, np.arange(len(ms))) / ms)
    return LayerFit(constants, errors, float(np.sqrt(np.mean(log_ratio**2))))


def _fit_constants(shape: Shape, ms: np.ndarray, convention: str, source: str) -> Constants:
    from scipy.optimize import least_squares

    point = _is_point(shape)
    present = [name for name, has in (("point", point.any()), ("area", not point.all())) if has]

    def unpack(p: np.ndarray) -> Constants:
        """Read log(T), log(floor) and log(beta), log(gamma) of each class that has layers."""
        T, floor, *rest = (float(x) for x in np.exp(p))
        classes = {
            name: replace(getattr(PUBLISHED, name), T=T)  # where nothing was measured
            for name in ("point", "area")
        }
        for i, name in enumerate(present):
            classes[name] = KernelClass(rest[2 * i], rest[2 * i + 1], T)
        return Constants(**classes, convention=convention, floor_ms=floor, source=source)

    def residual(p: np.ndarray) -> np.ndarray:
        return np.log(predicted_ms(shape, unpack(p)) / ms)

    low = np.log([1e-12, 1e-6 * ms.min(), *[1e-7, 0.05] * len(present)])
    high = np.log([1e6, np.median(ms), *[1.0, 2.0] * len(present)])
    best = None
    # the floor makes the problem non-convex, and beta and gamma make up for each other
    for beta, gamma, floor in itertools.product((1e-3, 2e-2, 0.3), (0.6, 1.0), (0.3, 1.1)):
        start = np.log([1.0, 1e-6 * ms.min(), *[beta, gamma] * len(present)])
        start[0] = np.median(-residual(start))  # the T that is right in the middle
        start[1] = np.log(floor * ms.min())
        start = np.clip(start, low + 1e-9, high - 1e-9)
        result = least_squares(residual, start, bounds=(low, high), max_nfev=200)
        if best is None or result.cost < best.cost:
            best = result
    assert best is not None
    return unpack(best.x)


def _cross_validate(
    fit: Callable[[np.ndarray], Any],
    predict: Callable[[Any, np.ndarray], np.ndarray],
    measured: np.ndarray,
    num_folds: int,
) -> Errors:
    """Errors of a fit to all rows, and of each fold predicted by a fit to the others."""
    rows = np.arange(len(measured))
    within = np.abs(predict(fit(rows), rows) / measured - 1.0)
    folds = np.array_split(np.random.default_rng(0).permutation(rows), num_folds)
    without = np.concatenate(
        [
            np.abs(predict(fit(np.setdiff1d(rows, fold)), fold) / measured[fold] - 1.0)
            for fold in folds
        ]
    )
    median, p90 = (float(np.quantile(within, q)) for q in (0.5, 0.9))
    cv_median, cv_p90 = (float(np.quantile(without, q)) for q in (0.5, 0.9))
    return Errors(median, p90, cv_median, cv_p90, len(measured), num_folds)


def calibration_grid(max_macs: float = 3e8) -> Shape:
    """Return dense layers and convolutions of many shapes, each of at most `max_macs`."""
    layers = [(1, 1, d, d, 1, b) for d in (16, 64, 256, 1024) for b in (1, 8, 64, 512, 4096)]
    layers += [
        (side, side, c, c, k, 1) for side in (1, 4, 16, 64) for c in (8, 32, 128) for k in (1, 3, 5)
    ]
    rows = [(h, w, c, d, k, k, b) for h, w, c, d, k, b in layers]
    shape = Shape(*np.array(rows).T)
    return Shape(*np.array(rows)[shape.macs <= max_macs].T)


def time_layers(shape: Shape, num_repeats: int = 20) -> np.ndarray:
    """Measure each layer of `shape` on the default device; float32, jitted, forward.

    The median time [ms] of single calls, each waited for: what starting a program costs is in it.
    """
    check_count("num_repeats", num_repeats)
    columns = np.broadcast_arrays(*(np.asarray(x) for x in vars(shape).values()))
    return np.array(
        [
            _time_layer(*(int(v) for v in row), num_repeats=num_repeats)
            for row in zip(*(c.reshape(-1) for c in columns), strict=True)
        ]
    )


def layer_program(
    H: int,
    W: int,
    Cin: int,
    Cout: int,
    K1: int,
    K2: int,
    batch: int,
) -> tuple[Callable[..., jax.Array], tuple[jax.Array, jax.Array]]:
    """Return (function, arguments) of a layer: a matrix product if H = W = K1 = K2 = 1."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    if H == W == K1 == K2 == 1:
        return jnp.matmul, (normal(batch, Cin), normal(Cin, Cout))

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)

    return convolve, (normal(batch, H, W, Cin), normal(K1, K2, Cin, Cout))


def _time_layer(*shape: int, num_repeats: int) -> float:
    function, args = layer_program(*shape)
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(num_repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))


def calibrate(
    shape: Shape | None = None,
    time_ms: Callable[[Shape], Array] = time_layers,
    convention: str = "area",
    num_folds: int = 5,
) -> LayerFit:
    """Time a grid of layers on this device and fit the formula to it.

    Args:
        shape: the layers; `calibration_grid()` if None.
        time_ms: gives their times [ms].
        convention, num_folds: see `fit_layers`.
    """
    shape = calibration_grid() if shape is None else shape
    device = jax.devices()[0]
    source = f"calibrated on {device.platform} ({device.device_kind}), float32"
    return fit_layers(shape, time_ms(shape), convention, num_folds, source)


# Calibration: whole runs --------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFit:
    """measured = sum of coefficient times feature, no coefficient negative."""

    coefficients: dict[str, float]  # [unit of what was measured] per [unit of the feature]
    errors: Errors  # leave one out
    source: str = ""

    def predict(self, **features: float) -> float:
        """Predict for one run.

        Raises:
            ValueError: the features are not those of the fit.
        """
        if set(features) != set(self.coefficients):
            raise ValueError(
                f"features = {sorted(features)} must be {', '.join(sorted(self.coefficients))}"
            )
        return sum(self.coefficients[name] * x for name, x in features.items())


def fit_runs(
    features: Mapping[str, Sequence[float] | np.ndarray], measured: Array, source: str = ""
) -> RunFit:
    """Fit what whole runs took (seconds, or joules) to a sum of features, by relative error.

    FLOPs alone are a poor predictor of a run's time: steps of environments and steps one after the
    other have their own price. So: features "flops", "env_steps", "sequential_steps".

    Args:
        features: name -> (n,) values of n runs.
        measured: (n,) seconds or joules.
        source: what the fit will say of itself.

    Raises:
        ValueError: fewer than two runs more than features, or a value that is not positive.
    """
    names = list(features)
    x = np.stack([_real(features[name]) for name in names], axis=1)
    y = _real(measured).reshape(-1)
    if len(y) < len(names) + 2:
        raise ValueError(f"{len(y)} runs are too few for {len(names)} features: {len(names) + 2}")
    if not (np.all(y > 0.0) and np.all(x >= 0.0) and np.all(np.isfinite(x))):
        raise ValueError("what was measured must be positive, and all features finite and >= 0")

    def fit(rows: np.ndarray) -> np.ndarray:
        from scipy.optimize import nnls

        # relative errors: a row divided by what was measured must come out as 1. The columns are
        # scaled: FLOPs and steps are a million apart
        a = x[rows] / y[rows, None]
        scale = np.maximum(np.linalg.norm(a, axis=0), np.finfo(float).tiny)
        return nnls(a / scale, np.ones(len(rows)))[0] / scale

    errors = _cross_validate(fit, lambda c, rows: x[rows] @ c, y, num_folds=len(y))
    coefficients = fit(np.arange(len(y)))
    return RunFit(dict(zip(names, map(float, coefficients), strict=True)), errors, source)
