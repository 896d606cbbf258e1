"""Gated prompt tuning on any transformers vision encoder."""

from __future__ import annotations

from typing import Any

from vpt_peft.encoder import EncoderError, EncoderSpec
from vpt_peft.tuners.vpt.model import VPTModel

from .layer import GatedPromptAdapter


class GatedVPTModel(VPTModel):
    """Gated prompt tuning: prompts enter once, and gates decide how far each block changes them.

    Yoo et al., "Improving Visual Prompt Tuning for Self-supervised Vision Transformers", ICML 2023 (arXiv 2306.05067):
    Zi = gi · Ẑi + (1 - gi) · Z(i-1) with gi = sigmoid(γi), and one learnable attention temperature per block.

    Args:
        model: A transformers model with a vision encoder.
        config ([`GatedVPTConfig`]): The configuration.
        adapter_name: The name of the adapter.
        low_cpu_mem_usage: Create the prompts on the meta device, for loading.

    Example:

        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForImageClassification
        >>> from vpt_peft import GatedVPTConfig

        >>> vit = AutoModelForImageClassification.from_pretrained("facebook/vit-mae-base", num_labels=10)
        >>> model = get_peft_model(vit, GatedVPTConfig(num_virtual_tokens=100, pooling="image_prompt"))
    """

    prefix: str = "gated_prompt_"
    adapter_cls = GatedPromptAdapter

    def check_config(self, config: Any, spec: EncoderSpec) -> None:
        """Check what depends on the encoder, before anything is made.

        Raises:
            EncoderError: A block's attention is not known, so that it can have no temperature.
            ValueError: More gates than blocks with a block behind them.
        """
        super().check_config(config, spec)
        most = len(spec.blocks) - 1
        if config.num_gates is not None and config.num_gates > most:
            raise ValueError(
                f"num_gates={config.num_gates} is more than the {most} blocks that have a block behind them."
            )
        if config.attention_temperature and any(block.attention.key is None for block in spec.blocks):
            raise EncoderError("attention_temperature needs attention that is known; set attention_temperature=False.")
