"""Prompts that are pixels: a frame around the image, extra channels, a strip of patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vpt_peft.encoder import submodule
from vpt_peft.encoder.inputs import IMAGE_INPUTS

from .config import VPTConfig
from .forward_pass import Adapter, ForwardPass, Owner, current_pass, owner_of
from .parameter_set import ParameterSet


# A frame holds raw pixels in [0, 1] that are normalised like the images of the official code.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patch_values(owner: Owner) -> int:
    """Number of pixel values in one patch of three channels, which sets the scale of new prompts."""
    if owner.spec.patch_embedding is None:
        return 3 * 16 * 16
    convolution: Any = submodule(owner.encoder, owner.spec.patch_embedding)
    return 3 * math.prod(convolution.kernel_size[-2:])


def strip_shape(owner: Owner, config: VPTConfig) -> tuple[int, int, int]:
    """Shape of a strip of `num_virtual_tokens` patches, (channels, height, width)."""
    convolution = submodule(owner.encoder, owner.spec.patch_embedding or "")
    height, width = convolution.kernel_size
    return convolution.in_channels, height, width * config.most_tokens


def embed_strip(owner: Owner, strip: torch.Tensor) -> torch.Tensor:
    """Prompt tokens `(prompts, width)` of a strip of pixels, through the frozen patch embedding."""
    convolution = submodule(owner.encoder, owner.spec.patch_embedding or "")
    # Without its torch hooks, but with what offloading has put around it
    tokens = convolution.forward(strip.unsqueeze(0).to(convolution.weight.dtype))
    return tokens.flatten(2).transpose(1, 2).squeeze(0)


def make_prompts(owner: Owner, config: VPTConfig, like: dict[str, Any]) -> ParameterSet:
    """The frame ("tb": top and bottom rows, "lr": left and right columns) or the extra channels ("0")."""
    height, width = owner.spec.image_size or (224, 224)
    count = config.most_tokens
    if config.prompt_location == "channel":
        prompts = ParameterSet({"0": (count, height, width)}, **like)
    else:
        channels = submodule(owner.encoder, owner.spec.patch_embedding or "").in_channels
        frame = {"tb": (channels, 2 * count, width + 2 * count), "lr": (channels, height, 2 * count)}
        prompts = ParameterSet(frame, **like)
    prompts.reset_parameters(
        "unit_interval" if config.init_prompts != "zeros" else "zeros", dict.fromkeys(prompts, 1.0)
    )
    return prompts


def make_patch_embedding(owner: Owner, config: VPTConfig, like: dict[str, Any]) -> nn.Conv2d:
    """The patch embedding with `num_virtual_tokens` more input channels; the pre-trained ones keep their weights."""
    frozen = submodule(owner.encoder, owner.spec.patch_embedding or "")
    trained = nn.Conv2d(
        frozen.in_channels + config.most_tokens,
        frozen.out_channels,
        frozen.kernel_size,
        frozen.stride,
        frozen.padding,
        bias=frozen.bias is not None,
        **like,
    )
    if not trained.weight.is_meta:
        with torch.no_grad():
            trained.weight.normal_(std=0.02)
            trained.weight[:, : frozen.in_channels] = frozen.weight
            if frozen.bias is not None and trained.bias is not None:
                trained.bias.copy_(frozen.bias)
    return trained


def frame_images(adapter: Adapter, images: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, height, width)` with the frame of one adapter around it."""
    prompts = adapter.parts["prompts"]
    rows, columns = (prompts(key).to(images.device, images.dtype) for key in ("tb", "lr"))
    mean, std = (_per_channel(values, images) for values in (IMAGENET_MEAN, IMAGENET_STD))
    rows, columns = ((frame - mean) / std for frame in (rows, columns))
    count = rows.shape[1] // 2
    if images.shape[-2] != columns.shape[-2] or images.shape[-1] + 2 * count != rows.shape[-1]:
        raise ValueError(
            f"prompt_location='pad': images of {images.shape[-2]}x{images.shape[-1]} pixels do not fit the frame, which "
            f"was made for {columns.shape[-2]}x{rows.shape[-1] - 2 * count}; resize them."
        )
    rows, columns = (part.expand(images.shape[0], -1, -1, -1) for part in (rows, columns))
    framed = torch.cat([columns[..., :count], images, columns[..., count:]], dim=-1)
    return torch.cat([rows[:, :, :count], framed, rows[:, :, count:]], dim=-2)


def _per_channel(values: tuple[float, float, float], images: torch.Tensor) -> torch.Tensor:
    """ImageNet's values `(channels, 1, 1)`; their mean where images have other channels than red, green and blue."""
    channels = images.shape[-3]
    chosen = values if channels == 3 else (sum(values) / 3,) * channels
    return torch.tensor(chosen, dtype=images.dtype, device=images.device).view(-1, 1, 1)


def change_images(
    args: tuple, kwargs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an encoder with its images `(batch, channels, height, width)` changed."""
    name = next((name for name in IMAGE_INPUTS if kwargs.get(name) is not None), None)
    return ((change(args[0]), *args[1:]), kwargs) if name is None else (args, {**kwargs, name: change(kwargs[name])})


def enter_image(
    running: ForwardPass, args: tuple, kwargs: dict[str, Any], interpolates: bool
) -> tuple[tuple, dict[str, Any]] | None:
    """The encoder's arguments with a frame around the images, for active adapters that have one."""
    framing = [adapter for adapter in running.adapters if adapter.config.prompt_location == "pad"]
    for adapter in framing:
        args, kwargs = change_images(args, kwargs, partial(frame_images, adapter))
    if framing and interpolates:
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
    return (args, kwargs) if framing else None


def require_input_grad(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The encoder's arguments with images that require a gradient, so that re-entrant checkpointing records."""
    return change_images(args, kwargs, lambda im: im if im.requires_grad else im.detach().requires_grad_(True))


def embed_with_channels(convolution: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook of the patch embedding: with extra channels the adapter's own embedding replaces the frozen one."""
    running = current_pass(owner_of(convolution))
    for adapter in running.adapters if running is not None else ():
        if adapter.config.prompt_location == "channel":
            images, trained = args[0], adapter.parts["patch_embedding"]
            channels = adapter.parts["prompts"]("0").to(images.device, images.dtype)
            if channels.shape[-2:] != images.shape[-2:]:
                raise ValueError(
                    f"prompt_location='channel': images of {images.shape[-2]}x{images.shape[-1]} pixels, but the prompts "
                    f"were made for {channels.shape[-2]}x{channels.shape[-1]}; resize them."
                )
            channels = channels.expand(images.shape[0], -1, -1, -1)
            dtype = next(trained.parameters()).dtype
            return trained(torch.cat([images, channels], dim=1).to(dtype)).to(output.dtype)
    return None
