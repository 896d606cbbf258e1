"""The hooks of the model and its encoder, where a call and its forward pass begin and end, and of the parts of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vpt_peft.active import leave_call, requested_names
from vpt_peft.encoder import submodule

from .forward_pass import Owner, OwnerRef, begin_pass, end_pass, owner_of
from .modes import freeze_modes, is_checkpointing, is_reentrant
from .pixels import embed_with_channels, enter_image, require_input_grad
from .pooling import pool_after, pool_before


def refuse_replica(module: nn.Module) -> None:
    """Refuse to run as a replica of `nn.DataParallel`, whose modules share hooks with the original.

    Raises:
        RuntimeError: It is one.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel does not run prompts: start one process per GPU (torchrun or accelerate launch), or show "
            "the program one GPU (CUDA_VISIBLE_DEVICES=0). The Trainer takes DataParallel by itself where it sees several."
        )


def enter_model(root: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the model: the call keeps the adapters that are active at this moment."""
    refuse_replica(root)
    owner: Any = owner_of(root)
    per_image = requested_names(owner)
    owner.begin_call(None if per_image is None else dict.fromkeys(per_image), per_image)


def leave_model(root: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the model; it also runs where the forward pass failed."""
    leave_call()


def enter_encoder(encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the encoder: the forward pass begins."""
    refuse_replica(encoder)
    owner: Any = owner_of(encoder)
    trains = torch.is_grad_enabled() and owner.training
    # Also without gradients: a pass between forward and backward must not change what is run again.
    checkpointing = is_checkpointing(owner.checkpointed)
    reentrant = trains and checkpointing and is_reentrant(owner.checkpointed)
    running = owner.begin_pass(checkpointing, reentrant)
    begin_pass(running)
    if any(adapter.config.base_in_eval for adapter in running.adapters):
        freeze_modes(owner, trains and checkpointing)
    for adapter in running.adapters if trains else ():
        adapter.begin()
    changed = enter_image(running, args, kwargs, owner.interpolates)
    if reentrant and running.adapters:
        changed = require_input_grad(*(changed or (args, kwargs)))
    return changed


def leave_encoder(encoder: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the encoder: the forward pass ends, also where it failed."""
    end_pass(owner_of(encoder))


def attach_hooks(owner: Owner) -> list[Any]:
    """Register the hooks of the model, its encoder, patch embedding and final norm; returns their handles."""
    for module in _hooked(owner):
        module.__dict__["_prompt_owner"] = OwnerRef(owner)
    handles = [
        owner.root.register_forward_pre_hook(enter_model),
        owner.root.register_forward_hook(leave_model, always_call=True),
        owner.encoder.register_forward_pre_hook(enter_encoder, with_kwargs=True),
        owner.encoder.register_forward_hook(leave_encoder, always_call=True),
    ]
    if owner.spec.patch_embedding is not None:
        convolution = submodule(owner.encoder, owner.spec.patch_embedding)
        handles.append(convolution.register_forward_hook(embed_with_channels))
    if owner.spec.final_norm is not None:
        norm = submodule(owner.encoder, owner.spec.final_norm)
        handles += [norm.register_forward_pre_hook(pool_before), norm.register_forward_hook(pool_after)]
    return handles


def forget_owner(owner: Owner) -> None:
    """Forget the owner on the modules with hooks."""
    for module in _hooked(owner):
        module.__dict__.pop("_prompt_owner", None)


def _hooked(owner: Owner) -> list[nn.Module]:
    paths = [path for path in (owner.spec.patch_embedding, owner.spec.final_norm) if path is not None]
    return [owner.root, owner.encoder, *(submodule(owner.encoder, path) for path in paths)]
