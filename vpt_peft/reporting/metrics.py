"""How the results of a run are named and shown, whatever its task measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


# What the Trainer puts before the names of metrics, and what the splits are called
SPLITS = {"eval": "validation", "test": "test"}
# Figures of the evaluation itself
_NO_METRICS = ("runtime", "samples", "samples_per_second", "steps_per_second", "model_preparation_time")


def metric_names(results: Mapping[str, Any], split: str) -> list[str]:
    """Return the names of a task's metrics in a run's results, the loss left out.

    Args:
        results (`Mapping[str, Any]`): as the Trainer names them, such as "eval_macro_f1".
        split (`str`): "eval" or "test".
    """
    found = [name.removeprefix(f"{split}_") for name in results if name.startswith(f"{split}_")]
    return [name for name in found if name != "loss" and name not in _NO_METRICS]


@dataclass(frozen=True)
class Shown:
    """How a result is shown.

    Args:
        title (`str`): with the unit.
        scale (`float`): what values are multiplied by.
        digits (`int`): behind the decimal point.
    """

    title: str
    scale: float = 1.0
    digits: int = 1

    def text(self, value: float) -> str:
        """Return the value as text."""
        return f"{self.scale * value:,.{self.digits}f}"


_TITLES = {"trainable_parameters": Shown("trainable parameters", digits=0), "train_runtime": Shown("seconds")}


def shown(name: str, values: Iterable[float]) -> Shown:
    """Return how a result is shown: shares from 0 to 1 in percent, losses with three digits.

    Args:
        name (`str`): as the Trainer names it.
        values (`Iterable[float]`): all that are shown together.
    """
    if name in _TITLES:
        return _TITLES[name]
    split, _, metric = name.partition("_")
    title = f"{SPLITS[split]} {metric}" if split in SPLITS else name
    if "loss" in metric:
        return Shown(title, digits=3)
    is_share = all(0 <= value <= 1 for value in values)
    return Shown(f"{title} (%)", 100.0, 2) if is_share else Shown(title, digits=3)


def describe(settings: Mapping[str, Any]) -> str:
    """Return settings as one line: "learning_rate=0.001, weight_decay=0.0"."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as given"
