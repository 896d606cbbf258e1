"""What happens to an adapter whose file does not fit."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from .parameters import VPTParameters


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
        model.base_model.unload()
        del model.peft_config[adapter_name]
    else:
        model.delete_adapter(adapter_name)
