"""The PEFT configurations of prompts and LoRA."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from ..encoder import EncoderSpec, find_encoder
from ..tuners import GatedVPTConfig, VPTConfig
from .options import MethodOptions
from .structure import find_head


def vpt(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> VPTConfig:
    """Prompts in every block."""
    return VPTConfig(num_virtual_tokens=options.num_virtual_tokens, **options.fields)


def vpt_bias(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> VPTConfig:
    """Prompts in every block, and the backbone's biases."""
    return VPTConfig(num_virtual_tokens=options.num_virtual_tokens, **{"bias": "all", **options.fields})


def vpt_shallow(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> VPTConfig:
    """Prompts in the first block."""
    return VPTConfig(num_virtual_tokens=options.num_virtual_tokens, deep=False, **options.fields)


def vpt_gated(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> GatedVPTConfig:
    """Prompts in the first block, gated on their way through the others."""
    return GatedVPTConfig(num_virtual_tokens=options.num_virtual_tokens, **options.fields)


def lora(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> LoraConfig:
    """LoRA on the query and value projections (or on the fused one), with alpha twice the rank.

    Raises:
        ValueError: the projections of the attention are not known.
    """
    attention = (spec or find_encoder(model)).blocks[0].attention
    known = [each for each in (attention.query, attention.value) if each is not None]
    # A fused projection holds both, also where the queries alone were not recognised
    if len(known) < 2 and not any(each.parts > 1 for each in known):
        raise ValueError(
            f"method='lora' finds no query and value projections in {type(model).__name__}; use PEFT's LoraConfig."
        )
    targets = sorted({each.path.rsplit(".", 1)[-1] for each in known})
    rank = options.lora_r
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=list(find_head(model, spec))
    )
