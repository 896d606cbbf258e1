"""Models, watches and measures for the tests of what work is left out, and of who makes it run in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import draw
from peft import PeftModel, get_peft_model
from peft_fixtures import randomize, vit
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    PreTrainedModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from vpt_peft import VPTConfig
from vpt_peft.tuners.vpt import layer as layer_module
from vpt_peft.tuners.vpt.store import VPTPromptStore, find_store


EXACT = 1e-12
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def images(count: int = 3) -> torch.Tensor:
    return draw(count, 3, 32, 32, seed=1).double()


def prompted(model: PreTrainedModel, config: VPTConfig) -> PeftModel:
    return randomize(get_peft_model(model, config), seed=3, trainable_only=True)


def the_store(model: nn.Module) -> VPTPromptStore:
    store = find_store(model)
    assert store is not None
    return store


class Watch:
    """Counts of tokens that the last block's MLP gets and of insertions of prompt tokens, seen without hooks."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.insertions = 0
        mlp: Any = the_store(model).layers[-1].block.mlp
        forward, insert = type(mlp).forward, layer_module.insert_tokens

        def seen(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            if module is mlp:
                self.tokens.append(hidden.shape[1])
            return forward(module, hidden)

        def counted(*args: Any) -> torch.Tensor:
            self.insertions += 1
            return insert(*args)

        # Of the class: a forward pass replaced on the module itself counts as an onlooker
        monkeypatch.setattr(type(mlp), "forward", seen)
        monkeypatch.setattr(layer_module, "insert_tokens", counted)


def results(model: PeftModel, **given: Any) -> list[torch.Tensor]:
    """Logits and the gradients of everything that trains."""
    model.zero_grad()
    logits = model(images(), **given).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None)]


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    assert len(one) == len(other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _clip() -> PreTrainedModel:
    vision = {**SIZES, "projection_dim": 16}
    return CLIPForImageClassification(CLIPConfig(vision_config=vision, text_config={"hidden_size": 32}, num_labels=5))


# The model, and whether its output depends on special tokens alone
READERS: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "vit": (vit, True),
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**SIZES, num_labels=5)), True),
    "vit_msn": (lambda: ViTMSNForImageClassification(ViTMSNConfig(**SIZES, num_labels=5)), True),
    "dinov2": (lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, num_labels=5)), False),
    "ijepa": (lambda: IJepaForImageClassification(IJepaConfig(**SIZES, num_labels=5)), False),
    "clip": (_clip, False),
    "yolos": (
        lambda: YolosForObjectDetection(
            YolosConfig(**{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3, use_mid_position_embeddings=False)
        ),
        False,
    ),
    "yolos_positions_between": (
        lambda: YolosForObjectDetection(YolosConfig(**{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3)),
        False,
    ),
}
