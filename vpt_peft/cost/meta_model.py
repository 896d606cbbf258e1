"""The meta model: a model under any method without data, all of its structure and none of its weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from ..encoder import EncoderSpec, submodule
from ..methods import MethodOptions
from ..methods.apply import apply_method, attach, configure
from ..tuners import VPTConfig
from ..tuners.vpt.parameters import VPTParameters


SAFETENSORS_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def apply_to_meta_model(model: Any, spec: EncoderSpec, method: str | PeftConfig, options: MethodOptions) -> nn.Module:
    """Make a model on the meta device ready for a method: only what the method trains has `requires_grad`.

    Args:
        model (`PreTrainedModel`): changed in place.
        spec (`EncoderSpec`): its encoder, as found in the model with its weights.
        method (`str` or `PeftConfig`): a name of `METHODS`, or a PEFT configuration.
        options (`MethodOptions`): numbers and fields of the method.

    Raises:
        ValueError: the method does not fit the model.
    """
    if not isinstance(method, str):
        # PEFT writes into the configuration it is given
        config = copy.deepcopy(method)
    elif (configured := configure(model, method, options, spec)) is not None:
        config = configured
    else:
        return apply_method(model, method, options, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not isinstance(config, VPTConfig):
            return attach(model, config)
        # With the prompts' parameters in place the encoder is not traced again, which takes weights; PEFT takes them for
        # an earlier adapter, beside which it freezes nothing
        model.requires_grad_(False)
        parameters = VPTParameters(spec, submodule(model, spec.path), model)
        parameters.attach()
        # Attaching tries this field out, which takes weights too
        skip_unread, config.skip_unread = config.skip_unread, False
        adapted = attach(model, config)
        if skip_unread:
            config.skip_unread = True
            last = parameters.layers[-1]
            last.add("default", last.layouts["default"], config)
        return adapted


def saved_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    """Return what is saved to disk, by the names in the file."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(trained) < sum(1 for _ in model.parameters()):
        return trained
    whole = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return whole
    # Files keep the names of the checkpoints they came from
    return revert_weight_conversion(model, whole)


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the size of a `.safetensors` file with `tensors`: 8 bytes, a JSON header padded to 8, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        dtype = SAFETENSORS_NAMES.get(tensor.dtype, "I64")
        header[name] = {
            "dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.nbytes]
        }  # fmt: skip
        position += tensor.nbytes
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + text + -text % 8 + position
