"""Find the task head of a model: what reads its vision encoder and was not pre-trained with it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from vpt_peft.encoder import EncoderSpec, describe_encoder, find_encoder_path
from vpt_peft.encoder.inputs import IMAGE_INPUTS
from vpt_peft.encoder.quantized import has_packed_weights


# What PEFT appends to `modules_to_save` by itself.
GUESSES = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_HEAD_NAME = re.compile(r"(^|_)(head|heads|classifier|classifiers|fc|logits|predictor|decoder)(_|\d|$)")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def find_task_head(model: nn.Module, encoder_path: str | None = None, spec: EncoderSpec | None = None) -> list[str]:
    """Dotted paths of the modules that make up the task head; empty for a bare backbone.

    In a `...ForX` model it is all that has parameters beside the path down to the encoder, and for timm's wrapper what
    is called a head behind the blocks. In a class of the user's own it is what is defined after the encoder or called a
    head, other pre-trained models excepted. Larger models with a language model have no head: their parts are
    pre-trained. A warning names parts that stay frozen where nothing looks like a head.

    Args:
        model: The model, or a PEFT model around it.
        encoder_path: Dotted path of the encoder in it; by default it is found.
        spec: The encoder; by default it is run where its class alone does not tell.

    Returns:
        Paths from the model that PEFT's model is around.

    Raises:
        EncoderError: No path is given and the model has no vision encoder, or several.
    """
    root = base_model(model)
    if encoder_path is None:
        encoder_path = find_encoder_path(root)
    elif root is not model:
        encoder_path = encoder_path.removeprefix("base_model.model").lstrip(".")
    heads: list[str] = []
    left: list[str] = []
    in_task, prefix, module = False, "", root
    for name in encoder_path.split(".") if encoder_path else ():
        in_task = in_task or _is_task_model(module)
        siblings = [(other, child) for other, child in module.named_children() if other != name]
        languages = any(_has_language_model(child) for _, child in siblings)
        if in_task and languages:
            return []
        if in_task:
            heads += _join(prefix, siblings)
        elif not _is_pretrained_class(module):
            names = list(dict(module.named_children()))
            after = set() if languages else set(names[names.index(name) :])
            siblings = [(other, child) for other, child in siblings if not _has_pretrained(child)]
            chosen = [(other, child) for other, child in siblings if other in after or _HEAD_NAME.search(other)]
            heads += _join(prefix, chosen)
            left += [] if languages else _join(prefix, [pair for pair in siblings if pair not in chosen])
        prefix, module = f"{prefix}{name}.", getattr(module, name)
    found, rest = _inside(module, spec)
    heads += [f"{prefix}{path}" for path in found]
    left += [f"{prefix}{path}" for path in rest]
    if left and not heads:
        warnings.warn(
            f"{type(root).__name__}: no task head was found, so {', '.join(left)} stay frozen and are not saved; name "
            f"what should train, as in modules_to_save={left[-1:]}.",
            stacklevel=2,
        )
    return heads


def base_model(model: nn.Module) -> nn.Module:
    """The model that PEFT models are around."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def trained_modules(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """PEFT's wrappers around modules that train (heads). What adapters own is not walked through: there may be many."""
    for child in model.children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            yield child
        elif not isinstance(child, BaseTunerLayer):
            yield from trained_modules(child)


def modules_to_wrap(
    model: nn.Module, names: list[str] | None, head: list[str], task_type: str | None = None
) -> list[str]:
    """Dotted paths of the modules an adapter trains and saves.

    A name is a path, or else the end of paths. Of modules inside one another the outer one is taken. Names that PEFT
    appends because of a `task_type` are dropped where the model lacks them, and count as none given where they are all.

    Args:
        model: The model, or a PEFT model around it.
        names: `modules_to_save` of the configuration; `None` for the head.
        head: What `find_task_head` found.
        task_type: `task_type` of the configuration.

    Raises:
        ValueError: The model has a head and lacks a name.
    """
    guesses = GUESSES.get(str(getattr(task_type, "value", task_type)), ())
    if names is None or (names and set(names) <= set(guesses)):
        return head
    paths = list(_module_paths(base_model(model)))
    found: list[str] = []
    lacking = []
    for name in dict.fromkeys(names):
        matches = [name] if name in paths else [path for path in paths if path.endswith(f".{name}")]
        found += matches
        if not matches and name not in guesses:
            lacking.append(name)
    if lacking and head:
        raise ValueError(
            f"modules_to_save={names!r}: the model has no module {', '.join(lacking)}; its head is {head}."
        )
    if lacking:
        warnings.warn(f"modules_to_save: this backbone has no {', '.join(lacking)}; left out.", stacklevel=2)
    return [path for path in dict.fromkeys(found) if not any(path.startswith(f"{other}.") for other in found)]


def check_task_type(model: nn.Module, paths: Iterable[str], task_type: str | None) -> None:
    """Check that PEFT, which wraps modules again by the ends of their paths for some task types, meets heads only.

    Args:
        model: The model, or a PEFT model around it.
        paths: What is wrapped, and what `modules_to_save` holds when PEFT reads it.
        task_type: `task_type` of the configuration.

    Raises:
        ValueError: Other modules, in a head or beside it, have such a name too.
    """
    kind, wrapped = str(getattr(task_type, "value", task_type)), list(paths)
    if kind not in GUESSES or not wrapped:
        return
    # For sequence classification PEFT appends its guesses before the head is found, else behind
    names = tuple(wrapped) if kind == "SEQ_CLS" else (*wrapped, *GUESSES[kind])
    clash = [path for path in _module_paths(base_model(model)) if path.endswith(names) and path not in wrapped]
    if clash:
        raise ValueError(
            f"task_type={kind!r}: PEFT then wraps every module whose path ends in one of {list(names)}, here also "
            f"{', '.join(clash)}; leave task_type out."
        )


def _module_paths(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Paths of all modules but those that adapters own."""
    for name, child in module.named_children():
        yield f"{prefix}{name}"
        if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from _module_paths(child, f"{prefix}{name}.")


def _is_task_model(module: nn.Module) -> bool:
    named = re.search(r"For[A-Z]", type(module).__name__) is not None
    return named and getattr(module, "main_input_name", None) in IMAGE_INPUTS


def _is_pretrained_class(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _extends_task_model(module: nn.Module) -> bool:
    """Whether a class is made of a model for a task, as transformers has it: what is no encoder in it is a head too."""
    bases = type(module).__mro__
    return any(re.search(r"For[A-Z]", base.__name__) and base.__module__.startswith("transformers.") for base in bases)


def _has_pretrained(module: nn.Module) -> bool:
    return any(isinstance(child, PreTrainedModel) for child in module.modules())


def _has_language_model(module: nn.Module) -> bool:
    return any(
        isinstance(child, PreTrainedModel) and getattr(child, "main_input_name", "") == "input_ids"
        for child in module.modules()
    )


def _has_parameters(module: nn.Module) -> bool:
    return not isinstance(module, BaseTunerLayer) and any(True for _ in module.parameters())


def _join(prefix: str, children: Iterable[tuple[str, nn.Module]]) -> list[str]:
    return [part for name, child in children for part in _parts(f"{prefix}{name}", child)]


def _parts(path: str, module: nn.Module) -> list[str]:
    """The module's path, or its children's for lists and dicts, which cannot be trained as a whole."""
    if isinstance(module, _CONTAINERS):
        return _join(f"{path}.", module.named_children())
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return []
    return [path] if _has_parameters(module) else []


def _inside(encoder: nn.Module, spec: EncoderSpec | None) -> tuple[list[str], list[str]]:
    """Heads, and other parts behind the blocks, in the child of an encoder that holds its blocks."""
    if _is_pretrained_class(encoder) and not _is_task_model(encoder):
        return [], []
    spec = spec or describe_encoder(encoder)
    known = [block.path for block in spec.blocks]
    known += [path for path in (spec.final_norm, spec.patch_embedding) if path is not None]
    heads: list[str] = []
    left: list[str] = []
    prefix, module = "", encoder
    while True:
        children = list(module.named_children())
        outside = [(n, child) for n, child in children if not any(_is_at(path, f"{prefix}{n}") for path in known)]
        holder = next(
            (n for n, _ in children if all(_is_at(block.path, f"{prefix}{n}") for block in spec.blocks)), None
        )
        if _is_pretrained_class(module) or (module is encoder and _extends_task_model(module)):
            heads += _join(prefix, outside if module is encoder else [])
        else:
            behind = _behind(children, holder)
            wide = module is encoder and _is_task_model(module)
            chosen = [
                (n, child)
                for n, child in outside
                if not _is_norm(child) and (_HEAD_NAME.search(n) or (wide and n in behind))
            ]
            heads += _join(prefix, chosen)
            rest = [(n, child) for n, child in outside if n in behind and not _is_norm(child)]
            left += _join(prefix, [pair for pair in rest if pair not in chosen])
        if holder is None or isinstance(getattr(module, holder), (nn.Sequential, *_CONTAINERS)):
            return heads, left
        prefix, module = f"{prefix}{holder}.", getattr(module, holder)


def _behind(children: list[tuple[str, nn.Module]], holder: str | None) -> set[str]:
    """Names of the children that are defined after the one that holds the blocks."""
    names = [name for name, _ in children]
    return set(names[names.index(holder) + 1 :]) if holder is not None else set()


def _is_at(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(f"{ancestor}.")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def check_heads(model: nn.Module, names: Iterable[str]) -> None:
    """Check that the modules that are going to train hold no quantised weights.

    Raises:
        ValueError: Some do.
    """
    packed = [
        path
        for path, module in model.named_modules()
        if any(f".{name}." in f".{path}." for name in names) and has_packed_weights(module)
    ]
    if packed:
        raise ValueError(
            f"modules_to_save: {', '.join(packed)} has quantised weights, which cannot train; leave it as it is when the "
            "model is quantised (modules_to_not_convert, for bitsandbytes llm_int8_skip_modules), or pass "
            "modules_to_save=[]."
        )
