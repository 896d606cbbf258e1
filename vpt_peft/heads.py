"""Find the task head of a model: what stands outside its vision encoder and was not pre-trained with it."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .encoder import EncoderSpec
from .encoder.inputs import IMAGE_INPUTS


def find_task_head(model: nn.Module, encoder_path: str, spec: EncoderSpec) -> list[str]:
    """Dotted paths of the modules that make up the task head, empty for a bare backbone.

    A head is what has parameters beside the path from a model "for" a task down to its encoder. Models that hold a
    language model beside the encoder have no head: all their parts are pre-trained.

    Args:
        model: The model, or a PEFT model around it.
        encoder_path: Dotted path of the encoder in it.
        spec: The encoder.
    """
    while isinstance(model, PeftModel):
        model, encoder_path = model.get_base_model(), encoder_path.removeprefix("base_model.model").lstrip(".")
    if "For" not in type(model).__name__ or getattr(model, "main_input_name", None) not in IMAGE_INPUTS:
        return []
    found: list[str] = []
    path, module = "", model
    for name in encoder_path.split(".") if encoder_path else ():
        siblings = [(f"{path}{other}", child) for other, child in module.named_children() if other != name]
        if any(_has_language_model(child) for _, child in siblings):
            return []
        found += [part for sibling, child in siblings for part in _parts(sibling, child)]
        path, module = f"{path}{name}.", getattr(module, name)
    if encoder_path == "":
        children = [(name, child) for name, child in model.named_children() if _outside(name, child, spec)]
        found = [part for name, child in children for part in _parts(name, child)]
    return found


def trained_modules(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """PEFT's wrappers around modules that train (heads). What adapters own is not walked through: there may be many."""
    for child in model.children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            yield child
        elif not isinstance(child, BaseTunerLayer):
            yield from trained_modules(child)


def _has_parameters(module: nn.Module) -> bool:
    return not isinstance(module, BaseTunerLayer) and any(True for _ in module.parameters())


def _parts(path: str, module: nn.Module) -> list[str]:
    """The module's path, or its children's for lists and dicts, which cannot be trained as a whole."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [part for name, child in module.named_children() for part in _parts(f"{path}.{name}", child)]
    return [path] if _has_parameters(module) else []


def _has_language_model(module: nn.Module) -> bool:
    return any(
        isinstance(child, PreTrainedModel) and getattr(child, "main_input_name", "") == "input_ids"
        for child in module.modules()
    )


def _outside(name: str, child: nn.Module, spec: EncoderSpec) -> bool:
    inside = [block.path for block in spec.blocks]
    inside += [path for path in (spec.final_norm, spec.patch_embedding) if path is not None]
    return not any(path == name or path.startswith(name + ".") for path in inside)
