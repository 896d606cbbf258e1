"""Which settings a search tries: all of a grid, a quasi-random spread, or what TPE chooses; and the spaces of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from ..methods import COMBINED_METHODS, PROMPT_METHODS
from .grid import Range


DEFAULT_TRIALS = 20

# What results depend on most. Rates and lengths span the papers' grids; epochs are searched because every method
# converges at a pace of its own and the last weights count.
_HEAD: dict[str, list | Range] = {
    "head_learning_rate": Range(1e-3, 1e-1, False),
    "weight_decay": [1e-4, 1e-3, 1e-2, 1e-1],
}
_EPOCHS: dict[str, list | Range] = {"num_train_epochs": [10.0, 20.0, 40.0]}
_ADDED = {"learning_rate": Range(3e-4, 1e-2, False)}
_PROMPTS: dict[str, list | Range] = {
    "prompt_learning_rate": Range(1e-3, 1e-1, False),
    "num_virtual_tokens": [5, 10, 50],
    "init_method": ["random", "tokens"],
    "prompt_dropout": [0.0, 0.1],
}


def search_space(method: str) -> dict[str, list | Range]:
    """Return the flags of `vpt-peft train` that a search for a method varies, with their values."""
    if method in ("linear", "mlp"):
        return {"learning_rate": Range(1e-3, 3e-1, False), "weight_decay": _HEAD["weight_decay"], **_EPOCHS}
    if method in COMBINED_METHODS:
        return {**_ADDED, **_PROMPTS, **_HEAD, **_EPOCHS}
    if method in PROMPT_METHODS:
        return {**_PROMPTS, **_HEAD, **_EPOCHS}
    rates = {"learning_rate": Range(1e-5, 1e-3, False)} if method in ("full", "partial") else _ADDED
    return {**rates, **_HEAD, **_EPOCHS}


def full_grid(axes: Mapping[str, list | Range]) -> list[dict[str, Any]]:
    """Return all combinations of values.

    Raises:
        ValueError: an axis is a range.
    """
    choices: list[list] = []
    for name, values in axes.items():
        if isinstance(values, Range):
            raise ValueError(f"{name}={values} is a range; list the values, or sweep with --sampler tpe or random.")
        choices.append(values)
    return [dict(zip(axes, values, strict=True)) for values in product(*choices)]


def spread(axes: Mapping[str, list | Range], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return settings spread evenly over the axes by a scrambled Sobol sequence.

    The same seed gives the same settings, and a larger count begins with those of a smaller one.

    Args:
        axes: values by flag; ranges that start above 0 are logarithmic.
        count: how many.
        seed: of the scrambling.
    """
    from scipy.stats import qmc

    if not axes or not count:
        return []
    points = qmc.Sobol(len(axes), rng=seed).random_base2(math.ceil(math.log2(count)) if count > 1 else 0)[:count]
    return [
        {name: _value(axis, float(u)) for (name, axis), u in zip(axes.items(), point, strict=True)} for point in points
    ]


def _value(axis: list | Range, position: float) -> Any:
    """The value at a position in [0, 1)."""
    if not isinstance(axis, Range):
        return axis[int(position * len(axis))]
    if axis.low > 0:
        value = axis.low * (axis.high / axis.low) ** position
    else:
        value = axis.low + position * (axis.high - axis.low)
    value = min(max(value, axis.low), axis.high)
    # Three digits are enough, and are what tables and folders can show
    return round(value) if axis.whole else min(max(float(f"{value:.3g}"), axis.low), axis.high)


def plan(
    axes: Mapping[str, list | Range], sampler: str, count: int | None, with_default: bool = False
) -> list[dict[str, Any]] | int:
    """Return the settings of a search's trials, or with TPE how many it shall choose.

    Args:
        axes: values by flag.
        sampler: "grid", "random" or "tpe".
        count: most trials; by default the whole grid, or 20.
        with_default: the first trial changes nothing, so that the search is never worse than what is given.

    Raises:
        ValueError: a grid has a range.
    """
    if sampler == "tpe":
        return count or DEFAULT_TRIALS
    first: list[dict[str, Any]] = [{}] if with_default else []
    if sampler == "grid":
        everything = first + full_grid(axes)
        return everything[: count or len(everything)]
    count = count or DEFAULT_TRIALS
    return (first + spread(axes, count - len(first)))[:count]
