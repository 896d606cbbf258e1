"""What is measured: one frozen ViT with random weights for every method, the weights shared by all of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.encoder import EncoderSpec, find_encoder

from .token_loop import PlainGatedLoop


logger = logging.getLogger(__name__)

MODELS: dict[str, dict[str, int]] = {
    "vit_tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "vit_base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "vit_large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    # For tests of this program
    "vit_test": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8,
    },
}  # fmt: skip
LABELS = 100
FLOOR = "floor"


@dataclass(frozen=True)
class Method:
    """One row of the results.

    Args:
        title: How tables and pictures call it.
        build: Makes the model from a frozen classifier, its encoder and a number of prompts.
        has_prompts: Its cost depends on the number of prompts.
        trains: It can take a training step.
    """

    title: str
    build: Callable[[ViTForImageClassification, EncoderSpec, int], nn.Module]
    has_prompts: bool = True
    trains: bool = True


def _peft(make: Callable[[EncoderSpec, int], PeftConfig]) -> Callable[..., nn.Module]:
    def build(model: ViTForImageClassification, spec: EncoderSpec, prompts: int) -> nn.Module:
        return get_peft_model(model, make(spec, prompts))

    return build


def _trained(names: Callable[[str, nn.Parameter], bool]) -> Callable[..., nn.Module]:
    def build(model: ViTForImageClassification, spec: EncoderSpec, prompts: int) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier") or names(name, parameter))
        return model

    return build


def _lora(spec: EncoderSpec, prompts: int) -> LoraConfig:
    attention = spec.blocks[0].attention
    targets = [each.path.rsplit(".", 1)[-1] for each in (attention.query, attention.value) if each is not None]
    return LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"])


def _merged(model: ViTForImageClassification, spec: EncoderSpec, prompts: int) -> nn.Module:
    prompted: Any = get_peft_model(model, VPTConfig(num_virtual_tokens=prompts))
    prompted.merge_adapter()
    return prompted


def _plain_loop(model: ViTForImageClassification, spec: EncoderSpec, prompts: int) -> nn.Module:
    model.classifier.requires_grad_(True)
    return PlainGatedLoop(model, spec, prompts)


def _vpt(**given: Any) -> Callable[..., nn.Module]:
    return _peft(lambda spec, prompts: VPTConfig(num_virtual_tokens=prompts, **given))


# Methods that are compared with each other stand side by side, so that they run one after the other.
METHODS: dict[str, Method] = {
    # The class token trains, so that the gradient reaches the input of the first block without further work
    FLOOR: Method("no prompts (floor)", _trained(lambda name, _: name.endswith("cls_token")), has_prompts=False),
    "deep_kv": Method("VPT-deep, keys/values", _vpt()),
    "deep_token": Method("VPT-deep, tokens", _vpt(implementation="token")),
    "deep_merged": Method("VPT-deep, merged", _merged, trains=False),
    "shallow": Method("VPT-shallow", _vpt(deep=False)),
    "gated": Method("gated prompts", _peft(lambda spec, prompts: GatedVPTConfig(num_virtual_tokens=prompts))),
    "gated_loop": Method("gated prompts, plain token loop", _plain_loop),
    "lora": Method("LoRA r=8", _peft(_lora), has_prompts=False),
    "bias": Method("bias", _trained(lambda name, p: p.ndim == 1 and name.endswith("bias")), has_prompts=False),
    "linear": Method("linear probe", _trained(lambda name, p: False), has_prompts=False),
    "full": Method("full fine-tuning", _trained(lambda name, p: True), has_prompts=False),
}


@dataclass
class Subject:
    """A model that is measured.

    Args:
        method: Key of `METHODS`.
        prompts: Prompts per prompted block, `None` for methods without.
        model: Called with `pixel_values`; gives logits or an output that holds them.
    """

    method: str
    prompts: int | None
    model: nn.Module

    @property
    def key(self) -> str:
        """Name in the results."""
        return self.method if self.prompts is None else f"{self.method}_{self.prompts}"

    @property
    def trains(self) -> bool:
        """Whether it can take a training step."""
        return METHODS[self.method].trains

    def trainable(self) -> list[nn.Parameter]:
        """The parameters an optimizer gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def make_backbone(
    name: str, dtype: torch.dtype, device: torch.device
) -> tuple[ViTForImageClassification, EncoderSpec]:
    """A ViT classifier with random weights from a fixed seed, and its encoder."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {**MODELS[name], "num_labels": LABELS}
    model: Any = ViTForImageClassification(ViTConfig(**settings)).to(device, dtype)  # type: ignore[arg-type]
    return model, find_encoder(model)


def make_subject(
    backbone: ViTForImageClassification, spec: EncoderSpec, method: str, prompts: int | None = None
) -> Subject:
    """The backbone with a method. All subjects share its weights in memory; no step may change them."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in backbone.parameters()}
    torch.manual_seed(0)
    model = METHODS[method].build(copy.deepcopy(backbone, memo), spec, prompts or 0)
    return Subject(method, prompts, model)


def make_subjects(
    backbone: ViTForImageClassification, spec: EncoderSpec, methods: Sequence[str], prompts: Sequence[int]
) -> list[Subject]:
    """The floor first, then every method with every number of prompts it takes, compared ones next to each other."""
    plain = [make_subject(backbone, spec, m) for m in methods if not METHODS[m].has_prompts and m != FLOOR]
    prompted = [make_subject(backbone, spec, m, p) for p in prompts for m in methods if METHODS[m].has_prompts]
    return [make_subject(backbone, spec, FLOOR), *prompted, *plain]
