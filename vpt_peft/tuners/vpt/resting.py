"""Adapters that are not concerned are set aside while PEFT adds, loads or switches one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .store import VPTPromptStore, find_store


@contextmanager
def set_others_aside(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Take the prompts and heads of all frozen adapters but `names` out of the module tree for a while.

    PEFT walks every module and parameter of the model for each of its steps. With many adapters on one backbone the
    walk through those that are not concerned is all that takes time.
    """
    aside: list[tuple[nn.ModuleDict, dict[str, Any], dict[str, Any]]] = []
    try:
        for container in _containers(model):
            everything: dict[str, Any] = container._modules
            stay = {name: entry for name, entry in everything.items() if name in names or _is_trainable(entry)}
            if len(stay) < len(everything):
                aside.append((container, everything, stay))
                container._modules = dict(stay)
        yield
    finally:
        for container, everything, stay in aside:
            for name in stay.keys() - container._modules.keys():
                del everything[name]
            everything.update(container._modules)
            container._modules = everything


def _containers(model: nn.Module) -> Iterator[nn.ModuleDict]:
    """What holds an entry per adapter; the prompts come first, as the search for heads walks through them."""
    store = find_store(model)
    if store is not None:
        yield from (getattr(store, name) for name in VPTPromptStore.adapter_layer_names)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                yield module.modules_to_save


def _is_trainable(entry: nn.Module | None) -> bool:
    """Whether any parameter of an adapter's entry is. Plain loops, since this is asked for each of many adapters."""
    if entry is None:
        return False
    for parameter in entry._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    return any(_is_trainable(child) for child in entry._modules.values())
