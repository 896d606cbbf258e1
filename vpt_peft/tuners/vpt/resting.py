"""Adapters that are not concerned are set aside while PEFT adds, loads or switches one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from vpt_peft.heads import trained_modules

from .store import PREFIXES, VPTPromptStore, find_store


@contextmanager
def set_others_aside(model: nn.Module, names: Collection[str], trainable: bool = True) -> Iterator[None]:
    """Take the prompts and heads of all adapters but `names` and the active ones out of the module tree for a while.

    PEFT walks every module and parameter of the model for each of its steps. With many adapters on one backbone the
    walk through those that are not concerned is all that takes time. A forward pass in another thread would miss them.

    Args:
        model: The model.
        names: The adapters that are concerned.
        trainable: Trainable ones go too; otherwise they stay, where PEFT is going to freeze them.
    """
    stay_always = {*names} if trainable else {*names, *_trainable_adapters(model)}
    aside: list[tuple[nn.ModuleDict, dict[str, Any], dict[str, Any]]] = []
    try:
        for container, active in _containers(model):
            everything: dict[str, Any] = container._modules
            concerned = stay_always.union(active)
            stay = {name: entry for name, entry in everything.items() if name in concerned}
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


def _containers(model: nn.Module) -> Iterator[tuple[nn.ModuleDict, list[str]]]:
    """What holds an entry per adapter, and which of them are active.

    Heads know for themselves who is active: a tuner that is new on the model does not know of the others' yet.
    """
    store = find_store(model)
    if store is not None:
        yield from ((getattr(store, name), store.active_adapters) for name in VPTPromptStore.adapter_layer_names)
        for wrapper in trained_modules(model):
            if isinstance(wrapper, ModulesToSaveWrapper):
                yield wrapper.modules_to_save, wrapper.active_adapters


def _trainable_adapters(model: nn.Module) -> Iterator[str]:
    """The adapters that train. PEFT frees and freezes them as a whole, so the first and last prompts tell for all.

    Asked for each of many adapters: looking at every parameter would take longer than all the rest.
    """
    store: Any = find_store(model)
    for container in () if store is None else [getattr(store, f"{prefix}prompts") for prefix in PREFIXES]:
        for name, prompts in container._modules.items():
            for values in (prompts._parameters.values(), reversed(prompts._parameters.values())):
                end = next(iter(values), None)
                # Wrappers of sharding frameworks hold no parameters of their own, and stay
                if end is None or end.requires_grad:
                    yield name
                    break
