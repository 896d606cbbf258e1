"""The file of an adapter, checked against a model before anything is attached or allocated."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from vpt_peft.encoder import EncoderSpec
from vpt_peft.files import open_regular
from vpt_peft.heads.find import base_model

from .adapter import PromptAdapter
from .config import VPTConfig
from .layout import Layout
from .parameters import VPTParameters


# The file that PEFT loads in this thread, which tells a tuner only afterwards
file_in_loading: ContextVar[AdapterFile | None] = ContextVar("file_in_loading", default=None)
FLOATS = ("F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")
# exp() of more is infinite in float32
MOST_LOGIT = 88.0


class AdapterFile:
    """Names, shapes and types of the tensors in an adapter file; values are read one after the other.

    Args:
        path: A safetensors file, or a `.bin` of plain tensors, which torch reads without running code.
        prefix: What PEFT puts before the paths of heads: where the model is in its `PeftModel`.
        ignore_sizes: Heads of another size are left to PEFT (`ignore_mismatched_sizes`).
        is_renamed: PEFT renames what is beside the prompts (`key_mapping`), so heads are left to it.

    Raises:
        OSError: It is missing, or no regular file.
        ValueError: It is damaged, or holds something else than tensors.
    """

    def __init__(
        self, path: str | os.PathLike, prefix: str, ignore_sizes: bool = False, is_renamed: bool = False
    ) -> None:
        self.path, self.prefix, self.ignore_sizes, self.is_renamed = Path(path), prefix, ignore_sizes, is_renamed
        open_regular(self.path).close()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        if self.path.suffix == ".bin":
            for key, value in self._load("meta").items():
                self.shapes[key], self.types[key] = tuple(value.shape), str(value.dtype)
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    entry = file.get_slice(key)
                    self.shapes[key], self.types[key] = tuple(entry.get_shape()), entry.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}); download it again, or save it again.") from error

    def _load(self, device: str) -> dict[str, torch.Tensor]:
        try:
            tensors = torch.load(self.path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path} holds no plain tensors ({reason}); save it as safetensors.") from error
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError(f"{self.path} is not a dict of tensors; save it as safetensors.")
        return tensors

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, one after the other."""
        if self.path.suffix == ".bin":
            yield from self._load("cpu").items()
            return
        with safe_open(self.path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                yield key, file.get_tensor(key)

    def check(
        self, cls: type[PromptAdapter], parameters: VPTParameters, config: VPTConfig, layout: Layout, heads: list[str]
    ) -> None:
        """Compare the file with what an adapter of this configuration has on this model; heads' sizes come apart.

        Args:
            cls: What a forward pass uses the adapter as.
            parameters: Of the encoder; they need not be attached.
            config: The adapter's configuration.
            layout: What each block does for it.
            heads: Dotted paths of its heads.

        Raises:
            ValueError: Tensors are missing, left over, of another shape or type, or not finite; all are listed.
        """
        owner = VPTParameters(parameters.spec, parameters.encoder, parameters.root, parameters.read)
        owner.heads = {**parameters.heads, "": heads}
        parts = cls.make_parts(owner, config, layout, {"device": torch.device("meta"), "dtype": torch.float32})
        wanted = {
            f"{cls.prefix}{part}.{key}": tuple(value.shape)
            for part, module in parts.items()
            for key, value in module.named_parameters()
        }
        names = {key: prompt_key(cls.prefix, key) for key in self.shapes}
        found = {name: self.shapes[key] for key, name in names.items() if name is not None}
        is_old = config.bias == "all" and not any(name.startswith(f"{cls.prefix}biases.") for name in found)
        if is_old:
            # Version 0.1 saved the backbone's own; they are turned into offsets later, or refused
            wanted = {name: shape for name, shape in wanted.items() if not name.startswith(f"{cls.prefix}biases.")}
        states = head_states(parameters.root, heads)
        allowed = [*heads, *(config.given("modules_to_save") or ())]
        wrong = differences(wanted, found)
        if not self.is_renamed:
            wrong += [f"{key} is missing" for key in states if f"{self.prefix}{key}" not in self.shapes]
        wrong += [
            f"{key} is not a part of the adapter"
            for key, name in names.items()
            if name is None and not is_old and not self.is_renamed and not _is_under(key, allowed)
        ]
        wrong += [
            f"{key} holds {self.types[key]}, not floating-point numbers"
            for key, name in names.items()
            if self.types[key] not in FLOATS
            and (name is not None or _expects_floats(key.removeprefix(self.prefix), states))
        ]
        wrong += _too_few(config, heads, sum(math.prod(self.shapes[k]) for k, name in names.items() if name is None))
        self._refuse(wrong, parameters.spec)
        self._refuse([why for key, value in self.tensors() if (why := wrong_values(key, value))], parameters.spec)

    def check_heads(self, parameters: VPTParameters, heads: list[str], built: Mapping[str, nn.Module]) -> None:
        """Compare the heads' sizes.

        Args:
            parameters: Of the encoder.
            heads: Dotted paths of the heads.
            built: Those that are made to fit the adapter's labels, by path.

        Raises:
            ValueError: Some differ; all are listed.
        """
        if self.ignore_sizes or self.is_renamed:
            return
        states = head_states(parameters.root, heads, built)
        found = {key: self.shapes[f"{self.prefix}{key}"] for key in states if f"{self.prefix}{key}" in self.shapes}
        self._refuse(differences({key: tuple(value.shape) for key, value in states.items()}, found), parameters.spec)

    def _refuse(self, wrong: list[str], spec: EncoderSpec) -> None:
        refuse_misfit(f"the adapter file {str(self.path)!r}", wrong, spec)


def prompt_key(prefix: str, key: str) -> str | None:
    """`vpt_prompts.3` for `base_model.model.prompt_tuner.vpt_prompts.3`; `None` for what is beside the prompts."""
    match = re.match(rf"^(?:.*\.)?prompt_tuner\.({prefix}[a-z_]+\..+)$", key)
    return match[1] if match else None


def head_states(
    root: nn.Module, heads: list[str], built: Mapping[str, nn.Module] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that the copies of heads will have, by path from the model."""
    states: dict[str, torch.Tensor] = {}
    for path in heads:
        module = (built or {}).get(path) or base_model(root).get_submodule(path)
        original: Any = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        states |= {f"{path}.{key}": value for key, value in original.state_dict().items()}
    return states


def differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, left over or of another shape, in words."""
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} has no place" for key in found if key not in wanted]
    wrong += [
        f"{key} has shape {shape}, expected {wanted[key]}"
        for key, shape in found.items()
        if key in wanted and shape != wanted[key]
    ]
    return wrong


def wrong_values(key: str, value: torch.Tensor) -> str | None:
    """Why the values of a tensor cannot be used, in words."""
    if not value.is_floating_point() or value.is_meta:
        return None
    if not value.isfinite().all():
        return f"{key} holds NaN or infinite values"
    is_gate = re.search(r"gates\.(?:.*\.)?\d+\.(weight|bias)$", key) is not None and value.dim() == 1
    if (is_gate or "temperatures." in key) and value.abs().max() > MOST_LOGIT:
        return f"{key} holds {value.abs().max().item():g}; beyond {MOST_LOGIT:g} its exponential overflows"
    return None


def refuse_misfit(what: str, wrong: list[str], spec: EncoderSpec, most: int = 8) -> None:
    """Raise an error that lists what is wrong with a file, if anything is.

    Raises:
        ValueError: Something is.
    """
    if wrong:
        more = f"; and {len(wrong) - most} more" if len(wrong) > most else ""
        raise ValueError(
            f"{what} does not fit this model, whose encoder has {len(spec.blocks)} blocks of width "
            f"{spec.blocks[0].width}: {'; '.join(wrong[:most])}{more}. Load it onto the backbone it was trained on, with "
            "the configuration it was saved with (num_virtual_tokens, layers_to_transform, gate, id2label, ...)."
        )


def _is_under(key: str, paths: Collection[str]) -> bool:
    is_internal = ".original_module." in key or ".modules_to_save." in key
    return not is_internal and any(f".{path}." in f".{key}" for path in paths)


def _expects_floats(key: str, states: Mapping[str, torch.Tensor]) -> bool:
    state = states.get(key)
    return state is None or state.is_floating_point()


def _too_few(config: VPTConfig, heads: list[str], values: int) -> list[str]:
    """A head has a value for each label at least; without them it is not worth making one."""
    labels = config.given("id2label") or {}
    return [f"its heads hold {values:,} values for {len(labels):,} labels"] if heads and values < len(labels) else []
