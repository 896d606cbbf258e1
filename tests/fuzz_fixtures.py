"""Models, configurations and measures of the property-based tests.

`make test` runs the same cases each time; `make fuzz` (`VPT_PEFT_FUZZ=<cases>`) draws new ones.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from peft_fixtures import images, randomize, vit
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from vpt_peft import GatedVPTConfig, VPTConfig


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
CAMPAIGN = int(os.environ.get("VPT_PEFT_FUZZ", "0"))


def cases(usual: int, **given: Any) -> settings:
    """Settings for so many cases in `make test`; in a campaign its number is shared out alike among the tests.

    Args:
        usual: Cases of the 200 that every run of the tests has.
        given: Other settings of hypothesis.
    """
    count = max(1, CAMPAIGN * usual // 200) if CAMPAIGN else usual
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=not CAMPAIGN,
        database=None,
        suppress_health_check=quiet,
        **given,
    )


def dinov2() -> nn.Module:
    """DINOv2 with registers."""
    return Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=2, num_labels=5)
    )


def swin() -> nn.Module:
    """Two stages of two blocks, windows of 2 by 2 patches, every second block shifted."""
    return SwinForImageClassification(
        SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2, num_labels=5
        )
    )


def clip() -> nn.Module:
    """A tower without a head."""
    return CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64))


MAKERS = {"vit": vit, "dinov2": dinov2, "swin": swin, "clip": clip}


def make(kind: str) -> nn.Module:
    """A model of random weights in float64, the same ones each time."""
    return randomize(MAKERS[kind]()).double().eval()


PIXELS = images()


def output(model: nn.Module, **given: Any) -> torch.Tensor:
    """Logits, or the pooled output of a tower."""
    result = model(pixel_values=PIXELS, **given)
    return result.logits if "logits" in result else result.pooler_output


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


small = st.integers(1, 5)
flag = st.booleans()
# Each field is left at its default most of the time: fields drawn all at once are nearly always refused
PLAIN: dict[str, st.SearchStrategy] = {
    "num_virtual_tokens": small | st.lists(small, min_size=1, max_size=4),
    "prompt_dropout": st.floats(0, 0.9),
    "projection_dim": small,
    "project_patches": flag,
    "prompt_rank": small,
    "init_prompts": st.sampled_from(["xavier_uniform", "normal", "zeros"]),
    "implementation": st.sampled_from(["auto", "kv", "token"]),
    "pooling": st.sampled_from(["class", "image", "prompt", "image_prompt"]),
    "pool_before_norm": flag,
    "token_type": st.sampled_from(["patch", "class"]),
    "skip_unread": flag,
    "base_in_eval": flag,
    "bias": st.sampled_from(["none", "all", ["value"], ["mlp", "norm"]]),
    "modules_to_save": st.just([]),
    "id2label": st.integers(1, 7).map(lambda count: {i: f"class {i}" for i in range(count)}),
    "propagate": flag,
    "share_prompts": flag,
    "self_check": flag,
}
OF_VPT = {
    "deep": flag,
    "layers_to_transform": st.integers(0, 4) | st.lists(st.integers(0, 4), min_size=1, max_size=3),
    "layers_from_end": flag,
    "prompt_location": st.sampled_from(["prepend", "add", "add_shared", "prepend_pixel", "pad", "channel"]),
}
OF_GATES = {
    "gate": st.sampled_from(["scalar", "elementwise", "none"]),
    "gate_init": st.floats(-10, 10),
    "num_gates": st.integers(0, 4),
    "attention_temperature": flag,
    "temperature_min": st.floats(0.001, 0.9),
    "temperature_max": st.floats(0.5, 20),
}


@st.composite
def configurations(draw: Any) -> tuple[type, dict[str, Any]]:
    """A class and the fields to make it of."""
    gated = draw(st.integers(0, 3)) == 0
    known = {**PLAIN, **(OF_GATES if gated else OF_VPT)}
    names = draw(st.lists(st.sampled_from(sorted(known)), max_size=5, unique=True))
    return (GatedVPTConfig if gated else VPTConfig), {name: draw(known[name]) for name in names}
