"""Frozen parts stay in eval mode while prompts train, and gradient checkpointing works all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


if TYPE_CHECKING:
    from .store import VPTPromptStore


def is_checkpointing(encoder: nn.Module) -> bool:
    """Whether any part of the encoder recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in encoder.modules())


def _checkpoint_functions(encoder: nn.Module) -> list:
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in encoder.modules())
    return [function for function in functions if function is not None]


def input_needs_grad(store: VPTPromptStore) -> bool:
    """Whether checkpointing is of the re-entrant kind, which needs an input with a gradient to record anything."""
    return any(getattr(f, "keywords", {}).get("use_reentrant", False) for f in _checkpoint_functions(store.encoder))


def freeze_modes(store: VPTPromptStore) -> None:
    """Put the encoder's frozen modules in eval mode.

    Blocks that checkpoint keep their own flag in training mode, because transformers checkpoints only then; nothing
    but that decision depends on the flag. Trainable wrappers and the layers of other adapters keep their modes.
    """
    encoder = store.encoder
    if encoder.training and store.training:
        set_frozen_eval(encoder)


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
