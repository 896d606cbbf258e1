"""Full attention maps of a prompted model: what every token attends to, prompts included."""

from __future__ import annotations

import torch
from torch import nn

from .attention import AttentionMap
from .encoder import EncoderSpec
from .encoder.trace import in_eval
from .tuners.vpt.forward_pass import recording_maps
from .tuners.vpt.parameters import find_parameters


def attention_maps(
    model: nn.Module, pixel_values: torch.Tensor, adapter_name: str | None = None
) -> list[AttentionMap]:
    """The attention of each block, with the same layout for all methods and blocks.

    Rows are the tokens that the block has without prompts; columns are class and register tokens, prompts, patches, and
    sum to 1. In encoders with windows (Swin) each window is a row of the batch. Everything runs in eval mode, without
    gradients, and with the model's eager attention.

    Args:
        model: A model with a prompt adapter.
        pixel_values: Images `(batch, channels, height, width)`.
        adapter_name: The adapter; `None`: what is active.

    Returns:
        For each block the maps `(batch, heads, tokens, prefix + prompts + patches)` and the names of the columns.

    Raises:
        ValueError: The model has no prompts, or no such adapter.
    """
    parameters = find_parameters(model)
    if parameters is None:
        raise ValueError(f"{type(model).__name__} has no prompts; attach some with get_peft_model.")
    if adapter_name is not None and adapter_name not in parameters.configs:
        known = ", ".join(map(repr, parameters.configs)) or "none"
        raise ValueError(f"adapter_name={adapter_name!r} is not a prompt adapter of this model; it has: {known}.")
    recorded: list[AttentionMap] = []
    with in_eval(model), torch.no_grad(), recording_maps(recorded):
        names = parameters.active_names() if adapter_name is None else [adapter_name]
        with parameters.call(names):
            parameters.encode(pixel_values)
    prefix = _prefix_names(parameters.encoder, parameters.spec)
    return [AttentionMap(found.maps, [*prefix, *found.columns[len(prefix) :]]) for found in recorded]


def _prefix_names(encoder: nn.Module, spec: EncoderSpec) -> list[str]:
    """What the tokens in front of the patches are called."""
    leaves = {name.rsplit(".", 1)[-1] for name, _ in encoder.named_parameters() if "prompt_tuner" not in name}
    has_class = any("cls" in leaf or "class" in leaf for leaf in leaves)
    other = "register" if any("register" in leaf for leaf in leaves) else "prefix"
    names = ["class"] if has_class and spec.num_prefix_tokens else []
    return names + [f"{other}_{index}" for index in range(spec.num_prefix_tokens - len(names))]
