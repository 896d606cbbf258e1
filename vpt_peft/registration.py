"""Make the methods known to PEFT, which keeps its methods in a closed enumeration."""

from __future__ import annotations

from peft import mapping
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .enumeration import add_member


def add_peft_type(name: str) -> PeftType:
    """Add a member `name` with the value `name` to `PeftType`; a member that is there already is returned as it is.

    PEFT looks methods up by the string in `adapter_config.json`, so name and value have to be the same.

    Raises:
        RuntimeError: This Python's `enum` cannot be extended this way.
    """
    return add_member(PeftType, name)


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
