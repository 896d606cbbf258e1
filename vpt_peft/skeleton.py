"""A model under any method, on the meta device: all of its structure and none of its weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from .encoder import EncoderSpec, submodule
from .heads import trained_modules
from .training.baselines import MLPHead, add_bottleneck_adapters, add_side_network, keep_frozen_in_eval
from .training.structure import find_head, find_output_layer
from .tuners import GatedVPTConfig, VPTConfig
from .tuners.vpt.parameters import VPTParameters


SAFETENSORS_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class MethodOptions:
    """What the methods leave open, with the defaults of `vpt-peft train`.

    Args:
        num_virtual_tokens: Prompts per prompted block.
        lora_r: Rank of LoRA.
        partial_blocks: Last blocks that `partial` trains.
        mlp_layers: Linear layers of the head of `mlp`.
        adapter_reduction: Hidden size over the width of a bottleneck adapter.
        fields: Further fields of `VPTConfig` or `GatedVPTConfig`.
    """

    num_virtual_tokens: int = 10
    lora_r: int = 8
    partial_blocks: int = 1
    mlp_layers: int = 3
    adapter_reduction: int = 8
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "lora_r", "partial_blocks", "mlp_layers", "adapter_reduction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def prompt_config(method: str, options: MethodOptions) -> VPTConfig:
    """The configuration of `vpt`, `vpt_shallow` or `gated_vpt`."""
    given = {"num_virtual_tokens": options.num_virtual_tokens, **options.fields}
    if method == "gated_vpt":
        return GatedVPTConfig(**given)
    return VPTConfig(deep=method == "vpt", **given)


def apply_method(model: Any, spec: EncoderSpec, method: str | PeftConfig, options: MethodOptions) -> nn.Module:
    """Make a model on the meta device ready for a method: only what the method trains has `requires_grad`.

    Args:
        model: Changed in place.
        spec: Its encoder, as found in the model with its weights.
        method: A name out of `METHODS`, or a PEFT configuration.

    Raises:
        ValueError: The method does not fit the model.
    """
    model.requires_grad_(method == "full")
    if method == "full":
        return model
    if isinstance(method, str) and method in _BASELINES:
        trained = _BASELINES[method](model, spec, options)
        head = list(find_head(model).values())
        for module in head:
            module.requires_grad_(True)
        keep_frozen_in_eval(model, [*trained, *head])
        return model
    if method == "lora":
        config: PeftConfig = _lora_config(model, spec, options)
    elif isinstance(method, str):
        config = prompt_config(method, options)
    else:
        # PEFT writes into the configuration it is given
        config = copy.deepcopy(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not isinstance(config, VPTConfig):
            adapted = get_peft_model(model, config)
            keep_frozen_in_eval(model, list(trained_modules(adapted)))
            return adapted
        # With the store in place the encoder is not traced again, which takes weights
        VPTParameters(spec, submodule(model, spec.path), model).attach()
        adapted = get_peft_model(model, config)
    return adapted


def _blocks(model: nn.Module, spec: EncoderSpec) -> list[nn.Module]:
    encoder = submodule(model, spec.path)
    return [submodule(encoder, block.path) for block in spec.blocks]


def _lora_config(model: Any, spec: EncoderSpec, options: MethodOptions) -> LoraConfig:
    attention = spec.blocks[0].attention
    if attention.query is None or attention.value is None:
        raise ValueError(f"method='lora' finds no query and value maps in {type(model).__name__}; pass a LoraConfig.")
    targets = sorted({each.path.rsplit(".", 1)[-1] for each in (attention.query, attention.value)})
    rank = options.lora_r
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=list(find_head(model)))


def _partial(model: Any, spec: EncoderSpec, options: MethodOptions) -> list[nn.Module]:
    blocks = _blocks(model, spec)
    if options.partial_blocks > len(blocks):
        raise ValueError(f"partial_blocks={options.partial_blocks} but the encoder has {len(blocks)} blocks.")
    last = blocks[-options.partial_blocks :]
    if spec.final_norm is not None:
        last.append(submodule(submodule(model, spec.path), spec.final_norm))
    for module in last:
        module.requires_grad_(True)
    return last


def _mlp(model: Any, spec: EncoderSpec, options: MethodOptions) -> list[nn.Module]:
    name, output_layer = find_output_layer(model)
    head = MLPHead(output_layer.in_features, output_layer.out_features, options.mlp_layers)
    model.set_submodule(name, head.to(output_layer.weight))
    return [head]


def _bias(model: Any, spec: EncoderSpec, options: MethodOptions) -> list[nn.Module]:
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if parameter.ndim == 1 and (last == "bias" or last.endswith("_bias")):
            parameter.requires_grad_(True)
    return []


def _adapter(model: Any, spec: EncoderSpec, options: MethodOptions) -> list[nn.Module]:
    return _like(model, add_bottleneck_adapters(_blocks(model, spec), options.adapter_reduction))


def _sidetune(model: Any, spec: EncoderSpec, options: MethodOptions) -> list[nn.Module]:
    return _like(model, [add_side_network(model, find_output_layer(model)[1])])


def _like(model: nn.Module, modules: Any) -> list[nn.Module]:
    """Added modules in the device and dtype of the model."""
    parameter: torch.Tensor = next(p for p in model.parameters() if p.is_floating_point())
    return [module.to(parameter) for module in modules]


_BASELINES: dict[str, Callable[[Any, EncoderSpec, MethodOptions], list[nn.Module]]] = {
    "linear": lambda model, spec, options: [],
    "partial": _partial,
    "mlp": _mlp,
    "bias": _bias,
    "adapter": _adapter,
    "sidetune": _sidetune,
}
METHODS: tuple[str, ...] = ("vpt", "vpt_shallow", "gated_vpt", "lora", *_BASELINES, "full")


def saved_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    """What is written to disk, by the names in the file."""
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
    """Size of the `.safetensors` file that would hold `tensors`: 8 bytes, a JSON header padded to 8, the values."""
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
