"""Make the methods known to PEFT, which keeps its methods in a closed enumeration."""

from __future__ import annotations

from typing import Any

from peft import mapping
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def add_peft_type(name: str) -> PeftType:
    """Add a member `name` with the value `name` to `PeftType`; a member that is there already is returned as it is.

    PEFT looks methods up by the string in `adapter_config.json`, so name and value have to be the same.

    Raises:
        RuntimeError: This Python's `enum` cannot be extended this way.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or PeftType[name] is not member or name not in list(PeftType):
        raise RuntimeError(f"PeftType could not be extended by {name} on this Python; please report it.")
    return member


def register_method(name: str, config_cls: type, model_cls: type) -> None:
    """Register a method with PEFT under `name`; doing it again is harmless.

    Raises:
        ImportError: PEFT has a method of this name that is not this package's.
    """
    member = add_peft_type(name.upper())
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    elif known.__module__ != config_cls.__module__:
        raise ImportError(
            f"PEFT already has a method {name.upper()!r} ({known.__module__}.{known.__qualname__}), so vpt_peft cannot "
            "register its own under that name. Uninstall vpt_peft to use PEFT's, or install an earlier PEFT."
        )
    else:
        for table, cls in (
            (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
            (mapping.PEFT_TYPE_TO_TUNER_MAPPING, model_cls),
        ):
            table[member] = cls
