"""Flags with several values: the axes of a comparison or a sweep."""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..training.arguments import FlagParser, as_tokens, train_parser


_SINGLE = ("task", "output_dir", "token", "hub_token", "metric_for_best_model")
# Take one number per block where a run stands alone; here each number is a value of its own
_NUMBERS = ("num_virtual_tokens",)
_REFUSED = {
    "push_to_hub": "push the adapter you choose with `vpt-peft push`",
    "overwrite_output_dir": "delete the folder of a run to repeat it",
    "resume_from_checkpoint": "the same command continues by itself where it was interrupted",
    "train_on_validation": "what was chosen is trained on the validation images by itself",
    "early_stopping_patience": "list numbers of epochs (--num_train_epochs), as the last weights count",
    "load_best_model_at_end": "the last weights count, as nothing is left to choose others by in the end",
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, on a logarithmic scale unless `low` is 0 or less; typed as "1e-4:1e-1"."""

    low: float
    high: float
    whole: bool

    @property
    def first(self) -> float:
        """The lower end, as the flag's type."""
        return int(self.low) if self.whole else self.low

    def __str__(self) -> str:
        return f"{self.low:g}:{self.high:g}"


@dataclass(frozen=True)
class Grid:
    """What all runs share, and the values of the flags in which they differ.

    Args:
        common (`dict[str, Any]`): flags with one value.
        axes (`dict[str, list | Range]`): flags with several values.
        seeds (`list[int]`): every trial is run once with each.
        own (`dict[str, Any]`): the command's own options.
    """

    common: dict[str, Any]
    axes: dict[str, list | Range]
    seeds: list[int]
    own: dict[str, Any]

    def combinations(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return all combinations of the values of some axes, none of which is a range."""
        choices = [list(self.axes[name]) for name in names]  # type: ignore[arg-type]
        return [dict(zip(names, values, strict=True)) for values in product(*choices)]

    @property
    def output_dir(self) -> Path:
        """The folder of all runs."""
        return Path(self.common.get("output_dir", "vpt-output"))


def make_parser(prog: str, description: str) -> FlagParser:
    """Return the parser of a training run, where flags of one value take several; commands add their own options."""
    parser = train_parser(prog).without_defaults()
    parser.description = description
    for action in parser._actions:
        if action.option_strings and (action.nargs in (None, "?") or action.dest in _NUMBERS):
            action.nargs = "*" if action.nargs == "?" else "+"
            if action.type in (int, float):
                action.type = functools.partial(_number_or_range, action.type)
    return parser


def parse_grid(parser: FlagParser, argv: Sequence[str]) -> Grid:
    """Sort flags (or the values of a .json/.yaml file) into what is common and what varies.

    Raises:
        ValueError: an unknown flag, a value of the wrong type, or a flag that cannot be used here.
    """
    given = vars(parser.parse_args(as_tokens(argv)))
    actions = {action.dest: action for action in train_parser(parser.prog)._actions}
    own = {name: given.pop(name) for name in list(given) if name not in actions}
    common: dict[str, Any] = {}
    axes: dict[str, list | Range] = {}
    for name, values in given.items():
        if name in _REFUSED:
            raise ValueError(f"{name} cannot be used here; {_REFUSED[name]}.")
        if actions[name].nargs not in (None, "?") and name not in _NUMBERS:
            common[name] = values
            continue
        distinct = list(dict.fromkeys(values)) or [actions[name].const]
        if any(isinstance(value, Range) for value in distinct):
            if len(distinct) > 1:
                raise ValueError(f"{name} has a range and other values; give one range, or a list.")
            axes[name] = distinct[0]
        elif len(distinct) == 1:
            common[name] = distinct[0]
        elif name in _SINGLE:
            raise ValueError(f"{name} has {len(distinct)} values; give one.")
        else:
            axes[name] = distinct
    seeds = axes.pop("seed", None) or [common.pop("seed", 42)]
    if isinstance(seeds, Range):
        raise ValueError(f"seed={seeds} is a range; list the seeds.")
    return Grid(common, axes, seeds, own)


def _number_or_range(number: type, text: str) -> Any:
    low, colon, high = text.partition(":")
    if not colon:
        return number(text)
    found = Range(float(number(low)), float(number(high)), number is int)
    if not found.low < found.high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range; the first number must be below the second")
    return found


def folder_name(settings: Mapping[str, Any]) -> str:
    """Return a file name made of the settings; see `safe_name`."""
    return safe_name(",".join(f"{name}={value}" for name, value in settings.items()) or "default")


def safe_name(text: str) -> str:
    """Return a text as a file name; a hash is added where it had to be shortened or cleaned."""
    safe = re.sub(r"[^\w.,=+-]", "_", text)[:120]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
