"""One batch through the heads of several adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vpt_peft.active import BASE

from .labels import Labels, LabelSwitch


_REMEDY = "run each adapter's images in a batch of their own"


def run_mixed(
    heads: Mapping[str, nn.Module],
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: LabelSwitch | None = None,
) -> Any:
    """Run each image through the head of its adapter.

    Args:
        heads: One for each name.
        names: One for each image.
        args: What the heads are called with. Tensors that have one row, or the same number of rows, for each image are
            shared out; anything else goes to every head.
        kwargs: The same.
        labels: Tell scores of classes from other values.

    Returns:
        What one head would return for all images; logits `(images, labels)` are padded to the widest with -inf.

    Raises:
        ValueError: The outputs cannot stand in one batch.
    """
    groups: dict[nn.Module, list[int]] = {}
    for image, name in enumerate(names):
        groups.setdefault(heads[name], []).append(image)
    if len(groups) == 1:
        return heads[names[0]](*args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    rows = next((leaf.shape[0] for leaf in leaves if _has_rows(leaf)), 0)
    if rows == 0 or rows % len(names):
        raise ValueError(
            f"adapter_names has {len(names)} names, but {type(heads[names[0]]).__name__} gets {rows} rows; {_REMEDY}."
        )
    repeats, outputs = {len(names): 1, rows: rows // len(names)}, []
    for head, images in groups.items():
        part = [
            leaf[_rows(images, repeats[leaf.shape[0]], leaf.device)]
            if _has_rows(leaf) and leaf.shape[0] in repeats
            else leaf
            for leaf in leaves
        ]
        some_args, some_kwargs = tree_unflatten(part, structure)
        outputs.append(tree_flatten(head(*some_args, **some_kwargs)))
    if any(spec != outputs[0][1] for _, spec in outputs):
        raise ValueError(f"adapter_names: the heads of {sorted(set(names))} return different things; {_REMEDY}.")
    asked = [] if labels is None else [labels.of(None if name == BASE else name) for name in dict.fromkeys(names)]
    known = [each for each in asked if each is not None]
    joined = [
        _join(parts, list(groups.values()), rows // len(names), known)
        for parts in zip(*(values for values, _ in outputs), strict=True)
    ]
    return tree_unflatten(joined, outputs[0][1])


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter) and leaf.dim() > 0


def _rows(images: list[int], repeat: int, device: torch.device) -> torch.Tensor:
    """Indices of the rows of some images, `repeat` one after the other for each."""
    index = torch.tensor(images, device=device)
    return index if repeat == 1 else (index[:, None] * repeat + torch.arange(repeat, device=device)).flatten()


def _join(parts: tuple[Any, ...], groups: list[list[int]], per_image: int, known: list[Labels]) -> Any:
    """One output of all groups, its rows in the order of the images."""
    if all(_has_rows(part) for part in parts):
        for repeat in (1, per_image):
            if all(part.shape[0] == repeat * len(images) for part, images in zip(parts, groups, strict=True)):
                order = torch.tensor([image for images in groups for image in images]).argsort().tolist()
                return torch.cat(_equally_wide(parts, known))[_rows(order, repeat, parts[0].device)]
    if all(_is_same(part, parts[0]) for part in parts):
        return parts[0]
    raise ValueError(f"adapter_names: a head returns a value that is not one for each image; {_REMEDY}.")


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _equally_wide(parts: tuple[torch.Tensor, ...], known: list[Labels]) -> list[torch.Tensor]:
    """Tensors of the same shape behind their rows; vector logits are padded with -inf.

    Raises:
        ValueError: The shapes differ and the tensors are not scores of classes.
    """
    if len({part.shape[1:] for part in parts}) == 1:
        return list(parts)
    shapes = [tuple(part.shape[1:]) for part in parts]
    if any(part.dim() != 2 for part in parts):
        raise ValueError(f"adapter_names: heads of unequal size give {shapes} for each image; {_REMEDY}.")
    widths = [part.shape[1] for part in parts]
    if min(widths) == 1 or any(each.is_regression for each in known):
        raise ValueError(
            f"adapter_names: regression heads of unequal size, {widths} values, have no padding; {_REMEDY}."
        )
    if known and not set(widths) <= {each.num_labels for each in known}:
        raise ValueError(f"adapter_names: heads give {widths} values, which are not the labels' scores; {_REMEDY}.")
    widest = max(widths)
    return [nn.functional.pad(part, (0, widest - part.shape[1]), value=float("-inf")) for part in parts]
