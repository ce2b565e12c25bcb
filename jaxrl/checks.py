"""Checks of a configuration, in words, before anything is compiled."""

import math
from typing import Any

import numpy as np


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} = {value!r} must be an integer >= {minimum}")


def check_real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raise ValueError unless `value` is finite and low <= value <= high (low < value if `above`).

    Only Python numbers are looked at: under `vmap` over a config its reals are traced.
    """
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        return
    inside = low < value <= high if above else low <= value <= high  # False for NaN
    if not (inside and math.isfinite(value)):
        left, right = "(" if above else "[", "]" if math.isfinite(high) else ")"
        raise ValueError(f"{name} = {value!r} must lie in {left}{low}, {high}{right}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r} must be one of {', '.join(map(repr, choices))}")


def check_widths(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a tuple of positive layer widths."""
    if not isinstance(value, tuple) or not all(
        isinstance(width, int) and width > 0 for width in value
    ):
        raise ValueError(f"{name} = {value!r} must be a tuple of positive integers, e.g. (64, 64)")
