"""What happens to an adapter whose file is of an earlier version, or does not fit."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from vpt_peft.heads import unwrap_heads

from .biases import as_offsets
from .parameters import VPTParameters


def take_saved_biases(
    parameters: VPTParameters, prefix: str, adapter_name: str, state_dict: dict[str, torch.Tensor], root: str
) -> dict[str, torch.Tensor]:
    """Offsets for the biases of the backbone that version 0.1 saved for `bias="all"`, out of a file's other tensors.

    Args:
        parameters: The parameters.
        prefix: Of the method's containers.
        adapter_name: The adapter.
        state_dict: What a file holds beside prompts; the backbone's biases are taken out of it.
        root: Dotted path of the model from the one that is loaded into.

    Raises:
        ValueError: The encoder has no such bias.
    """
    wanted = getattr(parameters, f"{prefix}biases", {})
    if adapter_name not in wanted:
        return {}
    encoder = next(path for path, module in parameters.root.named_modules() if module is parameters.encoder)
    start = "".join(f"{part}." for part in (root, encoder) if part)
    for key in [key for key in state_dict if key.endswith(".original_module.bias")]:
        del state_dict[key]
    found = [
        key for key in state_dict if key.startswith(start) and key.endswith(".bias") and "modules_to_save." not in key
    ]
    biases = {key.removeprefix(start).removesuffix(".bias"): state_dict.pop(key) for key in found}
    return {f"{prefix}biases.{adapter_name}.{key}": value for key, value in as_offsets(parameters, biases).items()}


def check_fit(parameters: VPTParameters, adapter_name: str, found: dict[str, torch.Tensor]) -> None:
    """Compare an adapter file's tensors with what the adapter has in this encoder.

    Raises:
        ValueError: Some are missing, left over or of another shape; all are listed.
    """
    wanted = {key: tuple(value.shape) for key, value in parameters.parameters_of(adapter_name).items()}
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} has no place" for key in found if key not in wanted]
    wrong += [
        f"{key} has shape {tuple(value.shape)}, expected {wanted[key]}"
        for key, value in found.items()
        if key in wanted and tuple(value.shape) != wanted[key]
    ]
    if wrong:
        raise ValueError(
            f"the adapter file does not fit adapter {adapter_name!r} on this encoder of {len(parameters.spec.blocks)} blocks of "
            f"width {parameters.spec.blocks[0].width}: {'; '.join(wrong)}. Load it onto the backbone it was trained on, with "
            "the configuration it was saved with (num_virtual_tokens, layers_to_transform, gate, ...)."
        )


def take_out(model: Any, parameters: VPTParameters, adapter_name: str) -> None:
    """Remove an adapter that was attached only to be loaded; one that has been trained or loaded before stays."""
    if not isinstance(getattr(model, "base_model", None), BaseTuner) or not parameters.is_as_drawn(adapter_name):
        return
    if list(model.peft_config) == [adapter_name]:
        unwrap_heads(model, use_original=True)
        model.base_model.unload()
        del model.peft_config[adapter_name]
    else:
        model.delete_adapter(adapter_name)
