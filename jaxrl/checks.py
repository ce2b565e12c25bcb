"""Checks of a configuration, in words, before anything is compiled."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

FLOAT32_MAX = float(np.finfo(np.float32).max)


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} = {value!r} must be an integer >= {minimum}")


def check_real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number and low <= value <= high (low < value if
    `above`).

    A traced one is not looked at: under `vmap` over a config its reals are.
    """
    if isinstance(value, Tracer):
        return
    number = value
    if isinstance(value, np.ndarray | jax.Array) and value.shape == ():
        number = value.item()
    is_number = isinstance(number, int | float | np.integer | np.floating)
    is_number = is_number and not isinstance(number, bool)
    # chained comparisons are False for NaN
    inside = is_number and (low < number <= high if above else low <= number <= high)
    if not inside or abs(number) > FLOAT32_MAX:
        left, right = "(" if above else "[", "]" if math.isfinite(high) else ")"
        verb = "lie" if is_number else "be a number"
        fit = " and fit into float32" if inside and number != math.inf else ""
        raise ValueError(f"{name} = {value!r} must {verb} in {left}{low}, {high}{right}{fit}")


def check_flags(config: Any) -> None:
    """Raise ValueError unless each field of a dataclass whose default is a bool is one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ValueError(f"{field.name} = {value!r} must be True or False")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} = {value!r} must be one of {', '.join(map(repr, choices))}")


def check_widths(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a tuple of positive layer widths."""
    if not isinstance(value, tuple) or not all(
        isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in value
    ):
        raise ValueError(f"{name} = {value!r} must be a tuple of positive integers, e.g. (64, 64)")
