"""What the search finds out about a vision encoder: its blocks, norms, attention projections and token layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class EncoderError(ValueError):
    """The model has no vision encoder that prompts can be attached to; the message says why and what to do."""


@dataclass(frozen=True)
class Projection:
    """A linear projection of an attention module and how its output splits into heads.

    Args:
        path: Dotted path of the linear layer, relative to the attention module.
        parts: How many of query, key and value the layer computes at once (1: separate layers, 3: a fused `qkv`).
        part: Index of this projection among the parts.
        heads_first: The output is laid out `(heads, parts, head_dim)` instead of `(parts, heads, head_dim)`.
        norm: Dotted path of a norm applied to the result (a key norm), relative to the attention module.
        norm_per_head: The norm runs over `head_dim`, not over the full width.
        unit_length: The result is scaled to unit length per head (cosine attention).
        bias: Dotted paths of parameters whose concatenation is added to the layer's output, relative to the attention
            module; empty where the layer has its own bias, or none.
        exact: Recognised by its values, not only by vector lengths, which rotary embeddings preserve.
    """

    path: str
    parts: int = 1
    part: int = 0
    heads_first: bool = False
    norm: str | None = None
    norm_per_head: bool = False
    unit_length: bool = False
    bias: tuple[str, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class AttentionSpec:
    """The self-attention of one block.

    Args:
        path: Dotted path of the attention module, relative to the block.
        norm: Dotted path of the norm whose output the attention reads, relative to the block; `None` for post-norm.
        query, key, value: The projections of queries, keys and values, `None` if not found.
        out: Dotted path of the output projection, relative to the attention module; `None` if not found.
        heads: Number of key/value heads.
        head_dim: Width of one head.
        uses_interface: The module calls transformers' `AttentionInterface`; otherwise its torch calls are intercepted.
        eager: The module's own eager attention function, `None` without the interface.
        mask_open: The value a float attention mask holds where attention is allowed.
    """

    path: str
    norm: str | None
    query: Projection | None
    key: Projection | None
    value: Projection | None
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
        width: Hidden size of its tokens.
        tokens: Number of tokens it received in the traced pass.
        attention: Its self-attention.
        argument: Name of the keyword argument that holds its tokens, `None` if they are the first positional one.
        takes_tokens: Prompt tokens can be inserted into its input, of shape `(batch, tokens, width)`.
        no_tokens_reason: Why they cannot; empty if they can.
        windowed: It partitions its tokens into attention windows itself (Swin and similar).
        tail: For windowed blocks, paths of the modules from the second norm to the end, relative to the block.
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
        path: Dotted path of the encoder inside the model ("" for the model itself).
        blocks: Its blocks, in the order they run.
        special: Positions of class, register and other non-patch tokens at the first block's input.
        final_norm: Dotted path of the norm over all tokens after the last block, `None` if there is none.
        patch_embedding: Dotted path of the convolution that embeds the patches of an image, `None` if there is none.
        image_size: (height, width) in pixels of the traced input, `None` if the encoder takes no plain images.
        channels: Number of channels of its images.
        packed: A batch is one sequence `(tokens, width)` without a batch dimension, in which every image attends to
            itself only.
        merges: Patch merging between stages: (index of the next block, dotted paths of norm and reduction in the order
            they run).
        model_type: The encoder config's `model_type`.
        num_prefix_tokens: Number of special tokens in front of the patches; prompts are inserted right after them.
    """

    path: str
    blocks: tuple[BlockSpec, ...]
    special: tuple[int, ...] = ()
    final_norm: str | None = None
    patch_embedding: str | None = None
    image_size: tuple[int, int] | None = None
    channels: int = 3
    packed: bool = False
    merges: tuple[tuple[int, tuple[str, ...]], ...] = ()
    model_type: str = ""
    num_prefix_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        count = 0
        while count in self.special:
            count += 1
        object.__setattr__(self, "num_prefix_tokens", count)


def submodule(root: Any, path: str) -> Any:
    """The module at a dotted path, looked up at each call so that wrappers added later are found."""
    # Most paths are one name, and blocks look up several in each pass
    found = root._modules.get(path)
    if found is not None:
        return found
    for name in path.split(".") if path else ():
        child = root._modules.get(name)
        root = getattr(root, name) if child is None else child
    return root
