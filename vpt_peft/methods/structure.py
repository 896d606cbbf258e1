"""Where the blocks and the task head are in an image classifier of transformers."""

from __future__ import annotations

from typing import TypeAlias, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..encoder import EncoderSpec, find_encoder, submodule
from ..heads import find_task_head
from .modules import SIDE_NAME


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
    """Return the task head as {dotted name: module}, without a side network that a method has put beside it.

    Args:
        model (`PreTrainedModel`): the model.
        spec (`EncoderSpec`, *optional*): its encoder, where it is known.

    Raises:
        EncoderError: the model holds no vision encoder, or several.
    """
    paths = find_task_head(model, None if spec is None else spec.path, spec)
    return {path: model.get_submodule(path) for path in paths if path != SIDE_NAME}
