"""Parameters: everything that trains and is saved, of all adapters on one encoder, under block indices."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from vpt_peft.active import Call, current_call, enter_call, leave_call
from vpt_peft.encoder import EncoderSpec, submodule
from vpt_peft.encoder.quantized import allow_packing, forbid_packing
from vpt_peft.heads import HeadWrapper, LabelSwitch, trained_modules

from . import biases
from .adapter import PromptAdapter
from .config import VPTConfig
from .forward_pass import ForwardPass
from .hooks import attach_hooks, forget_owner
from .layer import PromptTunerLayer, VPTLayer
from .layout import Layout, make_layout
from .mixed import MixedBatch
from .modes import checkpointed_modules, release_checkpointed


# Held while adapters change, so that a call that begins meanwhile sees them before or after
_changes = threading.RLock()


class VPTParameters(nn.Module, PromptTunerLayer):
    """The parameters of all adapters on one encoder, a child of the model that the encoder stands in.

    Containers are named after the method and the part (`vpt_prompts`, `gated_prompt_gates`, ...) and hold one entry per
    adapter, whose children are named by block index, so that an adapter file holds no path into the encoder.

    Args:
        spec: The encoder.
        encoder: The encoder module.
        root: The model it stands in.
        read: For each block whether anything reads its output; `None`: all are read.
    """

    other_param_names = ("configs", "layouts", "classes", "heads")
    encoder: nn.Module
    root: nn.Module

    def __init__(
        self, spec: EncoderSpec, encoder: nn.Module, root: nn.Module, read: tuple[bool, ...] | None = None
    ) -> None:
        super().__init__()
        self.spec, self.read = spec, read
        # Not by setattr, which would register them as submodules
        self.__dict__.update(encoder=encoder, root=root)
        self.interpolates = "interpolate_pos_encoding" in signature(encoder.forward).parameters
        self.layers: tuple[VPTLayer, ...] = ()
        self.adapter_layer_names: tuple[str, ...] = ()
        self.configs: dict[str, VPTConfig] = {}
        self.layouts: dict[str, Layout] = {}
        self.classes: dict[str, type[PromptAdapter]] = {}
        self.heads: dict[str, list[str]] = {}
        self.labels = LabelSwitch(root)
        self.wrappers: tuple[HeadWrapper, ...] = ()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._handles: list[Any] = []
        self._unpacked: tuple[nn.Module, ...] = ()
        self.checkpointed: tuple[nn.Module, ...] = ()

    def encode(self, pixel_values: torch.Tensor) -> None:
        """Run the encoder, with its positions interpolated to images of another size than its own."""
        other_size = tuple(pixel_values.shape[-2:]) != self.spec.image_size
        self.encoder(pixel_values, **({"interpolate_pos_encoding": True} if self.interpolates and other_size else {}))

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Adapters with merged keys and values in some block."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.merged_adapters))

    def attach(self) -> None:
        """Put a tuner layer into each block and register the hooks of the encoder."""
        layers = []
        for index, block_spec in enumerate(self.spec.blocks):
            block = submodule(self.encoder, block_spec.path)
            layer = VPTLayer(index, block_spec, block, self)
            block.prompt_tuner = layer
            layer.attach()
            layers.append(layer)
        self.layers = tuple(layers)
        self.root.prompt_tuner = self
        self._handles = attach_hooks(self)
        self._unpacked = tuple(forbid_packing(self.root))
        self.checkpointed = checkpointed_modules(self.encoder)

    def detach(self) -> None:
        """Take every hook and tuner layer out of the model."""
        allow_packing(self._unpacked)
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            layer.detach()
            del layer.block.prompt_tuner
        del self.root.prompt_tuner
        forget_owner(self)
        biases.detach_offsets(self)
        release_checkpointed(self.checkpointed)

    def head_modules(self) -> list[nn.Module]:
        """The heads of all adapters and what is in them."""
        paths = dict.fromkeys(path for heads in self.heads.values() for path in heads)
        return [module for path in paths for module in submodule(self.root, path).modules()]

    def find_wrappers(self) -> tuple[HeadWrapper, ...]:
        """The wrappers of heads, by a walk through the model."""
        return tuple(wrapper for wrapper in trained_modules(self.root) if isinstance(wrapper, HeadWrapper))

    def update_layer(
        self, name: str, config: VPTConfig, cls: type[PromptAdapter] = PromptAdapter, heads: Iterable[str] = ()
    ) -> None:
        """Make everything trainable of adapter `name`, on the device and in the dtype of the encoder.

        An adapter of that name that is there already is replaced.

        Args:
            name: The adapter.
            config: Its configuration.
            cls: What a forward pass uses it as.
            heads: Dotted paths of its heads from the root.
        """
        device, dtype = self.device_and_dtype()
        layout = make_layout(config, self.spec, self.read)
        if name in self.configs:
            self.take(name)
        self.heads[name] = list(heads)
        parts = cls.make_parts(self, config, layout, {"device": device, "dtype": dtype})
        with _changes:
            for part, module in parts.items():
                container = cls.prefix + part
                if container not in self.adapter_layer_names:
                    self.add_module(container, nn.ModuleDict())
                    self.adapter_layer_names += (container,)
                getattr(self, container)[name] = module
            self.configs[name], self.layouts[name], self.classes[name] = config, layout, cls
            for layer, block in zip(self.layers, layout, strict=True):
                layer.add(name, block, config)
        if "biases" in parts:
            biases.attach_offsets(self, config.bias)

    def take(self, name: str) -> list[tuple[Any, str, Any]]:
        """Take adapter `name` out, whether it is active or not, and return what [`put_back`] needs."""
        taken = []
        with _changes:
            if self.labels.active == name:
                self.labels.use(None)
            kept: list[Any] = [
                getattr(layer, attribute)
                for layer in (self, *self.layers)
                for attribute in (*layer.adapter_layer_names, *layer.other_param_names)
            ]
            for wrapper in self.find_wrappers():
                kept.append(wrapper.modules_to_save)
                if name in wrapper.modules_to_save:
                    wrapper._adapters.discard(name)
                    if name in wrapper.active_adapters:
                        wrapper._active_adapter = []
            for entries in (*kept, self.labels.of_adapters):
                if name in entries:
                    taken.append((entries, name, entries[name]))
                    del entries[name]
        return taken

    def put_back(self, taken: Iterable[tuple[Any, str, Any]] | None) -> None:
        """Put an adapter back that [`take`] has taken out."""
        for entries, name, entry in taken or ():
            entries[name] = entry
        for wrapper in self.find_wrappers():
            back = [name for name in self.active_adapters if name in wrapper.modules_to_save]
            wrapper._adapters.update(wrapper.modules_to_save)
            wrapper._active_adapter = wrapper._active_adapter or back[:1]
        self._use_labels()

    def note_found(self, name: str) -> None:
        """Write what was found in this model into the configuration of adapter `name`: its heads and their labels."""
        labels = self.labels.of(name)
        self.configs[name].note_found(modules_to_save=list(self.heads[name]))
        if labels is not None and self.heads[name]:
            self.configs[name].note_found(id2label=labels.id2label)

    def _use_labels(self) -> None:
        """Give the model the labels of the active adapter."""
        names = [] if self._disable_adapters else self.active_adapters
        self.labels.use(next((name for name in names if name in self.configs), None))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; see `BaseTunerLayer.set_adapter`."""
        with _changes:
            super().set_adapter(adapter_names, inference_mode)
            self._use_labels()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; see `BaseTunerLayer.enable_adapters`."""
        with _changes:
            super().enable_adapters(enabled)
            self._use_labels()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see `BaseTunerLayer.delete_adapter`."""
        with _changes:
            self.labels.remove(adapter_name)
            super().delete_adapter(adapter_name)
            self._use_labels()

    def adapter(self, name: str) -> PromptAdapter:
        """One adapter with the modules it has at this moment."""
        cls = self.classes[name]
        parts = {}
        for container in self.adapter_layer_names:
            entry = self._modules[container]._modules.get(name)  # type: ignore[union-attr]
            if entry is not None:
                parts[container.removeprefix(cls.prefix)] = entry
        return cls(self, name, self.configs[name], self.layouts[name], parts)

    def active_names(self) -> list[str]:
        """Active adapters; none while adapters are disabled."""
        return [] if self._disable_adapters else [name for name in self.active_adapters if name in self.configs]

    @contextmanager
    def call(self, names: Iterable[str]) -> Iterator[None]:
        """A call of the model with these adapters, whatever is active."""
        self.begin_call(names)
        try:
            yield
        finally:
            leave_call()

    def begin_call(self, names: Iterable[str] | None = None, per_image: tuple[str, ...] | None = None) -> None:
        """A call of the model begins in this thread; it keeps these adapters, by default the active ones, as they are."""
        is_compiling = torch.compiler.is_compiling()
        with nullcontext() if is_compiling else _changes:
            names = self.active_names() if names is None else names
            adapters = {name: self.adapter(name) for name in names if name in self.configs}
            heads: dict[tuple[int, str], nn.Module] = {}
            for wrapper in () if is_compiling else self.wrappers:
                copies = wrapper.modules_to_save
                heads |= {(id(wrapper), name): copies[name] for name in adapters if name in copies}
        before = current_call()
        before = before if before is not None and before.owner is not self else None
        enter_call(Call(tuple(adapters), per_image, self, adapters, heads, before))

    def begin_pass(self, checkpointing: bool = False, reentrant: bool = False) -> ForwardPass:
        """A forward pass with the adapters of the call of the model that runs in this thread, or else the active ones."""
        call = current_call()
        if call is None or call.owner is not self:
            return ForwardPass(self, [self.adapter(n) for n in self.active_names()], None, checkpointing, reentrant)
        mixed = None if call.per_image is None else MixedBatch(call.per_image)
        return ForwardPass(self, list(call.adapters.values()), mixed, checkpointing, reentrant)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, named as in `named_parameters()`."""
        return {
            f"{container}.{name}.{key}": parameter
            for container in self.adapter_layer_names
            if name in getattr(self, container)
            for key, parameter in getattr(self, container)[name].named_parameters()
        }

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the encoder's first floating-point parameter lives; quantised weights are integers and are passed over."""
        for path, parameter in self.encoder.named_parameters():
            if parameter.is_floating_point() and "prompt_tuner" not in path:
                return parameter.device, parameter.dtype
        return torch.device("cpu"), torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Loaded values keep their dtype: through that of a half-precision encoder they would lose digits.
        target, _ = self.device_and_dtype()
        for container in self.adapter_layer_names:
            entries = getattr(self, container)
            if adapter_name in entries and not any(p.is_meta for p in entries[adapter_name].parameters()):
                entries[adapter_name].to(device or target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.configs)})"


def find_parameters(model: nn.Module) -> VPTParameters | None:
    """The prompt parameters inside `model`, if prompts are attached."""
    root: Any = model
    while isinstance(root, PeftModel | BaseTuner):
        root = root.base_model if isinstance(root, PeftModel) else root.model
    parameters = root._modules.get("prompt_tuner")
    if isinstance(parameters, VPTParameters):
        return parameters
    return next((module for module in model.modules() if isinstance(module, VPTParameters)), None)
