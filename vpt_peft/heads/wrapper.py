"""One copy of a head for each adapter, chosen by the call that runs."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from vpt_peft.active import current_call

from .find import base_model, trained_modules
from .labels import LabelSwitch
from .mixed import run_mixed


class HeadWrapper(ModulesToSaveWrapper):
    """A head with one copy for each adapter.

    The call of the model says which copy runs, so that a switch in another thread takes effect with the next call.
    Outside of a call the active adapter's copy runs, as in PEFT.

    Args:
        module_to_save: The head.
        adapter_name: The first adapter.
    """

    def __init__(self, module_to_save: nn.Module, adapter_name: str) -> None:
        super().__init__(module_to_save, adapter_name)
        self.prompt_adapters: set[str] = set()
        self.labels: LabelSwitch | None = None

    @classmethod
    def take_over(cls, wrapper: ModulesToSaveWrapper) -> HeadWrapper:
        """PEFT's wrapper of another method, with all it holds, as a `HeadWrapper`."""
        wrapper.__class__ = cls
        wrapper.prompt_adapters, wrapper.labels = set(), None  # type: ignore[assignment]
        return wrapper  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the head of the call's adapter returns; in a mixed batch each image's own head, in order.

        Raises:
            ValueError: The outputs of a mixed batch cannot stand in one.
        """
        names, call = kwargs.pop("adapter_names", None), current_call()
        if names is None and call is not None:
            names = call.per_image
        if names is None or (call is None and self.disable_adapters):
            return self._running()(*args, **kwargs)
        heads = {name: self._copy_of(name) for name in dict.fromkeys(names)}
        return run_mixed(heads, names, args, kwargs, self.labels)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise
        call = current_call()
        mixed = call is not None and call.per_image is not None
        value = getattr(self.original_module if mixed else self._running(), name)
        if mixed and isinstance(value, (nn.Module, torch.Tensor, MethodType)):
            raise ValueError(
                f"adapter_names: {type(self.original_module).__name__}.{name} is read by the model itself, which cannot "
                "be done for each image; run each adapter's images in a batch of their own."
            )
        return value

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete an adapter's copy; see `ModulesToSaveWrapper.delete_adapter`."""
        super().delete_adapter(adapter_name, new_active_adapters)
        self.prompt_adapters.discard(adapter_name)

    def _copy_of(self, name: str) -> nn.Module:
        """An adapter's copy, as it was when the call began; the original where there is none."""
        call = current_call()
        if call is not None and call.heads and (id(self), name) in call.heads:
            return call.heads[id(self), name]
        return self.modules_to_save[name] if name in self.modules_to_save else self.original_module

    def _running(self) -> nn.Module:
        """The copy that runs, the original without an adapter that has one."""
        call = current_call()
        active = [] if self.disable_adapters else self.active_adapters
        # Another method on this model may have made its own copy the active one
        if call is not None and self.prompt_adapters.issuperset(active):
            active = list(call.names)
        copies = (self._copy_of(name) for name in active)
        return next((copy for copy in copies if copy is not self.original_module), self.original_module)


def wrap_heads(
    model: nn.Module,
    paths: list[str],
    adapter_name: str,
    *,
    active: bool,
    inference_mode: bool,
    labels: LabelSwitch | None = None,
) -> list[HeadWrapper]:
    """Give an adapter a copy of each head. Which other adapters' copies train stays as it is.

    Args:
        model: The model, or a PEFT model around it.
        paths: Dotted paths of the heads from the model that PEFT's model is around.
        adapter_name: The adapter.
        active: The adapter is among the active ones.
        inference_mode: Its copies do not train.
        labels: The model's, which tell a mixed batch scores of classes from other values.

    Returns:
        The wrappers, in the order of `paths`.

    Raises:
        ValueError: A head stands in another one, or holds one, that an adapter trains; nothing is changed then.
    """
    root = base_model(model)
    wrapped = [path for path, module in root.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for path in paths:
        for other in dict.fromkeys([*wrapped, *paths]):
            inner, outer = (path, other) if path.startswith(f"{other}.") else (other, path)
            if inner.startswith(f"{outer}."):
                raise ValueError(
                    f"modules_to_save: {inner} is in {outer}, and both are to train; name {outer} alone for all adapters."
                )
    wrappers = []
    for path in paths:
        module = root.get_submodule(path)
        if isinstance(module, ModulesToSaveWrapper):
            wrapper = module if isinstance(module, HeadWrapper) else HeadWrapper.take_over(module)
            wrapper.update(adapter_name)
            if active:
                wrapper.set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            wrapper = HeadWrapper(module, adapter_name)
            wrapper.set_adapter(adapter_name if active else [], inference_mode=inference_mode)
            _replace(root, module, wrapper)
        wrapper.prompt_adapters.add(adapter_name)
        wrapper.labels = labels
        wrappers.append(wrapper)
    return wrappers


def unwrap_heads(model: nn.Module, use_original: bool = False, only_empty: bool = False) -> None:
    """Put heads back in the place of their wrappers: the active adapter's copy, or the original without one.

    Args:
        model: The model, or a PEFT model around it.
        use_original: Put the originals back, whatever is active.
        only_empty: Leave wrappers in which an adapter has a copy.
    """
    root = base_model(model)
    for wrapper in list(trained_modules(root)):
        if isinstance(wrapper, HeadWrapper) and not (only_empty and len(wrapper.modules_to_save)):
            _replace(root, wrapper, wrapper.original_module if use_original else wrapper._running())


def _replace(root: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put `other` in all places of `module`: some models use one head in several."""
    for parent in list(root.modules()):
        if parent is not other:
            for name, child in parent._modules.items():
                if child is module:
                    parent._modules[name] = other
