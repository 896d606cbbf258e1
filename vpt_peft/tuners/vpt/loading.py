"""What happens to an adapter whose file is of an earlier version, or does not fit."""

from __future__ import annotations

import torch
from torch import nn

from .adapter_file import differences, refuse_misfit, wrong_values
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
        ValueError: Some are missing, left over, of another shape or type, or not finite; all are listed.
    """
    wanted = {key: tuple(value.shape) for key, value in parameters.parameters_of(adapter_name).items()}
    wrong = differences(wanted, {key: tuple(value.shape) for key, value in found.items()})
    wrong += [
        f"{key} holds {value.dtype}, not floating-point numbers"
        for key, value in found.items()
        if not value.is_floating_point()
    ]
    wrong += [why for key, value in found.items() if (why := wrong_values(key, value))]
    refuse_misfit(f"the file of adapter {adapter_name!r}", wrong, parameters.spec)


def check_others(
    model: nn.Module, parameters: VPTParameters, adapter_name: str, others: dict[str, torch.Tensor]
) -> None:
    """Check that what a file holds beside prompts is the adapter's own: its copies of heads.

    Raises:
        ValueError: It holds values of the backbone, of another adapter or of a head without adapters, or some that are
            not finite.
    """
    mine = f".modules_to_save.{adapter_name}."
    foreign = {key.removeprefix("base_model.model.") for key in others if mine not in key}
    wrong = []
    if foreign:
        named = {key.removeprefix("base_model.model.") for key in model.state_dict()}
        wrong = [f"{key} is not a part of the adapter" for key in sorted(foreign & named)]
    wrong += [why for key, value in others.items() if mine in key and (why := wrong_values(key, value))]
    refuse_misfit(f"the file of adapter {adapter_name!r}", wrong, parameters.spec)
