"""Heads of another number of labels, built by the model's own class."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .find import base_model
from .wrapper import HeadWrapper


def build_heads(model: nn.Module, paths: list[str], num_labels: int, base_labels: int | None) -> dict[str, nn.Module]:
    """The heads as the model's class makes them for a number of labels, with freshly drawn values.

    The class is built without data for the base's number of labels and for the one asked for. Parameters whose shapes
    differ must all be in the heads.

    Args:
        model: The model, or a PEFT model around it.
        paths: Dotted paths of the heads.
        num_labels: Number of labels asked for.
        base_labels: Number of labels of the model without adapters, `None` where its configuration has none.

    Returns:
        Heads by path; empty where the model's own have the size already.

    Raises:
        ValueError: The heads cannot be made to fit; the message names `id2label`.
    """
    root = base_model(model)
    asked = f"id2label of {num_labels} labels"
    own = f"{type(root).__name__} has {base_labels} labels"
    if num_labels == base_labels:
        return {}
    if not isinstance(root, PreTrainedModel) or base_labels is None:
        if _gives(root, paths, num_labels):
            return {}
        raise ValueError(
            f"{asked}: {type(root).__name__} is not a transformers model whose class could be built for them; give it "
            f"a head of {num_labels} outputs, or leave id2label out."
        )
    if not paths:
        raise ValueError(
            f"{asked}: {own} and the adapter has no head of its own; leave modules_to_save or id2label out."
        )
    before, after = _build(root, base_labels, asked), _build(root, num_labels, asked)
    old, new = _shapes(before), _shapes(after)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    outside = sorted(name for name in changed if not any(name.startswith(f"{path}.") for path in paths))
    if outside:
        raise ValueError(f"{asked}: {own}, and {', '.join(outside)} depends on them but is not in the heads {paths}.")
    if not changed:
        raise ValueError(
            f"{asked}: the heads {paths} of {type(root).__name__} do not depend on them; leave id2label out."
        )
    for path in paths:
        module = root.get_submodule(path)
        original = module.original_module if isinstance(module, HeadWrapper) else module
        if not _fits(_shapes(original), _shapes(before.get_submodule(path)), _shapes(after.get_submodule(path))):
            raise ValueError(
                f"{asked}: {own}, and its head {path} is not the one its class makes; give it a head of {num_labels} "
                "outputs, or leave id2label out."
            )
    _draw(after, paths)
    return {path: after.get_submodule(path) for path in paths}


def fit_head(wrapper: HeadWrapper, adapter_name: str, built: nn.Module) -> None:
    """Give an adapter's copy of a head the size of another one; what has the same shape keeps the copied values.

    Args:
        wrapper: The wrapper of the head.
        adapter_name: The adapter.
        built: The head of the right size, out of `build_heads`.
    """
    known: dict[torch.Tensor, torch.Tensor] = {}
    for path, fresh in built.named_modules():
        target = wrapper.modules_to_save[adapter_name].get_submodule(path)
        # Not by setattr, which accelerate redirects to the meta device while it loads
        for own, other in ((target._parameters, fresh._parameters), (target._buffers, fresh._buffers)):
            for name, value in other.items():
                old = own.get(name)
                if old is not None and value is not None and old.shape != value.shape:
                    if value not in known:
                        moved = value.detach().to(device=old.device, dtype=old.dtype)
                        known[value] = nn.Parameter(moved, old.requires_grad) if own is target._parameters else moved
                    own[name] = known[value]  # type: ignore[assignment]
        for name, number in vars(fresh).items():
            if type(number) is int and type(vars(target).get(name)) is int:
                setattr(target, name, number)
        if hasattr(fresh, "config") and hasattr(vars(target).get("config"), "num_labels"):
            target.config.num_labels = fresh.config.num_labels


def _build(root: PreTrainedModel, num_labels: int, asked: str) -> Any:
    """The model's class for a number of labels, on the meta device."""
    config = copy.deepcopy(root.config)
    config.num_labels = num_labels
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            return type(root)(config)
    except Exception as error:
        raise ValueError(
            f"{asked}: {type(root).__name__} cannot be built from its configuration alone ({error}); give it a head of "
            f"{num_labels} outputs, or leave id2label out."
        ) from error


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}


def _fits(own: dict[str, torch.Size], before: dict[str, torch.Size], after: dict[str, torch.Size]) -> bool:
    """Whether a head has the parameters its class makes, but for dimensions that the number of labels changes."""
    if not own.keys() == before.keys() == after.keys():
        return False
    return all(
        len(shape) == len(before[name]) == len(after[name])
        and all(a == b or b != c for a, b, c in zip(shape, before[name], after[name], strict=True))
        for name, shape in own.items()
    )


def _gives(root: nn.Module, paths: list[str], num_labels: int) -> bool:
    """Whether one of the heads has parameters for so many outputs."""
    shapes = (p.shape for path in paths for p in root.get_submodule(path).parameters())
    return any(len(shape) > 0 and shape[0] == num_labels for shape in shapes)


@torch.no_grad()
def _draw(model: Any, paths: list[str]) -> None:
    """Draw the heads of a model on the meta device as its class does."""
    for path in paths:
        head = model.get_submodule(path).to_empty(device="cpu")
        for parameter in head.parameters():
            parameter.zero_()
        for module in head.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    model.initialize_weights()
