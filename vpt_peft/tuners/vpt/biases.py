"""Biases of the backbone that train: offsets of an adapter, added where the module adds its bias (BitFit).

The backbone's own biases stay as they are, so adapters with different biases share one backbone, and a file holds no
values of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vpt_peft.encoder.biases import BiasTarget, bias_key, find_biases

from .config import VPTConfig
from .forward_pass import Adapter, ForwardPass, Owner, OwnerRef, current_pass
from .parameter_set import ParameterSet


CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def bias_targets(owner: Owner, places: str | list[str]) -> dict[str, BiasTarget]:
    """The biases that train, by key; those of heads are the heads' own."""
    return find_biases(owner.encoder, owner.spec, places, owner.head_modules())


def make_offsets(owner: Owner, config: VPTConfig, like: dict[str, Any]) -> ParameterSet:
    """Offsets of all biases that a configuration names, zero."""
    targets = bias_targets(owner, config.bias)
    offsets = ParameterSet({key: (target.size,) for key, target in targets.items()}, **like)
    offsets.reset_parameters("zeros", dict.fromkeys(targets, 0.0))
    return offsets


def add_offset(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook of a module with a bias: add the offsets of the active adapters."""
    owner, targets = module.__dict__["_bias_targets"]
    running = current_pass(owner.owner)
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
            state["_bias_targets"] = (OwnerRef(owner), [])
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
        key = bias_key(path, owner.spec.blocks)
        if key not in targets:
            raise ValueError(f"the adapter file holds a bias of {path}, which this encoder does not have.")
        base: Any = targets[key].module.bias
        offsets[key] = value.to(base.device) - base.detach()
    return offsets
