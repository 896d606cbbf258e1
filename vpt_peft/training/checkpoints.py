"""Write and read what a run trained.

PEFT adapters are saved as PEFT does, `full` as a transformers model, other baselines as the trainable parameters with a
note of how to rebuild the rest.
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

from ..files import read_json
from ..methods.structure import Classifier, base_model
from .model import SPEC_ATTRIBUTE, BaselineSpec


BASELINE_CONFIG = "vpt_peft_baseline.json"
BASELINE_WEIGHTS = "vpt_peft_baseline.safetensors"
# What the saving of some method writes; beside another method's files they would be taken for its own
WRITTEN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    BASELINE_CONFIG,
    BASELINE_WEIGHTS,
)


def save_trained(model: Classifier, folder: str | Path) -> None:
    """Save what `model` trained into `folder`.

    A PEFT adapter becomes `adapter_config.json` and `adapter_model.safetensors`; `full` a transformers model folder;
    other baselines `vpt_peft_baseline.json` and `.safetensors`, without the frozen backbone. The labels are in the
    adapter's configuration, where it has a place for them, and else in a `config.json` of transformers: beside an
    adapter that file would make transformers look for a whole model.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the model was not made by `build_model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # "auto" would ask the Hub about a vocabulary that an image encoder does not have
        model.save_pretrained(str(folder), save_embedding_layers=False)
        if labels_of_adapter(folder) is None:
            base_model(model).config.save_pretrained(folder)
        return
    spec = getattr(model, SPEC_ATTRIBUTE, None)
    if spec is None:
        raise ValueError(f"{type(model).__name__} was not made by build_model, so it is not known what it trained.")
    if spec.method == "full":
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        save_file(trainable_tensors(model), folder / BASELINE_WEIGHTS, metadata={"format": "pt"})
    (folder / BASELINE_CONFIG).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")


def labels_of_adapter(folder: str | Path) -> dict[int, str] | None:
    """Return the labels in the `adapter_config.json` of a folder, or None where it has none."""
    config = read_json(Path(folder) / "adapter_config.json")
    labels = config.get("id2label")
    return {int(number): name for number, name in labels.items()} if labels else None


def trainable_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters, and the saved buffers (running statistics) beside them, by name."""
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
    loaded, expected = load_file(path), trainable_tensors(model)
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
    """Return the spec beside a saved baseline, or None where the folder holds none.

    Raises:
        ValueError: the file is there, but is not such a spec.
    """
    path = Path(folder) / BASELINE_CONFIG
    if not path.exists():
        return None
    values = read_json(path)
    try:
        return BaselineSpec(**values)
    except TypeError as error:
        raise ValueError(f"{path} was not written by a training run of vpt_peft: {error}") from error
