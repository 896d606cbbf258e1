"""Gated prompt tuning on any transformers vision encoder."""

from __future__ import annotations

from vpt_peft.tuners.vpt.model import VPTModel


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
