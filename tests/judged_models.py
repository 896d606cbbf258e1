"""Prompts of five kinds on four encoders, for the checks of test_peft_judgement.py and test_peft_judgement_files.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_fixtures import MAKERS
from peft import (
    PeftModel,
    get_peft_model,
)
from peft_fixtures import images, randomize
from torch import nn

from vpt_peft import GatedVPTConfig, VPTConfig


KINDS: dict[str, Callable[..., VPTConfig]] = {
    "deep": lambda **given: VPTConfig(num_virtual_tokens=3, **given),
    "shallow": lambda **given: VPTConfig(num_virtual_tokens=3, deep=False, **given),
    "partly deep": lambda **given: VPTConfig(num_virtual_tokens=3, layers_to_transform=[0, 2], **given),
    "pooled": lambda **given: VPTConfig(num_virtual_tokens=3, pooling="image", **given),
    "gated": lambda **given: GatedVPTConfig(num_virtual_tokens=3, gate_init=0.0, **given),
}
ENCODERS = ("vit", "dinov2", "swin", "clip")
REFUSED = {("clip", "pooled"): "no final norm over all its tokens"}
BASES: dict[str, nn.Module] = {}
PIXELS = images(3, torch.float32)


def base(encoder: str) -> nn.Module:
    """A fresh model with the same random weights each time."""
    if encoder not in BASES:
        BASES[encoder] = randomize(MAKERS[encoder]()).float().eval()
    return copy.deepcopy(BASES[encoder])


def output(model: nn.Module, **given: Any) -> torch.Tensor:
    result = model(pixel_values=PIXELS, **given)
    return result.logits if "logits" in result else result.pooler_output


def still(model: nn.Module, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return output(model, **given)


def attach(encoder: str, kind: str, name: str = "default", **given: Any) -> PeftModel:
    """A model in eval mode whose adapter holds values."""
    model = get_peft_model(base(encoder), KINDS[kind](**given), adapter_name=name)
    return randomize(model, 1, trainable_only=True).eval()  # type: ignore[return-value]


every = pytest.mark.parametrize(
    ("encoder", "kind"), [(e, k) for e in ENCODERS for k in KINDS if (e, k) not in REFUSED]
)
