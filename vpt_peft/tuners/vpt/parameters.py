"""Parameters: everything that trains and is saved, of all adapters on one encoder, under block indices."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

from . import biases, pixels
from .config import VPTConfig
from .forward_pass import ForwardPass
from .hooks import attach_model, detach_model
from .layer import PromptTunerLayer, VPTLayer
from .layout import Layout, make_layout, own_blocks
from .mixed import MixedBatch
from .modes import checkpointed_modules, release_checkpointed
from .parameter_set import ParameterSet
from .pooling import attach_pooling, detach_pooling


# Held while adapters change, so that a call that begins meanwhile sees them before or after
_changes = threading.RLock()


class PromptAdapter:
    """One adapter as a forward pass uses it: its configuration, its layout and its parameters.

    Args:
        parameters: The parameters of all adapters on the encoder.
        name: The adapter's name.
        config: Its configuration.
        layout: What each block does for it.
        parts: Its modules by the name of the part ("prompts", "projection", ...).
    """

    prefix = "vpt_"
    part_names: tuple[str, ...] = ("prompts", "projection", "patch_embedding", "biases")

    def __init__(
        self, parameters: VPTParameters, name: str, config: VPTConfig, layout: Layout, parts: dict[str, nn.Module]
    ) -> None:
        self.parameters, self.name, self.config, self.layout, self.parts = parameters, name, config, layout, parts

    @classmethod
    def make_parts(
        cls, parameters: VPTParameters, config: Any, layout: Layout, like: dict[str, Any]
    ) -> dict[str, nn.Module]:
        """Everything that trains, with its initial values.

        Args:
            parameters: The parameters of all adapters on the encoder.
            config: The configuration.
            layout: What each block does.
            like: Keyword arguments of new tensors, their device and dtype.
        """
        parts: dict[str, nn.Module] = {}
        if config.prompt_location in ("pad", "channel"):
            parts["prompts"] = pixels.make_prompts(parameters, config, like)
        else:
            parts["prompts"] = _make_prompts(parameters, config, layout, like)
        if config.prompt_location == "channel":
            parts["patch_embedding"] = pixels.make_patch_embedding(parameters, config, like)
        if config.projection_dim or config.project_patches:
            parts["projection"] = _make_projection(parameters, config, layout, like)
        if config.bias != "none":
            parts["biases"] = biases.make_offsets(parameters, config, like)
        return parts

    def begin(self) -> None:
        """Called before a training pass of the encoder."""

    def prompts(self, key: str | None, batch: int) -> torch.Tensor:
        """Own prompts of a block, projected and with dropout drawn per image: `(1, prompts, width)`, or `(batch, ...)`."""
        config = self.config
        prompts = self.parts["prompts"](key)
        if config.prompt_location == "prepend_pixel":
            prompts = pixels.embed_strip(self.parameters, prompts)
        projection = self.parts.get("projection")
        if projection is not None and (config.projection_dim or key == str(own_blocks(self.layout)[0])):
            prompts = projection(prompts)
        prompts = prompts.unsqueeze(0)
        if config.prompt_dropout > 0.0 and self.parameters.training:
            prompts = nn.functional.dropout(prompts.expand(batch, -1, -1), config.prompt_dropout, True)
        return prompts

    def pass_on(self, index: int, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """What goes on to the next block, from block `index`'s input and output prompts `(batch, prompts, width)`."""
        return left

    def temperature(self, index: int) -> torch.Tensor | None:
        """The attention temperature of one block, a tensor of one element; `None` without."""
        return None

    def sources(self) -> list[torch.Tensor]:
        """The parameters that keys and values are made of."""
        kept = ("prompts", "projection", "biases")
        return [p for part in kept if part in self.parts for p in self.parts[part].parameters()]


def _make_prompts(parameters: VPTParameters, config: VPTConfig, layout: Layout, like: dict[str, Any]) -> ParameterSet:
    shapes: dict[str, tuple[int, ...]] = {}
    bounds: dict[str, float] = {}
    for index in own_blocks(layout):
        block, key = parameters.spec.blocks[index], str(index)
        width = config.projection_dim or block.width
        count = {"add": block.tokens, "add_shared": 1}.get(config.prompt_location, config.num_virtual_tokens)
        as_pixels = config.prompt_location == "prepend_pixel"
        shapes[key] = pixels.strip_shape(parameters, config) if as_pixels else (count, width)
        bounds[key] = math.sqrt(6.0 / (parameters.patch_values() + width))
    prompts = ParameterSet(shapes, **like)
    prompts.reset_parameters(config.init_prompts if config.init_weights else "unit_normal", bounds)
    return prompts


def _make_projection(parameters: VPTParameters, config: VPTConfig, layout: Layout, like: dict[str, Any]) -> nn.Linear:
    width = parameters.spec.blocks[own_blocks(layout)[0]].width
    projection = nn.Linear(config.projection_dim or width, width, **like)
    if not projection.weight.is_meta:
        nn.init.zeros_(projection.bias)
        if config.project_patches:
            # The identity leaves the frozen backbone's patch tokens as they are at the start.
            nn.init.eye_(projection.weight)
        else:
            nn.init.kaiming_normal_(projection.weight, mode="fan_out")
    return projection


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

    other_param_names = ("configs", "layouts", "classes", "heads", "_drawn")

    def __init__(
        self, spec: EncoderSpec, encoder: nn.Module, root: nn.Module, read: tuple[bool, ...] | None = None
    ) -> None:
        super().__init__()
        self.spec, self.read = spec, read
        # In a tuple, so that they are not registered as submodules.
        self._modules_around = (encoder, root)
        self.interpolates = "interpolate_pos_encoding" in signature(encoder.forward).parameters
        self.layers: tuple[VPTLayer, ...] = ()
        self.adapter_layer_names: tuple[str, ...] = ()
        self.configs: dict[str, VPTConfig] = {}
        self.layouts: dict[str, Layout] = {}
        self.classes: dict[str, type[PromptAdapter]] = {}
        self.heads: dict[str, list[str]] = {}
        self.labels = LabelSwitch(root)
        self.wrappers: tuple[HeadWrapper, ...] = ()
        # Changes in place that each adapter's parameters had seen when they were made
        self._drawn: dict[str, int] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._handles: list[Any] = []
        self._unpacked: tuple[nn.Module, ...] = ()
        self.checkpointed: tuple[nn.Module, ...] = ()

    @property
    def encoder(self) -> nn.Module:
        return self._modules_around[0]

    @property
    def root(self) -> nn.Module:
        return self._modules_around[1]

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
        self._handles = attach_model(self)
        self._handles += pixels.attach_patch_embedding(self)
        self._handles += attach_pooling(self)
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
        detach_model(self)
        pixels.detach_patch_embedding(self)
        detach_pooling(self)
        biases.detach_offsets(self)
        release_checkpointed(self.checkpointed)

    def _container(self, name: str) -> Any:
        if name not in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
            self.adapter_layer_names += (name,)
        return getattr(self, name)

    def head_modules(self) -> list[nn.Module]:
        """The heads of all adapters and what is in them."""
        paths = dict.fromkeys(path for heads in self.heads.values() for path in heads)
        return [module for path in paths for module in submodule(self.root, path).modules()]

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
                self._container(cls.prefix + part)[name] = module
            self.configs[name], self.layouts[name], self.classes[name] = config, layout, cls
            for layer, block in zip(self.layers, layout, strict=True):
                layer.add(name, block, config)
        if "biases" in parts:
            biases.attach_offsets(self, config.bias)
        self._drawn[name] = self._count_changes(name)

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
            wrappers = [wrapper for wrapper in trained_modules(self.root) if isinstance(wrapper, HeadWrapper)]
            for wrapper in wrappers:
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
        for wrapper in trained_modules(self.root):
            if isinstance(wrapper, HeadWrapper):
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
    def call(self, names: Iterable[str], per_image: tuple[str, ...] | None = None) -> Iterator[None]:
        """A call of the model with these adapters, whatever is active."""
        self.begin_call(names, per_image)
        try:
            yield
        finally:
            leave_call()

    def begin_call(self, names: Iterable[str] | None = None, per_image: tuple[str, ...] | None = None) -> None:
        """A call of the model begins in this thread; it keeps these adapters, by default the active ones, as they are."""
        if torch.compiler.is_compiling():
            self._begin_call(names, per_image)
        else:
            with _changes:
                self._begin_call(names, per_image)

    def _begin_call(self, names: Iterable[str] | None, per_image: tuple[str, ...] | None) -> None:
        names = self.active_names() if names is None else names
        adapters = {name: self.adapter(name) for name in names if name in self.configs}
        before = current_call()
        before = before if before is not None and before.owner is not self else None
        heads: dict[tuple[int, str], nn.Module] = {}
        for wrapper in () if torch.compiler.is_compiling() else self.wrappers:
            for name in adapters:
                if name in wrapper.modules_to_save:
                    heads[id(wrapper), name] = wrapper.modules_to_save[name]
        enter_call(Call(tuple(adapters), per_image, self, adapters, heads, before))

    def begin_pass(self, checkpointing: bool = False, reentrant: bool = False) -> ForwardPass:
        """A forward pass with the adapters of the call of the model that runs in this thread, or else the active ones."""
        call = current_call()
        if call is None or call.owner is not self:
            return ForwardPass(self, [self.adapter(n) for n in self.active_names()], None, checkpointing, reentrant)
        adapters: list[Any] = [call.adapters[name] for name in call.names if name in call.adapters]
        mixed = None if call.per_image is None else MixedBatch(call.per_image)
        return ForwardPass(self, adapters, mixed, checkpointing, reentrant)

    def _count_changes(self, name: str) -> int:
        return sum(parameter._version for parameter in self.parameters_of(name).values())

    def is_as_drawn(self, name: str) -> bool:
        """Whether no value of an adapter has changed since `update_layer` made it."""
        return self._drawn.get(name) == self._count_changes(name)

    def patch_values(self) -> int:
        """Number of pixel values in one patch (channels · height · width), for the prompts' initial scale."""
        if self.spec.patch_embedding is None:
            return 3 * 16 * 16
        convolution: Any = submodule(self.encoder, self.spec.patch_embedding)
        return 3 * math.prod(convolution.kernel_size[-2:])

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
        for parameter in self._own_parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return torch.device("cpu"), torch.float32

    def _own_parameters(self) -> Iterable[torch.Tensor]:
        for path, parameter in self.encoder.named_parameters():
            if "prompt_tuner" not in path:
                yield parameter

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
