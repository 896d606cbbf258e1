"""Frozen parts stay in eval mode while prompts train, and gradient checkpointing works all the same."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .forward_pass import CheckpointedFunction, Owner


# Up to transformers 5.22 a block's hooks run inside its checkpoint, later outside of it.
HOOKS_ARE_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)


def checkpointed_modules(encoder: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of an encoder that say whether activations are recomputed."""
    return tuple(module for module in encoder.modules() if hasattr(module, "gradient_checkpointing"))


def is_checkpointing(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules recomputes its activations; their checkpointing functions then carry the pass."""
    found = False
    for module in modules:
        if module.gradient_checkpointing:
            found = True
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, CheckpointedFunction):
                module._gradient_checkpointing_func = CheckpointedFunction(function)  # type: ignore[assignment]
    return found


def is_reentrant(modules: Iterable[nn.Module]) -> bool:
    """Whether checkpointing is of the re-entrant kind, which records only what depends on an input with a gradient."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in modules)
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def release_checkpointed(modules: Iterable[nn.Module]) -> None:
    """Give the modules their own checkpointing functions back."""
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointedFunction):
            module._gradient_checkpointing_func = function.wrapped  # type: ignore[assignment]


def freeze_modes(owner: Owner, checkpointing: bool) -> None:
    """Put the encoder's frozen modules in eval mode.

    Blocks that checkpoint keep their own flag in training mode, because transformers checkpoints only then; nothing
    but that decision depends on the flag. Trainable wrappers and the layers of other adapters keep their modes.
    """
    if owner.training and (owner.encoder.training or checkpointing):
        set_frozen_eval(owner.encoder)


def set_frozen_eval(root: nn.Module) -> None:
    """Eval mode for everything below `root` that is neither an adapter nor a module trained with it."""
    if isinstance(root, AuxiliaryTrainingWrapper):
        return
    if isinstance(root, BaseTunerLayer):
        base = getattr(root, "base_layer", None)
        if isinstance(base, nn.Module):
            set_frozen_eval(base)
        return
    root.training = bool(getattr(root, "gradient_checkpointing", False))
    for child in root.children():
        set_frozen_eval(child)


def set_frozen_eval_outside(root: nn.Module, encoder: nn.Module) -> None:
    """Eval mode for what stands beside the path from `root` to `encoder` and has nothing that trains."""
    for child in root.children():
        if child is encoder or isinstance(child, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
            continue
        if any(module is encoder for module in child.modules()):
            set_frozen_eval_outside(child, encoder)
        elif not any(parameter.requires_grad for parameter in child.parameters()):
            child.eval()
