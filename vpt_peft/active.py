"""Which adapters one call of the model runs with: noted when the model is entered, for the thread that entered it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


BASE = "__base__"


@dataclass(frozen=True)
class Call:
    """The adapters of one call of the model.

    Args:
        names: Active adapters, in a mixed batch those of its images; empty while adapters are disabled.
        per_image: One name per image of a mixed batch, "__base__" for none; `None` where all images share `names`.
        owner: What the adapters belong to.
        adapters: The adapters by name, as they were when the call began.
        heads: Their copies of heads by the wrapper's `id` and adapter name, likewise.
        before: The call that this one stands in, of another model.
    """

    names: tuple[str, ...]
    per_image: tuple[str, ...] | None = None
    owner: Any = None
    adapters: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[tuple[int, str], Any] = field(default_factory=dict)
    before: Call | None = None


class _Local(threading.local):
    call: Call | None = None
    per_image: tuple[str, ...] | None = None
    asked: Any = None


_local = _Local()


def current_call() -> Call | None:
    """The call of a model that runs in this thread; `None` outside of one."""
    return _local.call


def enter_call(call: Call) -> None:
    """Note that a call begins in this thread."""
    _local.call = call


def leave_call() -> None:
    """Note that the call in this thread has ended."""
    _local.call = None if _local.call is None else _local.call.before


def requested_names(owner: Any) -> tuple[str, ...] | None:
    """The adapter of each image that the caller of this thread asked a model's owner for, `None` outside of a mixed batch."""
    return _local.per_image if _local.asked is owner else None


@contextmanager
def mixed_batch(names: tuple[str, ...], owner: Any) -> Iterator[None]:
    """Calls in this thread of the model that `owner` belongs to run with one adapter per image."""
    before = _local.per_image, _local.asked
    _local.per_image, _local.asked = names, owner
    try:
        yield
    finally:
        _local.per_image, _local.asked = before
