"""Configurations and prompts of the official VPT and gated prompt tuning codes, in and out.

The fields are those of the codes' `MODEL.PROMPT` (KMnP/vpt, ryongithub/GatedPromptTuning); the parameters have the
codes' names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .fields import refuse
from .tuners import GatedVPTConfig, VPTConfig
from .tuners.vpt.adapter import PromptAdapter
from .tuners.vpt.layout import own_blocks
from .tuners.vpt.parameter_set import ParameterSet
from .tuners.vpt.parameters import VPTParameters, find_parameters


FAMILIES = ("vit", "moco", "mae", "swin")
LOCATIONS = {
    "prepend": "prepend",
    "add": "add",
    "add-1": "add_shared",
    "prepend-pixel": "prepend_pixel",
    "pad": "pad",
    "below": "channel",
}
POOLINGS = {"original": None, "img_pool": "image", "prompt_pool": "prompt", "imgprompt_pool": "image_prompt"}
DEFAULTS: dict[str, Any] = {
    "NUM_TOKENS": 5,
    "LOCATION": "prepend",
    "INITIATION": "random",
    "PROJECT": -1,
    "DEEP": False,
    "NUM_DEEP_LAYERS": None,
    "REVERSE_DEEP": False,
    "DEEP_SHARED": False,
    "FORWARD_DEEP_NOEXPAND": False,
    "VIT_POOL_TYPE": "original",
    "DROPOUT": 0.0,
    "GATE_PRIOR": False,
    "GATE_NUM": None,
    "GATE_INIT": 5.0,
    "TEMP_LEARN": False,
    "TEMP_NUM": None,
    "TEMP_MIN": 0.01,
    "TEMP_MAX": 10.0,
}
IGNORED = ("CLSEMB_FOLDER", "CLSEMB_PATH", "SAVE_FOR_EACH_EPOCH")


def _choice(name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
    return choices[value]


def config_from_official(prompt_fields: Mapping[str, Any], family: str = "vit") -> VPTConfig:
    """The configuration that an official `MODEL.PROMPT` node describes.

    Args:
        prompt_fields: The node's fields; a missing field has the official default.
        family: Which of the official backbones: "vit" (supervised), "moco", "mae" or "swin". It decides what
            `VIT_POOL_TYPE: original` means and on which side of the final norm means are taken.

    Returns:
        A [`GatedVPTConfig`] if `GATE_PRIOR` or `TEMP_LEARN` is set, else a [`VPTConfig`].

    Raises:
        ValueError: The family or a field's value is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} must be one of {', '.join(map(repr, FAMILIES))}.")
    unknown = sorted(set(prompt_fields) - set(DEFAULTS) - set(IGNORED))
    if unknown:
        warnings.warn(
            f"fields of MODEL.PROMPT that are not known and have no effect: {', '.join(unknown)}", stacklevel=2
        )
    fields = {**DEFAULTS, **prompt_fields}
    if fields["INITIATION"] != "random":
        warnings.warn(
            f"INITIATION={fields['INITIATION']!r}: prompts start at random; call initialize_prompts for a start from data.",
            stacklevel=2,
        )
    pooling = _choice("VIT_POOL_TYPE", fields["VIT_POOL_TYPE"], POOLINGS)
    if pooling is None and family in ("mae", "swin"):
        pooling = "image_prompt"
    arguments: dict[str, Any] = {
        "num_virtual_tokens": fields["NUM_TOKENS"],
        "prompt_location": _choice("LOCATION", fields["LOCATION"], LOCATIONS),
        "pooling": pooling,
        "pool_before_norm": pooling is not None and family in ("moco", "mae"),
        # Prompts that are pixels have no dropout in the official code, whatever the field says.
        "prompt_dropout": 0.0 if fields["LOCATION"] in ("pad", "below") else float(fields["DROPOUT"]),
        "projection_dim": None if fields["PROJECT"] in (-1, None) else fields["PROJECT"],
    }
    if fields["GATE_PRIOR"] or fields["TEMP_LEARN"]:
        return GatedVPTConfig(
            **arguments,
            gate="scalar" if fields["GATE_PRIOR"] else "none",
            gate_init=float(fields["GATE_INIT"]),
            num_gates=fields["GATE_NUM"] if fields["GATE_PRIOR"] else None,
            attention_temperature=bool(fields["TEMP_LEARN"]),
            temperature_min=float(fields["TEMP_MIN"]),
            temperature_max=float(fields["TEMP_MAX"]),
        )
    arguments["deep"] = bool(fields["DEEP"])
    if fields["DEEP"] and fields["NUM_DEEP_LAYERS"] is not None:
        arguments["layers_to_transform"] = list(range(fields["NUM_DEEP_LAYERS"]))
        arguments["layers_from_end"] = bool(fields["REVERSE_DEEP"])
    arguments["share_prompts"] = bool(fields["DEEP"] and fields["DEEP_SHARED"])
    arguments["propagate"] = not fields["FORWARD_DEEP_NOEXPAND"]
    return VPTConfig(**arguments)


def _parameters_of(model: nn.Module, adapter_name: str) -> VPTParameters:
    parameters = find_parameters(model)
    if parameters is None or adapter_name not in parameters.configs:
        known = "none" if parameters is None else ", ".join(map(repr, parameters.configs)) or "none"
        raise ValueError(f"adapter_name={adapter_name!r} is not a prompt adapter of this model; it has: {known}.")
    return parameters


def _parameter(adapter: PromptAdapter, part: str, key: str) -> torch.Tensor:
    """The parameter that one part of an adapter has under `key`."""
    entry: Any = adapter.parts[part][key]  # type: ignore[index]
    return entry if isinstance(entry, torch.Tensor) else entry.weight


def _stage_names(parameters: VPTParameters, own: list[int]) -> list[tuple[str, list[int]]]:
    """Official names of the deep prompts and the blocks in each: one per stage for hierarchical encoders."""
    if own and own[0] == 0:
        own = own[1:]
    if not parameters.spec.merges:
        return [("deep_prompt_embeddings", own)] if own else []
    starts = [0, *(index for index, _ in parameters.spec.merges), len(parameters.spec.blocks)]
    stages = [[i for i in own if a <= i < b] for a, b in zip(starts, starts[1:], strict=False)]
    return [(f"deep_prompt_embeddings_{stage}", blocks) for stage, blocks in enumerate(stages) if blocks]


def _layout(parameters: VPTParameters, name: str) -> dict[str, tuple[str, list[str] | None]]:
    """For each official parameter the part it is made of and that part's entries; `None` for a module as a whole."""
    config, adapter = parameters.configs[name], parameters.adapter(name)
    layout: dict[str, tuple[str, list[str] | None]] = {}
    if config.prompt_location == "pad":
        layout = {f"prompt_embeddings_{key}": ("prompts", [key]) for key in ("tb", "lr")}
    elif config.prompt_location == "channel":
        layout["prompt_embeddings"] = ("prompts", ["0"])
        layout["patch_embeddings"] = ("patch_embedding", None)
    else:
        own = own_blocks(parameters.layouts[name])
        if config.share_prompts:
            layout["prompt_embeddings"] = ("prompts", [str(own[0])])
        else:
            if own[0] == 0:
                layout["prompt_embeddings"] = ("prompts", ["0"])
            for official, blocks in _stage_names(parameters, own):
                layout[official] = ("prompts", [str(block) for block in blocks])
    if "projection" in adapter.parts:
        layout["prompt_proj"] = ("projection", None)
    gates: Any = adapter.parts.get("gates")
    temperatures: Any = adapter.parts.get("temperatures")
    if gates is not None:
        layout["gate_logit"] = ("gates", list(gates))
    if temperatures is not None:
        layout["temp"] = ("temperatures", list(temperatures))
    return layout


def _check_has_names(config: VPTConfig) -> None:
    refuse(
        (getattr(config, "gate", None) == "elementwise",
         "gate='elementwise': the official code has no parameters for this gate."),
        (isinstance(config.num_virtual_tokens, list),
         f"num_virtual_tokens={config.num_virtual_tokens}: the official code has one number for all blocks."),
    )  # fmt: skip


def official_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's values under the official codes' parameter names, as copies.

    Raises:
        ValueError: The model has no such adapter, or the official codes have no name for what it holds.
    """
    parameters = _parameters_of(model, adapter_name)
    _check_has_names(parameters.configs[adapter_name])
    adapter = parameters.adapter(adapter_name)
    result: dict[str, torch.Tensor] = {}
    for official, (part, keys) in _layout(parameters, adapter_name).items():
        if keys is None:
            for leaf, parameter in adapter.parts[part].named_parameters():
                result[f"{official}.{leaf}"] = parameter.detach().clone()
        else:
            join = torch.stack if part == "prompts" else torch.cat
            own = adapter.own_prompts if part == "prompts" else partial(_parameter, adapter, part)
            result[official] = join([own(key).detach() for key in keys])
    return result


def _find(state_dict: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    found = [key for key in state_dict if key == name or key.endswith("." + name)]
    if len(found) > 1:
        raise ValueError(f"{name!r} occurs {len(found)} times in the state dict: {', '.join(sorted(found))}.")
    return state_dict[found[0]] if found else None


def load_official_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str = "default"
) -> None:
    """Put an official checkpoint's prompts into an adapter.

    Args:
        model: A model with the adapter, attached with the configuration of [`config_from_official`].
        state_dict: Parameters under the official names, behind any prefix; everything else in it is ignored.
        adapter_name: The adapter.

    Raises:
        ValueError: Parameters are missing or misshapen (all are listed), or the model has no such adapter. Nothing is
            changed then.
    """
    parameters = _parameters_of(model, adapter_name)
    config = parameters.configs[adapter_name]
    _check_has_names(config)
    if config.prompt_rank is not None:
        raise ValueError(f"prompt_rank={config.prompt_rank}: official prompts are no product; attach without a rank.")
    frame = _fitting_frame(parameters, adapter_name, state_dict)
    adapter = parameters.adapter(adapter_name)
    wrong: list[str] = []
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for official, (part, keys) in _layout(parameters, adapter_name).items():
        if keys is None:
            module = adapter.parts[part]
            targets: dict[str, list[Any]] = {
                f"{official}.{leaf}": [parameter] for leaf, parameter in module.named_parameters()
            }
        else:
            made = frame if part == "prompts" else None
            targets = {official: [_parameter(adapter, part, key) if made is None else made[key] for key in keys]}
        for name, own in targets.items():
            tensor = _find(state_dict, name)
            inner = tuple(own[0].shape)
            shape = inner if keys is None else (len(own), *(inner if part == "prompts" else ()))
            if tensor is None:
                wrong.append(f"{name} is missing (shape {shape})")
            elif tuple(tensor.shape) != shape:
                wrong.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
            else:
                pieces = [tensor] if keys is None else list(tensor.unbind(0))
                copies += [(p, piece.reshape(p.shape)) for p, piece in zip(own, pieces, strict=True)]
    if wrong:
        raise ValueError(f"the official state dict does not fit adapter {adapter_name!r}: {'; '.join(wrong)}.")
    with torch.no_grad():
        for parameter, value in copies:
            parameter.copy_(value)
    if frame is not None:
        getattr(parameters, f"{adapter.prefix}prompts")[adapter_name] = frame


def _fitting_frame(
    parameters: VPTParameters, name: str, state_dict: Mapping[str, torch.Tensor]
) -> ParameterSet | None:
    """For 'pad', prompts for the image size of the checkpoint, where it differs from the one assumed at attach time."""
    if parameters.configs[name].prompt_location != "pad":
        return None
    rows, columns = (_find(state_dict, f"prompt_embeddings_{key}") for key in ("tb", "lr"))
    width = 2 * parameters.configs[name].most_tokens
    if rows is None or columns is None or rows.dim() != 4 or columns.dim() != 4:
        return None
    if rows.shape[:3] != (1, 3, width) or columns.shape[:2] != (1, 3) or columns.shape[3] != width:
        return None
    old = _parameter(parameters.adapter(name), "prompts", "tb")
    made = ParameterSet(
        {"tb": tuple(rows.shape[1:]), "lr": tuple(columns.shape[1:])}, device=old.device, dtype=old.dtype
    )
    return made.requires_grad_(old.requires_grad)
