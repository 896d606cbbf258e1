"""Biases of the backbone that train: offsets of an adapter, added where the module adds its bias (BitFit).

The backbone's own biases stay as they are, so adapters with different biases share one backbone, and a file holds no
values of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vpt_peft.encoder import BlockSpec, EncoderError, Projection, submodule

from .config import VPTConfig
from .forward_pass import Adapter, ForwardPass, Owner, current_pass
from .parameter_set import ParameterSet


CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class BiasTarget:
    """One bias of the encoder.

    Args:
        key: Its name in an adapter's set: the module's path behind the block's index, with slashes for dots.
        module: The module that adds it.
        size: Number of values.
        projection: The part of a fused projection that is meant, `None` for all of it.
        heads: Number of heads of that projection.
    """

    key: str
    module: nn.Module
    size: int
    projection: Projection | None = None
    heads: int = 1

    def widen(self, offset: torch.Tensor) -> torch.Tensor:
        """An offset over a part as one over the whole output, zero elsewhere."""
        if self.projection is None:
            return offset
        before, behind = self.projection.part, self.projection.parts - self.projection.part - 1
        heads = self.heads if self.projection.heads_first else 1
        return nn.functional.pad(offset.view(heads, 1, -1), (0, 0, before, behind)).flatten()


def bias_targets(owner: Owner, places: str | list[str]) -> dict[str, BiasTarget]:
    """The biases that train, by key.

    Args:
        owner: The prompts of the encoder.
        places: "all", or some of "value", "output", "mlp" (second layer), "norm" (second).

    Raises:
        EncoderError: A block has no such bias.
    """
    encoder, spec = owner.encoder, owner.spec
    targets: dict[str, BiasTarget] = {}
    if places == "all":
        for path, module in encoder.named_modules():
            if "prompt_tuner" not in path and "modules_to_save" not in path and _has_bias(module):
                key = _key(path, spec.blocks)
                targets[key] = BiasTarget(key, module, module.bias.numel())
        return targets
    for index, block in enumerate(spec.blocks):
        for place in places:
            path, projection = _path_of(submodule(encoder, block.path), block, place)
            module = None if path is None else _innermost(submodule(encoder, f"{block.path}.{path}"))
            if module is None or not _has_bias(module):
                raise EncoderError(
                    f"bias={list(places)!r}: block {index} ({block.path}) has no bias at {place!r}; leave it out, or use "
                    "bias='all', which trains those that there are."
                )
            bias: Any = module.bias
            key, size = _key(f"{block.path}.{path}", spec.blocks), bias.numel()
            if projection is None or projection.parts == 1:
                targets[key] = BiasTarget(key, module, size)
            else:
                key = f"{key}/{place}"
                targets[key] = BiasTarget(key, module, size // projection.parts, projection, block.attention.heads)
    return targets


def _has_bias(module: nn.Module) -> bool:
    bias = module._parameters.get("bias")
    return bias is not None and bias.dim() == 1


def _innermost(module: Any) -> nn.Module:
    """The layer itself where another method's layer is around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _key(path: str, blocks: tuple[BlockSpec, ...]) -> str:
    path = ".".join(name for name in path.split(".") if name != "base_layer")
    for index, block in enumerate(blocks):
        if path.startswith(f"{block.path}."):
            path = f"{index}.{path[len(block.path) + 1 :]}"
            break
    return path.replace(".", "/")


def _path_of(block: nn.Module, spec: BlockSpec, place: str) -> tuple[str | None, Projection | None]:
    """Path of a bias in a block, and for a fused projection the part that is meant."""
    attention = spec.attention
    if place == "value" and attention.value is not None:
        return f"{attention.path}.{attention.value.path}", attention.value
    if place == "output" and attention.out is not None:
        return f"{attention.path}.{attention.out}", None
    outside = [
        (path, module)
        for path, module in block.named_modules()
        if not f"{path}.".startswith(f"{attention.path}.") and "prompt_tuner" not in path and _has_bias(module)
    ]
    if place == "norm":
        found = [
            path for path, module in outside if "norm" in type(module).__name__.lower() and path != attention.norm
        ]
    else:
        found = [path for path, module in outside if getattr(module, "out_features", None) == spec.width]
    return (found[-1] if found and place in ("norm", "mlp") else None), None


def make_offsets(owner: Owner, config: VPTConfig, like: dict[str, Any]) -> ParameterSet:
    """Offsets of all biases that a configuration names, zero."""
    targets = bias_targets(owner, config.bias)
    offsets = ParameterSet({key: (target.size,) for key, target in targets.items()}, **like)
    offsets.reset_parameters("zeros", dict.fromkeys(targets, 0.0))
    return offsets


def add_offset(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook of a module with a bias: add the offsets of the active adapters."""
    owner, targets = module.__dict__["_bias_targets"]
    running = current_pass(owner)
    if running is None:
        return None
    for adapter in running.adapters:
        offsets: Any = adapter.parts.get("biases")
        for target in targets if offsets is not None else ():
            if target.key in offsets.names:
                offset = target.widen(offsets(target.key)).to(output.device, output.dtype)
                output = _add(running, adapter, module, output, offset)
    return output


def _add(
    running: ForwardPass, adapter: Adapter, module: nn.Module, output: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    first = isinstance(module, CHANNELS_FIRST) or getattr(module, "data_format", "") == "channels_first"
    shape = [1] * output.dim()
    shape[1 if first else -1] = -1
    mixed = running.mixed
    if mixed is None or running.projecting is adapter:
        return output + offset.view(shape)
    if running.projecting is not None:
        return output
    # With several rows per image (windows) images vary slowest
    per_row = output.shape[0] // len(mixed.names)
    chosen = torch.zeros(len(mixed.names), dtype=output.dtype, device=output.device)
    chosen[mixed.rows(adapter.name, output.device)] = 1.0
    chosen = chosen.repeat_interleave(per_row).view(-1, *[1] * (output.dim() - 1))
    return output + chosen * offset.view(shape)


def attach_offsets(owner: Owner, places: str | list[str]) -> None:
    """Register the hooks of the biases that train; those that are there stay."""
    for target in bias_targets(owner, places).values():
        state = target.module.__dict__
        if "_bias_targets" not in state:
            state["_bias_targets"] = (owner, [])
            state["_bias_handle"] = target.module.register_forward_hook(add_offset)
        if target not in state["_bias_targets"][1]:
            state["_bias_targets"][1].append(target)


def detach_offsets(owner: Owner) -> None:
    """Take the hooks off."""
    for module in owner.encoder.modules():
        if "_bias_targets" in module.__dict__:
            module.__dict__.pop("_bias_handle").remove()
            del module.__dict__["_bias_targets"]


def as_offsets(owner: Owner, biases: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Offsets for biases that were saved as the backbone's own: what was saved minus what the backbone has.

    Args:
        owner: The prompts of the encoder.
        biases: By dotted path of the module in the encoder.

    Raises:
        ValueError: The encoder has no such bias.
    """
    targets = {target.key: target for target in bias_targets(owner, "all").values()}
    offsets = {}
    for path, value in biases.items():
        key = _key(path, owner.spec.blocks)
        if key not in targets:
            raise ValueError(f"the adapter file holds a bias of {path}, which this encoder does not have.")
        base: Any = targets[key].module.bias
        offsets[key] = value.to(base.device) - base.detach()
    return offsets
