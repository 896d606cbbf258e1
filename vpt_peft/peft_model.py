"""Additions to `PeftModel` where PEFT leaves no hook: cards that say how to load, and loads that fit or change nothing.

Each calls PEFT's own method and acts only on prompt adapters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from .files import read_json
from .heads import unwrap_heads
from .heads.find import base_model
from .tuners.vpt.adapter_file import AdapterFile, file_in_loading
from .tuners.vpt.config import VPTConfig
from .tuners.vpt.parameters import find_parameters


TAGS = ("vpt_peft", "visual-prompt-tuning")
# How a program runs or starts an adapter; everything else says what it computes
_OF_THE_PROGRAM = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode", "backbone",
     "implementation", "self_check", "base_in_eval", "prompt_dropout", "init_prompts", "init_weights", "gate_init",
     "modules_to_save", "id2label", "target_modules", "exclude_modules"}
)  # fmt: skip
_TEMPLATE_GAP = "Use the code below to get started with the model.\n\n[More Information Needed]"


def loading_snippet(model: PeftModel, adapter: str) -> str:
    """Python code that loads a model's prompt adapters.

    Args:
        model: The model.
        adapter: The folder or Hub id it loads from.
    """
    first, *others = [name for name, config in model.peft_config.items() if isinstance(config, VPTConfig)]
    named = "" if first == "default" else f', adapter_name="{first}", subfolder="{first}"'
    lines = ["import vpt_peft  # pip install vpt_peft: makes the method known to PEFT"]
    base = model.get_base_model()
    known = getattr(base, "name_or_path", "") or model.peft_config[first].base_model_name_or_path
    if known and type(base).__module__.startswith("transformers."):
        lines += ["from peft import AutoPeftModel", "", f'adapter = "{adapter}"  # this folder, or its id on the Hub']
        lines.append(f"model = AutoPeftModel.from_pretrained(adapter{named})")
    else:
        lines += ["from peft import PeftModel", "", f'adapter = "{adapter}"  # this folder, or its id on the Hub']
        lines.append(f"# backbone: the {type(base).__name__} that the adapter was trained on")
        lines.append(f"model = PeftModel.from_pretrained(backbone, adapter{named})")
    for name in others:
        folder = "" if name == "default" else f', subfolder="{name}"'
        lines.append(f'model.load_adapter(adapter, "{name}"{folder})')
    return "\n".join(lines)


def complete_card(model: PeftModel, folder: str, adapter: str) -> None:
    """Let the card in `folder` name the package and show how to load; one that does already stays as it is.

    Args:
        model: The model.
        folder: Where README.md is.
        adapter: What the code in the card loads from.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    if "import vpt_peft" not in card.text:
        code = f"```python\n{loading_snippet(model, adapter)}\n```"
        if _TEMPLATE_GAP in card.text:
            card.text = card.text.replace(_TEMPLATE_GAP, code)
        else:
            card.text = f"{card.text.rstrip()}\n\n## How to load\n\n{code}\n"
    card.save(path)


def read_config(model_id: str | os.PathLike, **hub: Any) -> PeftConfig | None:
    """The configuration of an adapter of this package; `None` for other methods and where there is none.

    Args:
        model_id: A folder or Hub id.
        hub: `subfolder`, `revision`, `cache_dir`, `token` and others of `hf_hub_download`.

    Raises:
        OSError: The file cannot be read, or is no regular file.
        ValueError: It is not a JSON object, or a field has a wrong value; the message names the file.
    """
    path = _find(model_id, CONFIG_NAME, **hub)
    if path is None:
        return None
    fields = read_json(path)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(fields.get("peft_type"))  # type: ignore[arg-type]
    if cls is None or not issubclass(cls, VPTConfig):
        return None
    fields.pop("runtime_config", None)
    try:
        return cls.from_peft_type(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def find_weights(model_id: str | os.PathLike, **hub: Any) -> Path:
    """The file with an adapter's weights, downloaded where it is on the Hub.

    Raises:
        FileNotFoundError: There is none.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        path = _find(model_id, name, **hub)
        if path is not None:
            return path
    raise FileNotFoundError(f"{str(model_id)!r} holds no {SAFETENSORS_WEIGHTS_NAME} beside its {CONFIG_NAME}.")


def _find(model_id: str | os.PathLike, name: str, **hub: Any) -> Path | None:
    subfolder = hub.pop("subfolder", None)
    local = Path(model_id, subfolder or "", name)
    # Also what is no regular file, which is refused when it is opened
    if os.path.lexists(local):
        return local
    if Path(model_id).is_dir():
        return None
    try:
        return Path(hf_hub_download(str(model_id), name, subfolder=subfolder, **hub))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def check_same_configuration(here: PeftConfig, file: PeftConfig, adapter_name: str, model_id: str) -> None:
    """Check that a file for an adapter that is there already has the adapter's configuration.

    Raises:
        ValueError: Fields that say what the adapter computes differ.
    """
    if type(here) is not type(file):
        raise ValueError(
            f"adapter_name={adapter_name!r} is a {type(here).__name__}, {model_id} holds a {type(file).__name__}; call "
            f"delete_adapter({adapter_name!r}) first, or choose another name."
        )
    different = [
        f"{name}={getattr(file, name)!r} (here {getattr(here, name)!r})"
        for name in file.to_dict()
        if name not in _OF_THE_PROGRAM and getattr(here, name) != getattr(file, name)
    ]
    labels = [None if config.id2label is None else len(config.id2label) for config in (file, here)]  # type: ignore[attr-defined]
    if None not in labels and labels[0] != labels[1]:
        different.append(f"id2label of {labels[0]} labels (here {labels[1]})")
    if different:
        raise ValueError(
            f"adapter_name={adapter_name!r} is on this model with another configuration than {model_id} has: "
            f"{', '.join(different)}. Call delete_adapter({adapter_name!r}) first, or choose another name."
        )


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    """Take out the prompt adapters that the block has added when it raises, and set back what trains, modes and hooks."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        (held, held.copy())
        for module, _ in modes
        for name, held in vars(module).items()
        if name.endswith("_hooks") and isinstance(held, dict)
    ]
    before = find_parameters(model)
    names = set() if before is None else set(before.configs)
    configs = getattr(model, "peft_config", None)
    of_adapters = dict(configs or {})
    try:
        yield
    except BaseException:
        after = find_parameters(model)
        if after is not None and before is None:
            after.labels.use(None)
            unwrap_heads(model, use_original=True)
            after.detach()
        elif after is not None:
            for name in set(after.configs) - names:
                after.take(name)
            unwrap_heads(model, only_empty=True)
        if configs is None:
            vars(model).pop("peft_config", None)
        else:
            configs.clear()
            configs.update(of_adapters)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        for module, mode in modes:
            module.training = mode
        for held, entries in hooks:
            held.clear()
            held.update(entries)
        raise


def _is_own(config: Any) -> bool:
    return isinstance(config, VPTConfig)


def _has_prompts(model: PeftModel) -> bool:
    return any(isinstance(config, VPTConfig) for config in model.peft_config.values())


def _hub_arguments(given: dict[str, Any]) -> dict[str, Any]:
    known = signature(hf_hub_download).parameters
    return {key: value for key, value in given.items() if key in known and value is not None}


@contextmanager
def _loading(
    model: nn.Module, model_id: str, hub: dict[str, Any], given: dict[str, Any], *, wraps_model: bool
) -> Iterator[AdapterFile]:
    root = base_model(model)
    path = next(path for path, module in model.named_modules() if module is root)
    file = AdapterFile(
        find_weights(model_id, **hub),
        ("base_model.model." if wraps_model else "") + (f"{path}." if path else ""),
        ignore_sizes=bool(given.get("ignore_mismatched_sizes")),
        is_renamed=bool(given.get("key_mapping")),
    )
    token = file_in_loading.set(file)
    try:
        with unchanged_if_refused(model):
            yield file
    finally:
        file_in_loading.reset(token)


def _check_weights(file: AdapterFile, model: PeftModel, adapter_name: str) -> None:
    """Compare a file with an adapter that is on the model."""
    parameters: Any = find_parameters(model)
    heads = parameters.heads[adapter_name]
    copies = {path: parameters.root.get_submodule(path).modules_to_save[adapter_name] for path in heads}
    config, layout, cls = (each[adapter_name] for each in (parameters.configs, parameters.layouts, parameters.classes))
    file.check(cls, parameters, config, layout, heads)
    file.check_heads(parameters, heads, copies)


def extend_peft_model() -> None:
    """Add to `PeftModel`; doing it again is harmless."""
    if getattr(PeftModel, "_has_prompt_cards", False):
        return
    write_card, upload, load, make = (
        PeftModel.create_or_update_model_card,
        PeftModel._upload_modified_files,
        PeftModel.load_adapter,
        PeftModel.from_pretrained.__func__,  # type: ignore[attr-defined]
    )

    @wraps(write_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        write_card(self, output_dir)
        if _has_prompts(self):
            complete_card(self, output_dir, str(output_dir))

    @wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs) -> Any:
        if _has_prompts(self) and (Path(working_dir) / "README.md").is_file():
            # transformers has written a card of its own over PEFT's
            write_card(self, str(working_dir))
            complete_card(self, str(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    @wraps(load)
    def load_adapter(self: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if file_in_loading.get() is not None:
            return load(self, model_id, adapter_name, *args, **kwargs)
        hub, here = _hub_arguments(kwargs), self.peft_config.get(adapter_name)
        config = read_config(model_id, **hub)
        if config is None and not _is_own(here):
            return load(self, model_id, adapter_name, *args, **kwargs)
        with _loading(self, model_id, hub, kwargs, wraps_model=False) as file:
            if here is not None and config is not None:
                check_same_configuration(here, config, adapter_name, model_id)
                _check_weights(file, self, adapter_name)
            return load(self, model_id, adapter_name, *args, **kwargs)

    @wraps(make)
    def from_pretrained(cls: type[PeftModel], model: Any, model_id: str, *args: Any, **kwargs: Any) -> PeftModel:
        hub = _hub_arguments(kwargs)
        config = read_config(model_id, **hub)
        given = signature(make).bind(cls, model, model_id, *args, **kwargs).arguments.get("config")
        if not _is_own(config if given is None else given):
            return make(cls, model, model_id, *args, **kwargs)
        with _loading(model, model_id, hub, kwargs, wraps_model=True):
            return make(cls, model, model_id, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign, assignment]
    PeftModel._upload_modified_files = _upload_modified_files  # type: ignore[method-assign, assignment]
    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign, assignment]
    PeftModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
    PeftModel._has_prompt_cards = True  # type: ignore[attr-defined]
