"""A member more in an enumeration that is closed; of the standard library alone."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar


E = TypeVar("E", bound=Enum)


def add_member(enumeration: type[E], name: str) -> E:
    """Add a member `name` with the value `name` to an enumeration of strings; one that is there already is returned.

    Raises:
        RuntimeError: This Python's `enum` cannot be extended this way.
    """
    known: Any = enumeration
    if name in known.__members__:
        return known[name]
    member: Any = str.__new__(known, name)
    member._name_ = member._value_ = name
    member.__objclass__ = known
    member._sort_order_ = len(known.__members__)
    known._member_names_.append(name)
    known._member_map_[name] = member
    known._value2member_map_[name] = member
    type.__setattr__(known, name, member)
    if known(name) is not member or known[name] is not member or name not in list(known):
        raise RuntimeError(f"{enumeration.__name__} could not be extended by {name} on this Python; please report it.")
    return member
