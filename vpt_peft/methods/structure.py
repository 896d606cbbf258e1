"""Where the blocks and the task head are in an image classifier of transformers."""

from __future__ import annotations

import re
from typing import TypeAlias, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..encoder import EncoderSpec, find_encoder, submodule
from ..heads import find_task_head


_DENSE = re.compile(r"For\w*(Detection|Segmentation)$")
Classifier: TypeAlias = PeftModel | PreTrainedModel


def base_model(model: Classifier) -> PreTrainedModel:
    """Return the transformers model itself, without the PEFT model around it where there is one."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def find_blocks(model: nn.Module, spec: EncoderSpec | None = None) -> list[nn.Module]:
    """Return the transformer blocks of the model's vision encoder in the order they run, as prompts count them.

    Args:
        model (`nn.Module`): holds the encoder.
        spec (`EncoderSpec`, *optional*): the encoder, where it is known.

    Raises:
        EncoderError: the model holds no vision encoder with self-attention, or several.
    """
    spec = spec or find_encoder(model)
    encoder = submodule(model, spec.path)
    return [submodule(encoder, block.path) for block in spec.blocks]


def find_final_norm(model: nn.Module, spec: EncoderSpec | None = None) -> nn.Module | None:
    """Return the norm that reads all tokens of the last block, or None where there is none."""
    spec = spec or find_encoder(model)
    return None if spec.final_norm is None else submodule(submodule(model, spec.path), spec.final_norm)


def find_output_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return the dotted name and the module of the last linear layer onto the labels.

    Raises:
        ValueError: no linear layer has `config.num_labels` outputs.
    """
    num_labels = model.config.num_labels
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_labels]
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with num_labels={num_labels} outputs; load it with "
            "AutoModelForImageClassification."
        )
    return linears[-1]


def find_head(model: PreTrainedModel, spec: EncoderSpec | None = None) -> dict[str, nn.Module]:
    """Return the task head as {dotted name: module}: the top-level modules that lead to the labels.

    A model with two heads (distilled DeiT) gives both. Where the head sits inside the backbone's own module (timm
    wrappers) the output layer alone is the head. Of a model for boxes or masks it is all that is no encoder: neck,
    decoder and head.

    Args:
        model (`PreTrainedModel`): the model.
        spec (`EncoderSpec`, *optional*): its encoder, where it is known.

    Raises:
        ValueError: no linear layer has `config.num_labels` outputs.
    """
    if _DENSE.search(type(model).__name__):
        spec = spec or find_encoder(model)
        return {path: model.get_submodule(path) for path in find_task_head(model, spec.path, spec)}
    name, output_layer = find_output_layer(model)
    num_labels = model.config.num_labels
    head = {
        child_name: child
        for child_name, child in model.named_children()
        if not any(isinstance(m, nn.ModuleList) for m in child.modules())
        and any(isinstance(m, nn.Linear) and m.out_features == num_labels for m in child.modules())
    }
    return head or {name: output_layer}
