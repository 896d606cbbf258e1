"""Methods applied to models."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..encoder import EncoderSpec
from ..heads import trained_modules
from ..tuners import VPTConfig
from ..tuners.vpt.parameters import find_parameters
from . import baselines, peft_configs
from .modules import keep_frozen_in_eval
from .options import MethodOptions
from .registry import METHODS
from .structure import find_head


def configure(model: Any, name: str, options: MethodOptions, spec: EncoderSpec | None = None) -> PeftConfig | None:
    """Return the PEFT configuration of a method for a model; None for a method without one.

    Args:
        model (`PreTrainedModel`): the model.
        name (`str`): key of `METHODS`.
        options (`MethodOptions`): numbers and fields of the method.
        spec (`EncoderSpec`, *optional*): the model's encoder; by default it is found when needed.
    """
    function = METHODS[name].configure
    return getattr(peft_configs, function)(model, options, spec) if function else None


def apply_method(
    model: Any, name: str, options: MethodOptions, spec: EncoderSpec | None = None
) -> PeftModel | nn.Module:
    """Make a model ready for a method: only what the method trains, and the head, has `requires_grad`.

    Args:
        model (`PreTrainedModel`): changed in place.
        name (`str`): key of `METHODS`.
        options (`MethodOptions`): numbers and fields of the method.
        spec (`EncoderSpec`, *optional*): the model's encoder; by default it is found when the method asks for it, which
            takes a model with weights.

    Returns:
        A `PeftModel` for prompts and LoRA, else `model`.

    Raises:
        ValueError: the method is unknown or does not fit the model.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; choose one of {', '.join(METHODS)}.")
    method = METHODS[name]
    config = configure(model, name, options, spec)
    if config is not None:
        return attach(model, config)
    model.requires_grad_(not method.modify)
    if method.modify:
        trained = getattr(baselines, method.modify)(model, options, spec)
        prompts = find_parameters(model)
        # Prompts, where there are some, know the encoder
        head = list(find_head(model, spec if prompts is None else prompts.spec).values())
        for module in head:
            module.requires_grad_(True)
        keep_frozen_in_eval(model, [*trained, *head])
    return model


def attach(model: Any, config: PeftConfig) -> PeftModel:
    """Attach an adapter to a model whose frozen parts then stay in eval mode, as prompts keep them by themselves."""
    adapted = get_peft_model(model, config)
    if not isinstance(config, VPTConfig):
        keep_frozen_in_eval(model, list(trained_modules(model)))
    return adapted
