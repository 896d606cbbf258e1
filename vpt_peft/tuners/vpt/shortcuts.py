"""Work that is left out while nobody can see the difference.

Prompt tokens that flow on stay in the sequence from block to block, where they would be taken out and put in again. And
where the model's output depends on the special tokens (the class token) alone, the last block makes only them: its other
tokens serve as keys and values, like prompts. `check.check_shortcuts` tries out on the model itself where that holds;
here it is decided for each forward pass whether anybody looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import _global_backward_hooks, _global_forward_hooks, _global_forward_pre_hooks

from vpt_peft.encoder import submodule
from vpt_peft.encoder.inputs import IMAGE_INPUTS

from .pixels import exchange_images, images_of
from .sequence import is_collected


if TYPE_CHECKING:
    from .layer import Playing
    from .store import VPTPromptStore

# Attribute of the images of a call of the whole model; a call of the encoder alone has an output that may be read whole
OF_WHOLE_MODEL = "_vpt_of_whole_model"
# Keyword argument that travels through the encoder to the last block, so that passes at the same time do not meet
UNREAD = "vpt_unread"
# What else a call of the whole model may be told without its output depending on more than images and labels
_CALLED_WITH = {"labels", "return_dict", "interpolate_pos_encoding", "num_items_in_batch", *IMAGE_INPUTS}
# Whose hooks are no onlookers: ours, transformers' own, which act only while outputs are collected, and those by which
# torch's FLOP counter knows where it is
_KNOWN_HOOKS = ("vpt_peft.", "transformers.utils.output_capturing", "torch.utils.module_tracker")
# Of transformers and PEFT, on the embeddings
_GRADIENT_HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")
_ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def mark_images(root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a call of the whole model with marked images; the caller's own tensor stays as it is."""
    store: VPTPromptStore = root.prompt_tuner  # type: ignore[assignment]
    images = images_of(args, kwargs)
    more = [
        name for name, value in kwargs.items() if name not in _CALLED_WITH and value is not None and value is not False
    ]
    if not (store.spec.reads_special and isinstance(images, torch.Tensor)) or more or len(args) > 1:
        return None
    marked = images.view_as(images)
    setattr(marked, OF_WHOLE_MODEL, True)
    return exchange_images(args, kwargs, marked)


def take_mark(images: Any) -> bool:
    """Whether the encoder's images come from a call of the whole model. The mark serves once."""
    marked = bool(getattr(images, OF_WHOLE_MODEL, False))
    if marked:
        setattr(images, OF_WHOLE_MODEL, False)
    return marked


def lets_join(store: VPTPromptStore, kwargs: dict[str, Any]) -> bool:
    """Whether nobody will see prompt tokens on their way between blocks in the pass of the encoder that begins.

    Args:
        store: The prompts.
        kwargs: The encoder's arguments.
    """
    if store.trying or not store.spec.joins:
        return store.spec.joins
    if store.checkpointing or _asks_for_states(store.encoder, kwargs):
        return False
    return not is_watched_between(store.encoder, tuple(block.path for block in store.spec.blocks))


def leaves_unread(store: VPTPromptStore, marked: bool, kwargs: dict[str, Any]) -> bool:
    """Whether nobody will see the last block's other tokens in the pass of the encoder that begins.

    Args:
        store: The prompts.
        marked: It is part of a call of the whole model.
        kwargs: The encoder's arguments.
    """
    if store.trying or not (store.spec.reads_special and marked):
        return store.spec.reads_special and marked
    if store.checkpointing or store.layers[-1].block.training or _asks_for_states(store.encoder, kwargs):
        return False
    configs = [store.configs[name] for name in store.active_names() if name in store.configs]
    if not configs or not all(config.skip_unread and not config.pools for config in configs):
        return False
    attention = getattr(store.encoder.config, "_attn_implementation", None) or "eager"
    if attention not in _ATTENTIONS:
        return False
    return not is_watched_at_end(store.encoder, store.root, store.spec.blocks[-1].path)


def _asks_for_states(encoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether hidden states or attentions are asked for, also of encoders that collect them by hand."""
    wanted = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name) or getattr(encoder.config, name, False) for name in wanted)


def is_seen(store: VPTPromptStore) -> bool:
    """Whether transformers collects what blocks give in the pass that runs; while things are tried, nobody counts."""
    return not store.trying and is_collected()


def reads_special_only(store: VPTPromptStore, playing: Playing, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the last block can make its special tokens alone, from the arguments behind its tokens.

    Masks, biases and rotary tables are made for all tokens; without them no token has a place of its own.
    """
    if is_seen(store) or not all(role.mode in (None, "kv", "add") for _, role in playing):
        return False
    others: Iterable[Any] = [*args, *kwargs.values()]
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in others)


@torch.compiler.assume_constant_result
def is_watched_between(encoder: nn.Module, paths: tuple[str, ...]) -> bool:
    """Whether anybody has hooks on blocks, and so would see prompt tokens on their way from one to the next."""
    return _is_watched_everywhere() or any(_has_onlookers(submodule(encoder, path)) for path in paths)


@torch.compiler.assume_constant_result
def is_watched_at_end(encoder: nn.Module, root: nn.Module, last: str) -> bool:
    """Whether anybody has hooks on (or has replaced the forward pass of) what runs from the last block on."""
    blocks, _, _ = last.rpartition(".")
    around = [*_around(encoder, submodule(encoder, blocks), heads=True), *_around(root, encoder, heads=False), encoder]
    modules = [*submodule(encoder, last).modules(), *around]
    return _is_watched_everywhere() or any(_has_onlookers(each) or "forward" in vars(each) for each in modules)


def _around(module: nn.Module, passed: nn.Module, heads: bool) -> Iterator[nn.Module]:
    """What is in `module` but not in `passed`; heads that train get what was read already, and may be many."""
    for name, child in module.named_children():
        if child is passed or name == "prompt_tuner" or isinstance(child, AuxiliaryTrainingWrapper) and not heads:
            continue
        yield child
        yield from _around(child, passed, heads)


def _is_watched_everywhere() -> bool:
    hooks = (*_global_forward_hooks.values(), *_global_forward_pre_hooks.values(), *_global_backward_hooks.values())
    return not all(map(_is_known, hooks))


def _has_onlookers(module: nn.Module) -> bool:
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    return not all(_is_known(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))


def _is_known(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or ""
    return module.startswith(_KNOWN_HOOKS) or getattr(hook, "__name__", "") in _GRADIENT_HOOKS
