"""Find the biases of an encoder: all of them, or those of certain places in its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .spec import BlockSpec, EncoderError, EncoderSpec, Projection, submodule


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


def find_biases(
    encoder: nn.Module, spec: EncoderSpec, places: str | list[str], outside: Iterable[nn.Module] = ()
) -> dict[str, BiasTarget]:
    """Biases of an encoder, by key.

    Args:
        encoder: The encoder.
        spec: Its description.
        places: "all", or some of "value", "output", "mlp" (second layer), "norm" (second).
        outside: Modules that do not count, such as heads.

    Raises:
        EncoderError: A block has no such bias.
    """
    targets: dict[str, BiasTarget] = {}
    if places == "all":
        left_out = {id(module) for module in outside}
        for path, module in encoder.named_modules():
            if "prompt_tuner" not in path and id(module) not in left_out and _has_bias(module):
                key = bias_key(path, spec.blocks)
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
            key, size = bias_key(f"{block.path}.{path}", spec.blocks), bias.numel()
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


def bias_key(path: str, blocks: tuple[BlockSpec, ...]) -> str:
    """The name of a module's bias: its path behind the block's index, with slashes for dots."""
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
