"""What is known of a vision encoder once it has been looked at: its blocks, norms, attention maps and token layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any


class EncoderError(ValueError):
    """The model holds no vision encoder that prompts can be attached to; the message says why and what to do."""


@dataclass(frozen=True)
class HeadMap:
    """One linear map of an attention module and how its output splits into heads.

    Args:
        path: Dotted path of the map, relative to the attention module.
        parts: How many of query, key and value the map makes at once (1: split maps, 3: a fused `qkv`).
        part: Which of the parts is meant.
        heads_first: The output is laid out `(heads, parts, head_dim)` instead of `(parts, heads, head_dim)`.
        norm: Dotted path of a norm on the result (a key norm), relative to the attention module.
        norm_per_head: The norm runs over `head_dim`, not over the full width.
        unit_length: The result is scaled to unit length per head (cosine attention).
        exact: The map was recognised by its values, not only by lengths that rotary embeddings leave alone.
    """

    path: str
    parts: int = 1
    part: int = 0
    heads_first: bool = False
    norm: str | None = None
    norm_per_head: bool = False
    unit_length: bool = False
    exact: bool = True


@dataclass(frozen=True)
class AttentionSpec:
    """The self-attention of one block.

    Args:
        path: Dotted path of the attention module, relative to the block.
        norm: Dotted path of the norm whose output the attention reads, relative to the block; `None` for post-norm.
        query, key, value: The maps that make queries, keys and values, `None` where none was found.
        out: The map that joins the heads, `None` where none was found.
        heads: Number of key/value heads.
        head_dim: Width of one head.
        uses_interface: The module calls transformers' `AttentionInterface`; else its torch calls are intercepted.
        eager: The eager function the module falls back to, `None` without the interface.
        mask_open: The value a float attention mask holds where attention is allowed.
    """

    path: str
    norm: str | None
    query: HeadMap | None
    key: HeadMap | None
    value: HeadMap | None
    out: str | None
    heads: int
    head_dim: int
    uses_interface: bool
    eager: Callable | None = None
    mask_open: float = 0.0


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block of the encoder.

    Args:
        path: Dotted path, relative to the encoder.
        width: Width of its tokens.
        tokens: Number of tokens it received while traced.
        attention: Its self-attention.
        argument: Name of the argument that holds its tokens, `None` if they come first by position.
        takes_tokens: Prompt tokens may stand in its input sequence, of shape `(batch, tokens, width)`.
        no_tokens_reason: Why not, where they may not.
        windowed: Its attention runs in windows, which it cuts itself (Swin and its kin).
        tail: Modules from the second norm to the end, for windowed blocks (relative paths).
    """

    path: str
    width: int
    tokens: int
    attention: AttentionSpec
    argument: str | None = None
    takes_tokens: bool = True
    no_tokens_reason: str = ""
    windowed: bool = False
    tail: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderSpec:
    """A vision encoder as found inside a model.

    Args:
        path: Dotted path of the encoder in the model it was found in ("" for the model itself).
        blocks: Its blocks, in the order they run.
        special: Positions of class, register and other non-patch tokens at the first block's input.
        final_norm: Dotted path of the norm over all tokens after the last block, `None` if there is none.
        patch_embedding: Dotted path of the convolution that embeds patches, `None` if there is none.
        image_size: (height, width) in pixels of the input it was traced with.
        merges: Patch mergings between stages: (index of the next block, dotted paths of the norm and reduction in the
            order they run).
        model_type: The encoder config's `model_type`.
        joins: Prompt tokens may stay in the sequence from one block to the next (tried out when prompts are attached).
        reads_special: The output of the whole model depends on the special tokens of the last block alone, and the block
            can make them alone (tried out when prompts are attached).
    """

    path: str
    blocks: tuple[BlockSpec, ...]
    special: tuple[int, ...] = ()
    final_norm: str | None = None
    patch_embedding: str | None = None
    image_size: tuple[int, int] | None = None
    merges: tuple[tuple[int, tuple[str, ...]], ...] = ()
    model_type: str = ""
    joins: bool = False
    reads_special: bool = False

    @property
    def prefix(self) -> int:
        """Number of special tokens in front of the patches: prompts stand right behind them."""
        count = 0
        while count in self.special:
            count += 1
        return count


def submodule(root: Any, path: str) -> Any:
    """The module at a dotted path, looked up at each call so that wrappers added later are found."""
    for name in _names(path):
        child = root._modules.get(name)
        root = getattr(root, name) if child is None else child
    return root


@cache
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()
