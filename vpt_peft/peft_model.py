"""Two additions to `PeftModel` where PEFT leaves no hook: cards that say how to load, and loads that fit.

Each calls PEFT's own method and acts only on models with prompt adapters.
"""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel

from .tuners.vpt.config import VPTConfig


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


def check_same_configuration(model: PeftModel, adapter_name: str, model_id: str, **hub: Any) -> None:
    """Check that a file for an adapter that is there already has the adapter's configuration.

    Raises:
        ValueError: Fields that say what the adapter computes differ.
    """
    here, file = model.peft_config[adapter_name], PeftConfig.from_pretrained(model_id, **hub)
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


def _has_prompts(model: PeftModel) -> bool:
    return any(isinstance(config, VPTConfig) for config in model.peft_config.values())


def extend_peft_model() -> None:
    """Add to `PeftModel`; doing it again is harmless."""
    if getattr(PeftModel, "_has_prompt_cards", False):
        return
    write_card, upload, load = (
        PeftModel.create_or_update_model_card,
        PeftModel._upload_modified_files,
        PeftModel.load_adapter,
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
        if isinstance(self.peft_config.get(adapter_name), VPTConfig):
            hub = {key: kwargs[key] for key in ("subfolder", "revision", "cache_dir", "token") if key in kwargs}
            check_same_configuration(self, adapter_name, model_id, **hub)
        return load(self, model_id, adapter_name, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign, assignment]
    PeftModel._upload_modified_files = _upload_modified_files  # type: ignore[method-assign, assignment]
    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign, assignment]
    PeftModel._has_prompt_cards = True  # type: ignore[attr-defined]
