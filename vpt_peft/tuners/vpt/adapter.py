"""One adapter: its configuration, its layout and its parameters, as a forward pass uses them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from . import biases, pixels
from .config import VPTConfig
from .forward_pass import Owner
from .layout import Layout, own_blocks, prompt_counts
from .parameter_set import ParameterSet


class PromptAdapter:
    """One adapter as a forward pass uses it: its configuration, its layout and its parameters.

    Args:
        owner: The prompts of the encoder.
        name: The adapter's name.
        config: Its configuration.
        layout: What each block does for it.
        parts: Its modules by the name of the part ("prompts", "projection", ...).
    """

    prefix = "vpt_"
    part_names: tuple[str, ...] = ("prompts", "basis", "projection", "patch_embedding", "biases")

    def __init__(
        self, owner: Owner, name: str, config: VPTConfig, layout: Layout, parts: dict[str, nn.Module]
    ) -> None:
        self.owner, self.name, self.config, self.layout, self.parts = owner, name, config, layout, parts
        self._sources: list[torch.Tensor] | None = None

    @classmethod
    def make_parts(cls, owner: Owner, config: Any, layout: Layout, like: dict[str, Any]) -> dict[str, nn.Module]:
        """Everything that trains, with its initial values.

        Args:
            owner: The prompts of the encoder.
            config: The configuration.
            layout: What each block does.
            like: Keyword arguments of new tensors, their device and dtype.
        """
        parts: dict[str, nn.Module] = {}
        if config.prompt_location in ("pad", "channel"):
            parts["prompts"] = pixels.make_prompts(owner, config, like)
        else:
            parts |= _make_prompts(owner, config, layout, like)
        if config.prompt_location == "channel":
            parts["patch_embedding"] = pixels.make_patch_embedding(owner, config, like)
        if config.projection_dim or config.project_patches:
            parts["projection"] = _make_projection(owner, config, layout, like)
        if config.bias != "none":
            parts["biases"] = biases.make_offsets(owner, config, like)
        return parts

    def begin(self) -> None:
        """Called before a training pass of the encoder."""

    def own_prompts(self, key: str | None) -> torch.Tensor:
        """Own prompts of a block before projection and dropout, `(prompts, width)`: a product where they have a rank."""
        prompts, basis = self.parts["prompts"](key), self.parts.get("basis")
        return prompts if basis is None else prompts @ basis(key).T

    def set_prompts(self, key: str, values: torch.Tensor) -> None:
        """Give a block's own prompts the values `(prompts, width)`; prompts with a rank get the nearest product."""
        prompts: Any = self.parts["prompts"]
        weight, basis = prompts[key], self.parts.get("basis")
        values = values.detach().to(weight.device)
        with torch.no_grad():
            if basis is not None:
                left, scale, right = torch.linalg.svd(values.double(), full_matrices=False)
                rank = min(weight.shape[1], len(scale))
                root = scale[:rank].sqrt()
                values = weight.new_zeros(weight.shape, dtype=left.dtype)
                values[:, :rank] = left[:, :rank] * root
                basis[key][:, :rank] = (root[:, None] * right[:rank]).T.to(weight.dtype)  # type: ignore[index, operator]
            weight.copy_(values)

    def prompts(self, key: str | None, batch: int) -> torch.Tensor:
        """Own prompts of a block, projected and with dropout drawn per image: `(1, prompts, width)`, or `(batch, ...)`."""
        config, prompts = self.config, self.own_prompts(key)
        if config.prompt_location == "prepend_pixel":
            prompts = pixels.embed_strip(self.owner, prompts)
        projection = self.parts.get("projection")
        if projection is not None and (config.projection_dim or key == str(own_blocks(self.layout)[0])):
            prompts = projection(prompts)
        prompts = prompts.unsqueeze(0)
        if config.prompt_dropout > 0.0 and self.owner.training:
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
        if self._sources is None:
            kept = [self.parts[part] for part in ("prompts", "basis", "projection", "biases") if part in self.parts]
            self._sources = [parameter for part in kept for parameter in part.parameters()]
        return self._sources


def _make_prompts(owner: Owner, config: VPTConfig, layout: Layout, like: dict[str, Any]) -> dict[str, nn.Module]:
    shapes: dict[str, tuple[int, ...]] = {}
    bounds: dict[str, float] = {}
    counts = prompt_counts(config, owner.spec)
    for index in own_blocks(layout):
        block, key = owner.spec.blocks[index], str(index)
        width = config.projection_dim or block.width
        count = {"add": block.tokens, "add_shared": 1}.get(config.prompt_location, counts[index])
        as_pixels = config.prompt_location == "prepend_pixel"
        shapes[key] = pixels.strip_shape(owner, config) if as_pixels else (count, width)
        bounds[key] = math.sqrt(6.0 / (pixels.patch_values(owner) + width))
    method = config.init_prompts if config.init_weights else "unit_normal"
    rank = config.prompt_rank
    if rank is None:
        prompts = ParameterSet(shapes, **like)
        prompts.reset_parameters(method, bounds)
        return {"prompts": prompts}
    # Bilinear prompts (Wang et al., ICCV 2025): A with deviation 0.02, B by Xavier's rule for (width, rank)
    factor = ParameterSet({key: (count, rank) for key, (count, _) in shapes.items()}, **like)
    basis = ParameterSet({key: (width, rank) for key, (_, width) in shapes.items()}, **like)
    factor.reset_parameters(
        "normal" if method == "xavier_uniform" else method, dict.fromkeys(shapes, 0.02 * math.sqrt(3.0))
    )
    basis.reset_parameters("xavier_uniform", {k: math.sqrt(6.0 / (width + rank)) for k, (_, width) in shapes.items()})
    return {"prompts": factor, "basis": basis}


def _make_projection(owner: Owner, config: VPTConfig, layout: Layout, like: dict[str, Any]) -> nn.Linear:
    width = owner.spec.blocks[own_blocks(layout)[0]].width
    projection = nn.Linear(config.projection_dim or width, width, **like)
    if not projection.weight.is_meta:
        nn.init.zeros_(projection.bias)
        if config.project_patches:
            # The identity leaves the frozen backbone's patch tokens as they are at the start.
            nn.init.eye_(projection.weight)
        else:
            nn.init.kaiming_normal_(projection.weight, mode="fan_out")
    return projection
