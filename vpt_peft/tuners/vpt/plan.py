"""What each block does with the prompts of one adapter, derived from its configuration and the encoder."""

from __future__ import annotations

from dataclasses import dataclass

from vpt_peft.encoder import EncoderError, EncoderSpec

from .config import PIXEL_LOCATIONS, VPTConfig


@dataclass(frozen=True)
class Role:
    """The part one block plays for one adapter.

    Args:
        mode: "kv" (prompts are keys and values), "token" (they stand in the sequence), "side" (they run beside the
            windows), "add" (they are added to the tokens) or `None` (the block sees nothing of the adapter).
        source: Key of the prompts it uses in the adapter's set, `None` if prompts flow in from the block before.
        keeps_output: What the block makes of the prompts is needed, by the next block or by the head.
        gated: A gate mixes the prompts' outputs with their inputs.
        temperature: The block's attention has a learnable temperature.
    """

    mode: str | None = None
    source: str | None = None
    keeps_output: bool = False
    gated: bool = False
    temperature: bool = False

    @property
    def idle(self) -> bool:
        return self.mode is None and not self.temperature


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


def gated_blocks(config: VPTConfig, spec: EncoderSpec) -> list[int]:
    """Indices of the blocks whose prompt outputs pass a gate: the first `num_gates`, never the last block.

    Raises:
        ValueError: More gates than blocks after which a gate has a meaning.
    """
    if getattr(config, "gate", "none") == "none":
        return []
    most = len(spec.blocks) - 1
    wanted = getattr(config, "num_gates", None)
    if wanted is not None and wanted > most:
        raise ValueError(f"num_gates={wanted} is more than the {most} blocks that have a block behind them.")
    return list(range(most if wanted is None else wanted))


def make_roles(config: VPTConfig, spec: EncoderSpec) -> list[Role]:
    """The role of every block of the encoder for one adapter.

    Raises:
        EncoderError: The encoder's blocks cannot do what the configuration asks of them.
        ValueError: A block index or a number of gates is out of range.
    """
    own, gates = prompted_blocks(config, spec), gated_blocks(config, spec)
    temperature = bool(getattr(config, "attention_temperature", False))
    first = str(min(own)) if own else None
    last = len(spec.blocks) - 1
    if config.prompt_location in ("add", "add_shared"):
        return [
            Role("add", first if config.share_prompts else str(index)) if index in own else Role()
            for index in range(last + 1)
        ]
    roles, present = [], False
    for index in range(last + 1):
        owns = index in own
        present = owns or (present and config.propagate)
        if not present:
            roles.append(Role(temperature=temperature))
            continue
        if index == last:
            needed = config.reads_prompts
        else:
            needed = config.propagate and index + 1 not in own
        source = (first if config.share_prompts else str(index)) if owns else None
        mode = _mode(config, spec, index, needed)
        roles.append(Role(mode, source, needed, needed and index in gates, temperature))
    return roles


def _mode(config: VPTConfig, spec: EncoderSpec, index: int, needed: bool) -> str:
    block = spec.blocks[index]
    has_maps = block.attention.key is not None
    if config.implementation == "kv" and needed:
        raise EncoderError(
            f"implementation='kv' cannot give what block {index} makes of the prompts, which this configuration needs "
            "(prompts flow on, or the head reads them); use implementation='auto'."
        )
    if not needed and config.implementation != "token" and has_maps:
        return "kv"
    if block.takes_tokens:
        if config.implementation == "kv":
            raise EncoderError(
                f"implementation='kv': it is not known which maps make the keys and values of block {index} "
                f"({block.path}); use implementation='auto', which runs the prompts as tokens there."
            )
        return "token"
    if block.windowed and block.tail and not spec.special and block.attention.query is not None:
        if block.attention.uses_interface and config.implementation != "token":
            return "side"
    reason = block.no_tokens_reason or "it is not known which maps make its keys and values"
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
    make_roles(config, spec)
    where = config.prompt_location
    if where in PIXEL_LOCATIONS and (spec.patch_embedding is None or spec.image_size is None):
        raise EncoderError(
            f"prompt_location={where!r} needs an encoder that embeds image patches by a convolution; this one does not."
        )
    if where == "add" and not all(block.takes_tokens for block in spec.blocks):
        raise EncoderError(f"prompt_location='add' needs one sequence of tokens: {spec.blocks[0].no_tokens_reason}.")
    if config.project_patches and not spec.blocks[0].takes_tokens:
        raise EncoderError(f"project_patches needs one sequence of tokens: {spec.blocks[0].no_tokens_reason}.")
    if getattr(config, "attention_temperature", False) and any(b.attention.key is None for b in spec.blocks):
        raise EncoderError("attention_temperature needs attention that is known; set attention_temperature=False.")
    if (config.pooling is not None or config.token_type == "class") and spec.final_norm is None:
        raise EncoderError(
            f"pooling={config.pooling!r}, token_type={config.token_type!r}: this encoder has no final norm over all its "
            "tokens to pool around; leave both at their defaults."
        )
    if (config.pooling == "class" or config.token_type == "class") and not spec.special:
        raise EncoderError("pooling by the class token: this encoder has no class token; use pooling='image' or None.")
    if config.share_prompts and len({spec.blocks[i].width for i in prompted_blocks(config, spec)}) > 1:
        raise EncoderError("share_prompts=True: the blocks' widths differ, one set cannot serve them all.")
    if (config.projection_dim or config.project_patches) and len({b.width for b in spec.blocks}) > 1:
        raise EncoderError("projection: the blocks' widths differ, one linear map cannot serve them all.")
