"""The baselines that prompts are compared with. Each changes a frozen model and returns what trains beside the head."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..encoder import EncoderSpec, find_encoder, submodule
from ..tuners.vpt.parameters import VPTParameters, find_parameters
from . import peft_configs
from .modules import MLPHead, add_bottleneck_adapters, add_side_network
from .options import MethodOptions
from .structure import find_blocks, find_final_norm, find_output_layer


def linear(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """The head alone."""
    return []


def mlp(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """A head of several layers in place of the linear one."""
    name, output_layer = find_output_layer(model)
    head = MLPHead(output_layer.in_features, output_layer.out_features, options.mlp_layers)
    model.set_submodule(name, head.to(output_layer.weight))
    return [head]


def bias(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """All biases of the backbone."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        # Position-bias tables are matrices: weights in all but name
        if parameter.ndim == 1 and (last == "bias" or last.endswith("_bias")):
            parameter.requires_grad_(True)
    return []


def partial(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """The last blocks and the final norm; the norm stays in eval mode.

    Raises:
        ValueError: the encoder has fewer blocks.
    """
    spec = spec or find_encoder(model)
    blocks = find_blocks(model, spec)
    if options.partial_blocks > len(blocks):
        raise ValueError(f"partial_blocks={options.partial_blocks} but the encoder has {len(blocks)} blocks.")
    last, norm = blocks[-options.partial_blocks :], find_final_norm(model, spec)
    for module in last if norm is None else (*last, norm):
        module.requires_grad_(True)
    return last


def adapter(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """A bottleneck behind every block."""
    spec = spec or find_encoder(model)
    widths = [block.width for block in spec.blocks]
    adapters = add_bottleneck_adapters(find_blocks(model, spec), widths, options.adapter_reduction)
    return [module.to(_floating(model)) for module in adapters]


def vpt_lora(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """Prompts in every block, and LoRA on the query and value projections."""
    prompts = _add_prompts(model, options, spec)
    config = peft_configs.lora(model, options, prompts.spec)
    config.modules_to_save = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name="lora")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    added = [part for layer in layers for part in (layer.lora_A, layer.lora_B)]
    return _training([prompts, *added])


def vpt_adapter(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """Prompts in every block, and a bottleneck behind it."""
    prompts = _add_prompts(model, options, spec)
    return _training([prompts, *adapter(model, options, prompts.spec)])


def _add_prompts(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> VPTParameters:
    config = peft_configs.vpt(model, options, spec)
    config.modules_to_save = []
    if spec is not None:
        # With their parameters in place the encoder is not traced again, which takes weights
        VPTParameters(spec, submodule(model, spec.path), model).attach()
    inject_adapter_in_model(config, model)
    return cast(VPTParameters, find_parameters(model))


def _training(modules: list[nn.Module]) -> list[nn.Module]:
    """Let modules train: each adapter that is put in freezes those before it."""
    for module in modules:
        module.requires_grad_(True)
    return modules


def sidetune(model: Any, options: MethodOptions, spec: EncoderSpec | None) -> list[nn.Module]:
    """A small network beside the backbone."""
    return [add_side_network(model, find_output_layer(model)[1]).to(_floating(model))]


def _floating(model: nn.Module) -> torch.Tensor:
    """A parameter that has the device and dtype of the model."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())
