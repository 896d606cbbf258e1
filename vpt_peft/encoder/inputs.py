"""Small random inputs that an encoder accepts, made from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import nn


IMAGE_INPUTS = ("pixel_values", "pixel_values_videos")


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge", 224)), size.get("width", size.get("shortest_edge", 224))]
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) in pixels of the images the configuration is made for; 224 where it names none."""
    for name in ("image_size", "img_size", "crop_size", "max_img_size", "max_image_size"):
        size = getattr(config, name, None)
        if size:
            return _pair(size)
    return 224, 224


def sample_inputs(encoder: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, the likeliest first; floating-point tensors are on the encoder's device and dtype.

    The candidates cover images `(batch, channels, height, width)`, frames as a batch, videos
    `(batch, frames, channels, height, width)`, flattened patches with a grid (NaFlex) and image pairs (in-context
    segmentation).
    """
    config = encoder.config
    parameter = next((p for p in encoder.parameters() if p.is_floating_point()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    generator = torch.Generator().manual_seed(0)
    height, width = image_size(config)
    channels = int(getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3)
    accepted = signature(encoder.forward).parameters
    name = next((name for name in IMAGE_INPUTS if name in accepted), "pixel_values")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    patches = getattr(config, "num_patches", None)
    patch = _pair(getattr(config, "patch_size", None) or 1)[0]
    if frames:
        frames = int(frames)
        video = {name: draw(1, frames, channels, height, width)}
        yield {**video, "skip_predictor": True} if "skip_predictor" in accepted else video
        yield {name: draw(frames, channels, height, width)}
    if isinstance(patches, int) and not getattr(config, "image_size", None):
        grid = max(int(patches**0.5), 1)
        yield {
            name: draw(1, grid * grid, channels * patch * patch),
            "pixel_attention_mask": torch.ones(1, grid * grid, dtype=torch.long, device=device),
            "spatial_shapes": torch.tensor([[grid, grid]], device=device),
        }
    image = {name: draw(1, channels, height, width)}
    yield image
    yield {**image, "image_sizes": torch.tensor([[height, width]], device=device)}
    half = height // 2 if height > width else height
    pair = {"pixel_values": draw(1, channels, half, width), "prompt_pixel_values": draw(1, channels, half, width)}
    yield {**pair, "prompt_masks": draw(1, channels, half, width)}
