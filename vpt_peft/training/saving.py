"""Write and read what a run trained.

PEFT adapters are saved as PEFT does, `full` as a transformers model, other baselines as the trained tensors with a note
of how to rebuild the rest.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..methods.structure import Classifier, base_model
from .model import SPEC_ATTRIBUTE, BaselineSpec


BASELINE_CONFIG = "vpt_peft_baseline.json"
BASELINE_WEIGHTS = "vpt_peft_baseline.safetensors"


def save_trained(model: Classifier, folder: str | Path) -> None:
    """Save what `model` trained, and its transformers config with the label names, into `folder`.

    A PEFT adapter becomes `adapter_config.json` and `adapter_model.safetensors`; `full` a transformers model folder;
    other baselines `vpt_peft_baseline.json` and `.safetensors`, without the frozen backbone.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the model was not made by `build_model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # "auto" would ask the Hub about a vocabulary that an image encoder does not have
        model.save_pretrained(str(folder), save_embedding_layers=False)
        base_model(model).config.save_pretrained(folder)
        return
    spec = getattr(model, SPEC_ATTRIBUTE, None)
    if spec is None:
        raise ValueError(f"{type(model).__name__} was not made by build_model, so it is not known what it trained.")
    if spec.method == "full":
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        save_file(trained_tensors(model), folder / BASELINE_WEIGHTS, metadata={"format": "pt"})
    (folder / BASELINE_CONFIG).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters, and the saved buffers (running statistics) beside them, by name."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    saved = set(model.state_dict())
    for module_name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for name, buffer in module.named_buffers(prefix=module_name, recurse=False):
                if name in saved:
                    tensors[name] = buffer.detach().cpu().contiguous()
    return tensors


def load_trained(model: PreTrainedModel, folder: str | Path) -> None:
    """Put what `save_trained` wrote for a baseline back into a model rebuilt from the same spec.

    Raises:
        OSError: the weights are not there.
        ValueError: names or shapes differ from what `model` trains.
    """
    folder = Path(folder)
    spec = read_baseline_spec(folder)
    if spec is not None and spec.method == "full":
        # Files carry the names of older versions, which only from_pretrained translates
        model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())
        return
    path = folder / BASELINE_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the folder does not hold a trained baseline.")
    loaded, expected = load_file(path), trained_tensors(model)
    differing = sorted(set(loaded) ^ set(expected)) or sorted(
        name for name in expected if loaded[name].shape != expected[name].shape
    )
    if differing:
        raise ValueError(f"{path} does not fit the model; names or shapes differ at {', '.join(differing[:5])}.")
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in loaded.items():
            state[name].copy_(tensor)


def read_baseline_spec(folder: str | Path) -> BaselineSpec | None:
    """The spec beside a saved baseline, or None where the folder holds none.

    Raises:
        ValueError: the file is there, but is not such a spec.
    """
    path = Path(folder) / BASELINE_CONFIG
    if not path.is_file():
        return None
    try:
        return BaselineSpec(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not what a training of vpt_peft wrote: {error}") from error
