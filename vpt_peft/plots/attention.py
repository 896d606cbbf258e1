"""Where a prompted model looks: overlays on the image, and how much each prompt is attended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attention import AttentionMap
from ..attention_maps import attention_maps
from .figures import PROMPTS, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the patches of an image.

    Raises:
        ValueError: they fill no grid of the image's shape.
    """
    rows = round(math.sqrt(patches * height / width))
    if rows == 0 or patches % rows or abs(patches // rows * height - rows * width) > max(height, width):
        raise ValueError(f"{patches} patches fill no grid over an image of {height} x {width} pixels.")
    return rows, patches // rows


def _maps(model: nn.Module, pixel_values: torch.Tensor, adapter_name: str | None) -> list[AttentionMap]:
    maps = attention_maps(model, pixel_values, adapter_name)
    if any(found.maps.shape[0] != pixel_values.shape[0] for found in maps):
        raise ValueError("this encoder attends within windows; its maps are not of whole images.")
    return maps


def prompt_attention(
    model: nn.Module, pixel_values: torch.Tensor, adapter_name: str | None = None
) -> list[torch.Tensor]:
    """Return how much attention each prompt gets, as a share of all attention: the mean over images and tokens.

    Args:
        model (`nn.Module`): a model with prompts.
        pixel_values (`torch.Tensor`): images `(batch, channels, height, width)`.
        adapter_name (`str`): the adapter; default: what is active.

    Returns:
        For each block a tensor `(heads, prompts)`; with no prompts where the block has none.
    """
    found = attention_maps(model, pixel_values, adapter_name)
    return [each.maps[..., _columns(each, "prompt_")].mean(dim=(0, 2)) for each in found]


def _columns(found: AttentionMap, start: str) -> list[int]:
    return [index for index, name in enumerate(found.columns) if name.startswith(start)]


def draw_prompt_attention(model: nn.Module, pixel_values: torch.Tensor, adapter_name: str | None = None) -> Figure:
    """Draw how much each prompt is attended in each block, and what all prompts of a block get together.

    Args:
        model (`nn.Module`): a model with prompts.
        pixel_values (`torch.Tensor`): images `(batch, channels, height, width)`.
        adapter_name (`str`): the adapter; default: what is active.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the model has no prompts that are attended.
    """
    shares = [each.mean(0) for each in prompt_attention(model, pixel_values, adapter_name)]
    most = max((len(each) for each in shares), default=0)
    if most == 0:
        raise ValueError("no prompt of this adapter is attended; it adds to tokens or pixels.")
    table = torch.full((len(shares), most), float("nan"))
    for row, each in zip(table, shares, strict=True):
        row[: len(each)] = each
    figure = new_figure(8.5, 0.22 * len(shares) + 1.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    blocks = range(1, len(shares) + 1)
    image = left.imshow(100 * table, aspect="auto", cmap="viridis", extent=(0.5, most + 0.5, len(shares) + 0.5, 0.5))
    figure.colorbar(image, ax=left, label="attention, %")
    left.set(xlabel="prompt", ylabel="block", yticks=blocks)
    right.barh(blocks, [100 * each.sum().item() for each in shares], color=PROMPTS)
    right.set(xlabel="all prompts, %")
    right.grid(alpha=0.3, axis="x")
    right.set_axisbelow(True)
    return figure


def draw_attention(
    model: nn.Module,
    pixel_values: torch.Tensor,
    token: str | tuple[int, int] = "class",
    blocks: Sequence[int] | None = None,
    head: int | None = None,
    image: Any = None,
    adapter_name: str | None = None,
) -> Figure:
    """Draw what one token attends to, over the image; titles say how much goes to the prompts.

    Args:
        model (`nn.Module`): a model with prompts.
        pixel_values (`torch.Tensor`): one image `(1, channels, height, width)`.
        token (`str` or `tuple[int, int]`): a column's name ("class", "register_0"), or row and column of a patch.
        blocks (`Sequence[int]`): their indices; default: four, spread evenly.
        head (`int`): one head; default: the mean over heads.
        image (`PIL.Image`): drawn below; default: `pixel_values`, scaled to its range.
        adapter_name (`str`): the adapter; default: what is active.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: more than one image, a token, block or head that is not there, or an encoder with windows.
    """
    if pixel_values.dim() != 4 or pixel_values.shape[0] != 1:
        raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}; give one image, (1, channels, ...).")
    maps = _maps(model, pixel_values, adapter_name)
    height, width = pixel_values.shape[-2:]
    chosen = list(blocks) if blocks is not None else sorted({round(i * (len(maps) - 1) / 3) for i in range(4)})
    wrong = [index for index in chosen if not 0 <= index < len(maps)]
    heads = maps[0].maps.shape[1]
    if wrong or (head is not None and not 0 <= head < heads):
        raise ValueError(f"blocks={chosen}, head={head}: the encoder has {len(maps)} blocks of {heads} heads.")
    if image is None:
        image = pixel_values[0].float().cpu().movedim(0, -1)
        image = ((image - image.min()) / (image.max() - image.min()).clamp_min(1e-6))[..., :3]
    figure = new_figure(2.6 * len(chosen), 2.9)
    for ax, index in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        found = maps[index]
        rows, columns = grid_of(len(_columns(found, "patch_")), height, width)
        attended = found.maps[0].mean(0) if head is None else found.maps[0, head]
        line = attended[_row(found, token, columns)]
        patches = line[_columns(found, "patch_")].reshape(rows, columns)
        ax.imshow(image, extent=(0, columns, rows, 0))
        ax.imshow(patches, cmap="inferno", alpha=0.6, extent=(0, columns, rows, 0), interpolation="nearest")
        if not isinstance(token, str):
            ax.plot(token[1] + 0.5, token[0] + 0.5, marker="s", mfc="none", mec="white", ms=9)
        ax.set_title(f"block {index + 1}: {line[_columns(found, 'prompt_')].sum():.0%} to prompts", fontsize="medium")
        ax.axis("off")
    return figure


def _row(found: AttentionMap, token: str | tuple[int, int], columns: int) -> int:
    """The row of a token: rows are the columns without the prompts."""
    name = token if isinstance(token, str) else f"patch_{token[0] * columns + token[1]}"
    names = [each for each in found.columns if not each.startswith("prompt_")]
    if name not in names:
        raise ValueError(f"token={token!r} is not there; choose one of {names[0]} to {names[-1]}.")
    return names.index(name)
