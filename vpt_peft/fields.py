"""Checks of the fields of a configuration."""

from __future__ import annotations

import dataclasses
import math
from textwrap import wrap
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints


# What `bias` may list
BIAS_PLACES = ("value", "output", "mlp", "norm")


T = TypeVar("T")


class FieldTypeError(TypeError, ValueError):
    """A field has a value of the wrong type; a `ValueError` too, as all other errors about fields are."""


def option(default: Any, help_text: str, **bounds: Any) -> Any:
    """A dataclass field with its help text and, for [`check_fields`], the bounds of its numbers."""
    return dataclasses.field(default=default, metadata={"help": help_text, **bounds})


def explain_fields(cls: type[T]) -> type[T]:
    """Class decorator: `help()` of a dataclass shows the help text, type and default of every field."""
    lines = []
    for each in dataclasses.fields(cls):  # type: ignore[arg-type]
        if each.init and "help" in each.metadata:
            default = f" (`{each.type}`, default {each.default!r}): "
            lines += wrap(
                each.name + default + each.metadata["help"], 112, initial_indent=" " * 8, subsequent_indent=" " * 12
            )
    before, mark, behind = (cls.__doc__ or "").partition("    Raises:")
    cls.__doc__ = before + "    Args:\n" + "\n".join(lines) + "\n\n" + mark + behind
    return cls


def check_fields(config: Any) -> None:
    """Check a dataclass's flags, choices and numbers against their type hints and the bounds in their metadata.

    Raises:
        TypeError: A field has a value of the wrong type.
        ValueError: A value is none of the choices, or out of bounds ("least", "most", "below").
    """
    hints = get_type_hints(type(config))
    for each in dataclasses.fields(config):
        name, value, hint = each.name, getattr(config, each.name), hints[each.name]
        options = [hint] if get_origin(hint) is Literal else [*get_args(hint), hint]
        if value is None and type(None) in options:
            continue
        bounds = {key: bound for key, bound in each.metadata.items() if key in ("least", "most", "below")}
        choices = next((get_args(option) for option in options if get_origin(option) is Literal), None)
        if choices is not None:
            check_choice(name, value, ((None,) if type(None) in options else ()) + choices)
        elif hint is bool:
            check_flag(name, value)
        elif hint is float:
            check_float(name, value, **bounds)
        elif bounds and int in options:
            is_list = isinstance(value, list) and any(get_origin(option) is list for option in options)
            for number in value if is_list else [value]:
                check_int(name, number, **bounds)


def refuse(*cases: tuple[Any, str], error: type[Exception] = ValueError) -> None:
    """Raise `error` with the message of the first case that holds."""
    for holds, message in cases:
        if holds:
            raise error(message)


def check_int(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise unless `value` is an integer in range; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldTypeError(f"{name}={value!r} must be an integer.")
    if value < least or (most is not None and value > most):
        limit = f" and at most {most:,}" if most is not None else ""
        raise ValueError(f"{name}={value} must be at least {least}{limit}.")


def check_length(name: str, value: Any, most: int) -> None:
    """Raise if `value` has more entries than `most`."""
    if len(value) > most:
        raise ValueError(f"{name} has {len(value):,} entries; at most {most:,} make sense.")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise FieldTypeError(f"{name}={value!r} must be True or False.")


def check_float(name: str, value: Any, least: float = -math.inf, below: float = math.inf) -> None:
    """Raise unless `value` is a finite number in [least, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldTypeError(f"{name}={value!r} must be a number.")
    if not math.isfinite(value) or not least <= value < below:
        raise ValueError(f"{name}={value} must be a finite number of at least {least} and below {below}.")
