"""Small random inputs that an encoder accepts, derived from its configuration and its patch embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import nn


IMAGE_INPUTS = ("pixel_values", "pixel_values_videos")
# (frames, rows, columns) of each image, for encoders that take the patches of all images as one sequence
GRID = "grid_thw"
Draw = Callable[..., torch.Tensor]


def is_packed(module: nn.Module) -> bool:
    """Whether a model takes the patches of all images as one sequence."""
    accepted = signature(module.forward).parameters
    return GRID in accepted and ("hidden_states" in accepted or IMAGE_INPUTS[0] in accepted)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge", 224)), size.get("width", size.get("shortest_edge", 224))]
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def _first_set(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _configured_size(config: Any) -> tuple[int, int] | None:
    size = _first_set(config, "image_size", "img_size", "crop_size", "max_img_size", "max_image_size")
    return _pair(size) if size else None


def _timm_input_size(config: Any) -> list[int]:
    """[channels, height, width] of a timm model's pre-training; empty for other models."""
    return list((getattr(config, "pretrained_cfg", None) or {}).get("input_size") or [])


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) in pixels of the images the configuration is made for; 224 where it names none."""
    return _configured_size(config) or _pair(_timm_input_size(config)[-2:] or 224)


def _image_sizes(encoder: nn.Module) -> list[tuple[int, int]]:
    """Image sizes to try: the configuration's, the patch embedding's, the pre-training's."""
    found = [_configured_size(encoder.config)]
    for path, module in encoder.named_modules():
        size = getattr(module, "img_size", None) or getattr(module, "image_size", None)
        if "patch" in path.rsplit(".", 1)[-1] and isinstance(size, (int, tuple, list)):
            found.append(_pair(size))
    return list(dict.fromkeys([size for size in found if size] or [image_size(encoder.config)]))


def channel_counts(encoder: nn.Module) -> list[int]:
    """Numbers of image channels to try: the configuration's, then those of the first convolution."""
    found = [_first_set(encoder.config, "num_channels", "in_channels", "in_chans")]
    convolutions = (module for module in encoder.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
    first = next(convolutions, None)
    found += [first.in_channels] if first is not None else []
    return list(dict.fromkeys([count for count in found if isinstance(count, int)] or [3]))


def sample_inputs(encoder: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, the likeliest first; floating-point tensors have the encoder's device and dtype.

    The candidates are images `(batch, channels, height, width)`, frames as a batch, videos
    `(batch, frames, channels, height, width)`, flattened patches with a grid (NaFlex), patches of all images as one
    sequence `(patches, values)`, and image pairs (in-context segmentation).
    """
    parameter = next((p for p in encoder.parameters() if p.is_floating_point()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    for channels in channel_counts(encoder):
        if is_packed(encoder):
            yield from _packed_patches(encoder, channels, draw)
            continue
        for size in _image_sizes(encoder):
            yield from _images(encoder, channels, size, draw)


def _packed_patches(encoder: nn.Module, channels: int, draw: Draw) -> Iterator[dict[str, Any]]:
    """One square image that fits into one attention window; its patches flattened, or as small images."""
    config, accepted = encoder.config, signature(encoder.forward).parameters
    patch = _pair(_first_set(config, "patch_size") or 14)[0]
    merged = _pair(_first_set(config, "spatial_merge_size", "merge_kernel_size") or 1)[0]
    window = _first_set(config, "window_size")
    side = merged * (2 if window is None else min(2, max(window // patch // merged, 1)))
    frames = _first_set(config, "temporal_patch_size") or 1
    name = "hidden_states" if "hidden_states" in accepted else IMAGE_INPUTS[0]
    for shape in ((channels * frames * patch * patch,), (channels, patch, patch)):
        patches = draw(side * side, *shape)
        inputs = {name: patches, GRID: torch.tensor([[1, side, side]], device=patches.device)}
        if "merge_sizes" in accepted:
            inputs["merge_sizes"] = torch.tensor([merged], device=patches.device)
        yield inputs


def _images(encoder: nn.Module, channels: int, size: tuple[int, int], draw: Draw) -> Iterator[dict[str, Any]]:
    config, (height, width) = encoder.config, size
    accepted = signature(encoder.forward).parameters
    name = next((name for name in IMAGE_INPUTS if name in accepted), "pixel_values")
    frames = _first_set(config, "num_frames", "frames_per_clip")
    patches = _first_set(config, "num_patches")
    if frames:
        video = {name: draw(1, int(frames), channels, height, width)}
        yield {**video, "skip_predictor": True} if "skip_predictor" in accepted else video
        yield {name: draw(int(frames), channels, height, width)}
    if isinstance(patches, int) and not getattr(config, "image_size", None):
        patch = _pair(_first_set(config, "patch_size") or 1)[0]
        grid = max(int(patches**0.5), 1)
        flat = draw(1, grid * grid, channels * patch * patch)
        yield {
            name: flat,
            "pixel_attention_mask": torch.ones(1, grid * grid, dtype=torch.long, device=flat.device),
            "spatial_shapes": torch.tensor([[grid, grid]], device=flat.device),
        }
    image = {name: draw(1, channels, height, width)}
    yield image
    yield {**image, "image_sizes": torch.tensor([[height, width]], device=image[name].device)}
    half = height // 2 if height > width else height
    pair = {"pixel_values": draw(1, channels, half, width), "prompt_pixel_values": draw(1, channels, half, width)}
    yield {**pair, "prompt_masks": draw(1, channels, half, width)}
