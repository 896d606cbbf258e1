"""Checks of the fields of a configuration."""

from __future__ import annotations

import math
from typing import Any


def check_int(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise unless `value` is an integer in range; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer.")
    if value < least or (most is not None and value > most):
        limit = f" and at most {most:,}" if most is not None else ""
        raise ValueError(f"{name}={value} must be at least {least}{limit}.")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def check_float(name: str, value: Any, least: float = -math.inf, below: float = math.inf) -> None:
    """Raise unless `value` is a finite number in [least, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number.")
    if not math.isfinite(value) or not least <= value < below:
        raise ValueError(f"{name}={value} must be a finite number of at least {least} and below {below}.")
