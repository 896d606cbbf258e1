"""The tuner layer of the encoder: it owns everything trainable, of all adapters, under block indices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from vpt_peft.encoder import EncoderSpec, submodule
from vpt_peft.encoder.quantized import allow_packing, forbid_packing

from . import pixels
from .config import VPTConfig
from .layer import PromptTunerLayer, VPTLayer
from .modes import freeze_modes, is_checkpointing, is_reentrant
from .plan import make_roles, prompted_blocks
from .pooling import attach_pooling, detach_pooling
from .prompts import ElementwiseGate, PromptSet, ScalarGate, Temperature
from .shortcuts import UNREAD, leaves_unread, lets_join, mark_images, take_mark


PARTS = ("prompts", "projection", "patch_embedding", "gates", "temperatures")
PREFIXES = ("vpt_", "gated_prompt_")


class VPTPromptStore(nn.Module, PromptTunerLayer):
    """Prompts, projections, gates and temperatures of all adapters on one encoder.

    Containers are named after the method (`vpt_prompts`, `gated_prompt_gates`, ...) and hold one entry per adapter;
    an entry's children are named by block index.

    Args:
        spec: The encoder.
        encoder: The encoder module.
        root: The model it stands in, of which this is a child, so that an adapter file holds no path to the encoder.
    """

    adapter_layer_names = tuple(prefix + part for prefix in PREFIXES for part in PARTS)
    other_param_names = ("configs", "_drawn")

    def __init__(self, spec: EncoderSpec, encoder: nn.Module, root: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        # In a tuple, so that they are not registered as submodules.
        self._modules_around = (encoder, root)
        self.interpolates = "interpolate_pos_encoding" in signature(encoder.forward).parameters
        self.layers: tuple[VPTLayer, ...] = ()
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self.configs: dict[str, VPTConfig] = {}
        self.final: dict[str, torch.Tensor] = {}
        # Changes in place that each adapter's parameters had seen when they were made
        self._drawn: dict[str, int] = {}
        self.checkpointing = self.reentrant = self.joins = False
        # While work that can be left out is tried, onlookers do not count, and what was left out is noted
        self.trying = False
        self.left_out: set[str] = set()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._handles: list[Any] = []
        self._unpacked: tuple[nn.Module, ...] = ()

    @property
    def encoder(self) -> nn.Module:
        return self._modules_around[0]

    @property
    def root(self) -> nn.Module:
        return self._modules_around[1]

    def attach(self) -> None:
        """Put a tuner layer into each block and register all hooks."""
        layers = []
        for index, block_spec in enumerate(self.spec.blocks):
            block = submodule(self.encoder, block_spec.path)
            layer = VPTLayer(index, block_spec, block, self, self.spec.prefix)
            block.prompt_tuner = layer
            layer.attach()
            layers.append(layer)
        self.layers = tuple(layers)
        self.root.prompt_tuner = self
        self.encoder.__dict__["_prompt_store"] = self
        self._handles = [self.encoder.register_forward_pre_hook(enter_encoder, with_kwargs=True)]
        if self.root is not self.encoder:
            self._handles.append(self.root.register_forward_pre_hook(mark_images, with_kwargs=True))
        self._handles += pixels.attach_patch_embedding(self)
        self._handles += attach_pooling(self)
        self._unpacked = tuple(forbid_packing(self.root))

    def detach(self) -> None:
        """Take every hook and tuner layer out of the encoder."""
        allow_packing(self._unpacked)
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            layer.detach()
            del layer.block.prompt_tuner
        del self.root.prompt_tuner, self.encoder.__dict__["_prompt_store"]
        pixels.detach_patch_embedding(self)
        detach_pooling(self)

    def container(self, name: str, part: str) -> nn.ModuleDict:
        """The container that holds one part of an adapter, by its method."""
        config = self.configs[name]
        prefix = str(getattr(config.peft_type, "value", config.peft_type)).lower() + "_"
        return getattr(self, prefix + part)

    def part(self, name: str, part: str, key: str | None = None) -> Any:
        """One part of an adapter, or the entry `key` of it; `None` where the adapter has none."""
        container = self.container(name, part)
        if name not in container:
            return None
        entry: Any = container[name]
        return entry if key is None else (entry[key] if key in entry else None)

    def parameter(self, name: str, part: str, key: str) -> nn.Parameter:
        """The parameter that one part of an adapter has for block `key`."""
        entry = self.part(name, part, key)
        return entry if isinstance(entry, nn.Parameter) else entry.weight

    def update_layer(self, name: str, config: VPTConfig) -> None:
        """Make everything trainable of adapter `name`, on the device and in the dtype of the encoder."""
        self.configs[name] = config
        roles = make_roles(config, self.spec)
        device, dtype = self.device_and_dtype()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        own = prompted_blocks(config, self.spec)
        if config.prompt_location in ("pad", "channel"):
            prompts = pixels.make_prompts(self, config, like)
        else:
            prompts = self._make_prompts(config, own[:1] if config.share_prompts else own, like)
        self.container(name, "prompts")[name] = prompts
        self._make_projection(name, config, own, like)
        if config.prompt_location == "channel":
            self.container(name, "patch_embedding")[name] = pixels.make_patch_embedding(self, config, like)
        gates = nn.ModuleDict()
        for index, role in enumerate(roles):
            if role.gated:
                init = config.gate_init  # type: ignore[attr-defined]
                elementwise = config.gate == "elementwise"  # type: ignore[attr-defined]
                width = self.spec.blocks[index].width
                gates[str(index)] = ElementwiseGate(width, init, **like) if elementwise else ScalarGate(init, **like)
        if len(gates):
            self.container(name, "gates")[name] = gates
        if getattr(config, "attention_temperature", False):
            bounds = config.temperature_min, config.temperature_max  # type: ignore[attr-defined]
            self.container(name, "temperatures")[name] = nn.ModuleDict(
                {str(index): Temperature(*bounds, **like) for index in range(len(self.spec.blocks))}
            )
        for layer, role in zip(self.layers, roles, strict=True):
            layer.roles[name] = role
        self._drawn[name] = self._count_changes(name)

    def _count_changes(self, name: str) -> int:
        return sum(parameter._version for parameter in self.parameters_of(name).values())

    def is_as_drawn(self, name: str) -> bool:
        """Whether no value of an adapter has changed since `update_layer` made it."""
        return self._drawn.get(name) == self._count_changes(name)

    def _make_prompts(self, config: VPTConfig, blocks: list[int], like: dict[str, Any]) -> PromptSet:
        shapes: dict[str, tuple[int, ...]] = {}
        bounds: dict[str, float] = {}
        for index in blocks:
            block, key = self.spec.blocks[index], str(index)
            width = config.projection_dim or block.width
            count = {"add": block.tokens, "add_shared": 1}.get(config.prompt_location, config.num_virtual_tokens)
            as_pixels = config.prompt_location == "prepend_pixel"
            shapes[key] = pixels.strip_shape(self, config) if as_pixels else (count, width)
            bounds[key] = math.sqrt(6.0 / (self.patch_values() + width))
        prompts = PromptSet(shapes, **like)
        prompts.reset_parameters(config.init_prompts if config.init_weights else "unit_normal", bounds)
        return prompts

    def _make_projection(self, name: str, config: VPTConfig, own: list[int], like: dict[str, Any]) -> None:
        if not config.projection_dim and not config.project_patches:
            return
        width = self.spec.blocks[own[0]].width
        projection = nn.Linear(config.projection_dim or width, width, **like)
        if not projection.weight.is_meta:
            nn.init.zeros_(projection.bias)
            if config.project_patches:
                # The identity leaves the frozen backbone's patch tokens as they are at the start.
                nn.init.eye_(projection.weight)
            else:
                nn.init.kaiming_normal_(projection.weight, mode="fan_out")
        self.container(name, "projection")[name] = projection

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

    def prompts(self, name: str, key: str | None, rows: int) -> torch.Tensor:
        """Prompts of one adapter, projected and with dropout drawn per image: `(1, prompts, width)`, or `(rows, ...)`."""
        config = self.configs[name]
        prompts = self.part(name, "prompts")(key)
        if config.prompt_location == "prepend_pixel":
            prompts = pixels.embed_strip(self, prompts)
        projection = self.part(name, "projection")
        if projection is not None and (config.projection_dim or key == str(prompted_blocks(config, self.spec)[0])):
            prompts = projection(prompts)
        prompts = prompts.unsqueeze(0)
        if config.prompt_dropout > 0.0 and self.training:
            prompts = nn.functional.dropout(prompts.expand(rows, -1, -1), config.prompt_dropout, True)
        return prompts

    def project_patches(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The second reading of the paper's projection: patch tokens pass it too, at the input of the first block."""
        if index > 0:
            return hidden
        for name in self.active_names():
            if name in self.configs and self.configs[name].project_patches:
                projection = self.part(name, "projection")
                is_special = torch.zeros(hidden.shape[1], 1, dtype=torch.bool, device=hidden.device)
                is_special[list(self.spec.special)] = True
                projected = projection(hidden.to(projection.weight.dtype)).to(hidden.dtype)
                hidden = self.for_images_of(name, hidden, torch.where(is_special, hidden, projected))
        return hidden

    def for_images_of(self, name: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """`after` for the images of one adapter, `before` for the others of a mixed batch."""
        if self.mixed is None:
            return after
        rows = self.mixed.rows(name, before.device)
        return before.index_copy(0, rows, after[rows])

    def merge_stage(self, index: int, prompts: torch.Tensor) -> torch.Tensor:
        """Prompts that flow into a hierarchical encoder's next stage: each stands for the four patches it merges."""
        for next_block, paths in self.spec.merges:
            if next_block == index:
                prompts = torch.cat([prompts] * 4, dim=-1)
                for path in paths:
                    prompts = submodule(self.encoder, path)(prompts)
        return prompts

    def gate(self, name: str, index: int, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """What goes on to the next block, from a block's input and output prompts `(batch, prompts, width)`."""
        return self.part(name, "gates", str(index))(entered, left)

    def temperature(self, name: str, index: int) -> torch.Tensor:
        """The attention temperature of one block, a tensor of one element."""
        return self.part(name, "temperatures", str(index))()

    def note(self, what: str) -> None:
        """Note what was left out, while that is tried."""
        if self.trying:
            self.left_out.add(what)

    def receive(self, name: str, index: int, prompts: torch.Tensor) -> None:
        """Take prompts for block `index`, or for the head behind the last block."""
        if index < len(self.layers):
            self.layers[index].carried[name] = prompts
        else:
            self.final[name] = prompts

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the encoder runs: modes, clamps, and prompts that are pixels."""
        active = [name for name in self.active_names() if name in self.configs]
        grad = torch.is_grad_enabled() and self.training
        # Also without gradients: a pass between forward and backward must not change what is run again.
        self.checkpointing = is_checkpointing(self.encoder)
        self.reentrant = grad and self.checkpointing and is_reentrant(self.encoder)
        if self.final:
            self.final.clear()
        if any(self.configs[name].base_in_eval for name in active):
            freeze_modes(self, grad and self.checkpointing)
        for name in active:
            for temperature in (self.part(name, "temperatures") or nn.ModuleDict()).values() if grad else ():
                temperature.clamp_stored()  # type: ignore[operator]
        self.joins = lets_join(self, kwargs)
        for layer in self.layers:
            # A pass that failed may have left prompts on their way
            layer.arrived = False
        marked = take_mark(pixels.images_of(args, kwargs))
        changed = pixels.enter_image(self, active, args, kwargs)
        if self.reentrant and active:
            changed = pixels.require_input_grad(*(changed or (args, kwargs)))
        if leaves_unread(self, marked, kwargs):
            args, kwargs = changed or (args, kwargs)
            changed = args, {**kwargs, UNREAD: True}
        return changed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.configs)})"


def enter_encoder(encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the encoder."""
    return encoder.__dict__["_prompt_store"].enter(args, kwargs)


def find_store(model: nn.Module) -> VPTPromptStore | None:
    """The prompt store inside `model`, if prompts are attached."""
    root: Any = model
    while isinstance(root, PeftModel | BaseTuner):
        root = root.base_model if isinstance(root, PeftModel) else root.model
    store = root._modules.get("prompt_tuner")
    if isinstance(store, VPTPromptStore):
        return store
    return next((module for module in model.modules() if isinstance(module, VPTPromptStore)), None)
