"""Layout: what each block does with the prompts of one adapter, made once when the adapter is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vpt_peft.encoder import EncoderError, EncoderSpec
from vpt_peft.fields import refuse

from .config import PIXEL_LOCATIONS, VPTConfig


@dataclass(frozen=True)
class BlockLayout:
    """What one block does with the prompts of one adapter.

    Args:
        mode: "kv" (prompts are keys and values), "token" (they stand in the sequence), "window" (they run beside the
            windows) or "add" (they are added to the tokens).
        source: Key of the block's own prompts in the adapter's set; `None` if prompts flow in from the block before.
        passes_on: The next block or the head needs what this block makes of the prompts.
    """

    mode: str
    source: str | None = None
    passes_on: bool = False

    @property
    def needs_hooks(self) -> bool:
        """The block's input or output changes; keys and values of its own reach the attention by themselves."""
        return self.mode != "kv" or self.source is None


# One entry per block; `None` where the block sees nothing of the adapter
Layout = tuple[BlockLayout | None, ...]


def prompted_blocks(config: VPTConfig, spec: EncoderSpec) -> list[int]:
    """Indices of the blocks with prompts of their own; empty for prompts that are pixels of the whole image.

    Raises:
        ValueError: An index of `layers_to_transform` is out of range.
    """
    depth = len(spec.blocks)
    if config.prompt_location in ("pad", "channel"):
        return []
    layers = config.layers_to_transform
    if layers is None:
        return list(range(depth)) if config.deep else [0]
    chosen = [layers] if isinstance(layers, int) else list(layers)
    outside = [layer for layer in chosen if layer >= depth]
    if outside:
        raise ValueError(
            f"layers_to_transform={layers!r} names blocks {outside}, but the encoder has {depth} blocks; use indices "
            f"from 0 to {depth - 1}."
        )
    return sorted(depth - 1 - layer for layer in chosen) if config.layers_from_end else chosen


def prompt_counts(config: VPTConfig, spec: EncoderSpec) -> dict[int, int]:
    """Number of prompts of each block that has prompts of its own.

    Raises:
        ValueError: `num_virtual_tokens` is a list of another length, or an index is out of range.
    """
    own, given = prompted_blocks(config, spec), config.num_virtual_tokens
    if not isinstance(given, list):
        return dict.fromkeys(own, given)
    if len(given) != len(own):
        raise ValueError(
            f"num_virtual_tokens={given} has {len(given)} numbers, but {len(own)} blocks have prompts of their own: "
            f"{own}; give one for each, in this order."
        )
    return dict(zip(own, given, strict=True))


def make_layout(config: VPTConfig, spec: EncoderSpec, read: Sequence[bool] | None = None) -> Layout:
    """What each block does for one adapter.

    Args:
        config: The adapter's configuration.
        spec: The encoder.
        read: For each block whether anything reads its output; blocks that nothing reads get no prompts.

    Raises:
        EncoderError: The encoder's blocks cannot do what the configuration asks of them.
        ValueError: A block index is out of range.
    """
    own = prompted_blocks(config, spec)
    depth = len(spec.blocks) if read is None else max(i for i, is_read in enumerate(read) if is_read) + 1
    own = [index for index in own if index < depth]
    first = str(own[0]) if own else None
    layout: list[BlockLayout | None] = [None] * len(spec.blocks)
    present = False
    for index in range(depth):
        owns = index in own
        source = (first if config.share_prompts else str(index)) if owns else None
        if config.prompt_location in ("add", "add_shared"):
            layout[index] = BlockLayout("add", source) if owns else None
            continue
        present = owns or (present and config.propagate)
        if not present:
            continue
        if index + 1 == len(spec.blocks):
            passes_on = config.reads_prompts
        else:
            passes_on = config.propagate and index + 1 < depth and index + 1 not in own
        layout[index] = BlockLayout(_mode(config, spec, index, passes_on), source, passes_on)
    return tuple(layout)


def own_blocks(layout: Layout) -> list[int]:
    """Indices of the prompts in an adapter's set: the blocks with prompts of their own, the first if they are shared."""
    return sorted({int(block.source) for block in layout if block is not None and block.source is not None})


def _mode(config: VPTConfig, spec: EncoderSpec, index: int, needed: bool) -> str:
    block = spec.blocks[index]
    is_known = block.attention.key is not None
    if config.implementation == "kv" and needed:
        raise EncoderError(
            f"implementation='kv' cannot give what block {index} makes of the prompts, which this configuration needs "
            "(prompts flow on, or the head reads them); use implementation='auto'."
        )
    if not needed and config.implementation != "token" and is_known:
        return "kv"
    if block.takes_tokens:
        if config.implementation == "kv":
            raise EncoderError(
                f"implementation='kv': which layers make the keys and values of block {index} ({block.path}) is "
                "not known; use implementation='auto', which runs the prompts as tokens there."
            )
        return "token"
    if block.windowed and block.tail and not spec.special and block.attention.query is not None:
        if block.attention.uses_interface and config.implementation != "token":
            return "window"
    reason = block.no_tokens_reason or "which of its layers make keys and values is not known"
    raise EncoderError(
        f"prompts cannot run as tokens through block {index} ({block.path}) of this encoder: {reason}. Use deep prompts "
        "as keys and values (deep=True, implementation='auto', no pooling over prompts)."
    )


def check_config(config: VPTConfig, spec: EncoderSpec) -> None:
    """Check what depends on the encoder, before anything is made.

    Raises:
        EncoderError: The encoder lacks what the configuration needs.
        ValueError: An index is out of range.
    """
    prompt_counts(config, spec)
    make_layout(config, spec)
    where, first = config.prompt_location, spec.blocks[0]
    pools, takes_class = config.pooling is not None, config.token_type == "class"
    refuse(
        (where in PIXEL_LOCATIONS and (spec.patch_embedding is None or spec.image_size is None),
         f"prompt_location={where!r} needs an encoder that embeds image patches by a convolution; this one does not."),
        (where == "add" and not all(block.takes_tokens for block in spec.blocks),
         f"prompt_location='add' needs one sequence of tokens: {first.no_tokens_reason}."),
        (where == "add_shared" and spec.packed,
         f"prompt_location='add_shared' needs tokens by image: {first.no_tokens_reason}."),
        (config.project_patches and not first.takes_tokens,
         f"project_patches needs one sequence of tokens: {first.no_tokens_reason}."),
        ((pools or takes_class) and spec.final_norm is None,
         f"pooling={config.pooling!r}, token_type={config.token_type!r}: this encoder has no final norm over all its "
         "tokens to pool around; leave both at their defaults."),
        ((config.pooling == "class" or takes_class) and not spec.special,
         "pooling by the class token: this encoder has no class token; use pooling='image' or None."),
        (config.share_prompts and len({spec.blocks[i].width for i in prompted_blocks(config, spec)}) > 1,
         "share_prompts=True: the blocks' widths differ, one set cannot serve them all."),
        ((config.projection_dim or config.project_patches) and len({b.width for b in spec.blocks}) > 1,
         "projection: the blocks' widths differ, one linear map cannot serve them all."),
        error=EncoderError,
    )  # fmt: skip
