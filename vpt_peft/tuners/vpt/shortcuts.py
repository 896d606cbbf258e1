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

from vpt_peft.encoder import submodule

from .sequence import is_collected


if TYPE_CHECKING:
    from .layer import Playing
    from .store import VPTPromptStore

# Attribute of the images of a call of the whole model; a call of the encoder alone has an output that may be read whole
OF_WHOLE_MODEL = "_vpt_of_whole_model"
# Keyword argument that travels through the encoder to the last block. Nothing is kept in a module, so passes that run at
# the same time do not meet.
UNREAD = "vpt_unread"
# Whose hooks are no onlookers; transformers' own act only while outputs are collected
_KNOWN_HOOKS = ("vpt_peft.", "transformers.utils.output_capturing")


def of_whole_model(images: torch.Tensor) -> torch.Tensor:
    """The images, marked as those of a call of the whole model; the caller's tensor stays as it is."""
    marked = images.view_as(images)
    setattr(marked, OF_WHOLE_MODEL, True)
    return marked


def leaves_unread(store: VPTPromptStore, images: Any, kwargs: dict[str, Any]) -> bool:
    """Whether nobody will see the last block's other tokens in the pass of the encoder that begins.

    Args:
        store: The prompts.
        images: The encoder's input.
        kwargs: Its other arguments.
    """
    if not store.spec.reads_special or not getattr(images, OF_WHOLE_MODEL, False):
        return False
    if store.checkpointing or store.layers[-1].block.training:
        return False
    configs = [store.configs[name] for name in store.active_names() if name in store.configs]
    if not configs or not all(c.skip_unread and c.pooling in (None, "class") and not c.reads_prompts for c in configs):
        return False
    for wanted in ("output_hidden_states", "output_attentions"):
        if kwargs.get(wanted) or getattr(store.encoder.config, wanted, False):
            return False
    return not is_watched_at_end(store.encoder, store.root, store.spec.blocks[-1].path)


def reads_special_only(playing: Playing, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the last block can make its special tokens alone, from the arguments behind its tokens.

    Masks, biases and rotary tables are made for all tokens; without them no token has a place of its own.
    """
    if is_collected() or not all(role.mode in (None, "kv", "add") for _, role in playing):
        return False
    others: Iterable[Any] = [*args, *kwargs.values()]
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in others)


@torch.compiler.assume_constant_result
def is_watched_between(encoder: nn.Module, paths: tuple[str, ...]) -> bool:
    """Whether anybody has hooks on blocks, and so would see prompt tokens on their way from one to the next."""
    return any(_has_onlookers(submodule(encoder, path)) for path in paths)


@torch.compiler.assume_constant_result
def is_watched_at_end(encoder: nn.Module, root: nn.Module, last: str) -> bool:
    """Whether anybody has hooks on what runs from the last block on, and so would miss tokens."""
    blocks, _, _ = last.rpartition(".")
    around = _around(root, (submodule(encoder, blocks), root.get_submodule("prompt_tuner")))
    return any(_has_onlookers(module) for module in (*submodule(encoder, last).modules(), *around))


def _around(module: nn.Module, passed: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """What is in `module`, but for what was passed already, and for heads that train: they get what was read."""
    for child in module.children():
        if child not in passed and not isinstance(child, AuxiliaryTrainingWrapper):
            yield child
            yield from _around(child, passed)


def _has_onlookers(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all((getattr(hook, "__module__", None) or "").startswith(_KNOWN_HOOKS) for hook in hooks)
