"""What a file says of itself: labels, preprocessing, prompts, base model and versions."""

from __future__ import annotations

import json
from typing import Any

import torch
from peft import __version__ as peft_version
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ..tuners.vpt.parameters import find_parameters
from ..version import __version__


# Evaluation form of the "resize_crop_flip" augmentation: the shorter side before the centre crop
RESIZE_RATIO = 256 / 224


def make_metadata(
    model: PreTrainedModel,
    adapter: str,
    image_processor: Any,
    augmentation: str,
    images: torch.Tensor,
    has_labels: bool,
) -> dict[str, str]:
    """JSON texts "labels", "preprocessing", "prompt_config", "base_model" and "versions".

    Args:
        model: The exported model.
        adapter: Name of its prompt adapter.
        image_processor: Its image processor, or `None`.
        augmentation: The augmentation of the training, whose evaluation form says how images are resized.
        images: A batch that the file takes, `(batch, ..., height, width)`.
        has_labels: The model gives logits.
    """
    parameters = find_parameters(model)
    config = {} if parameters is None else parameters.configs[adapter].to_dict()
    base = config.get("base_model_name_or_path") or model.config._name_or_path
    values: dict[str, Any] = {
        "labels": {str(index): name for index, name in (model.config.id2label or {}).items() if has_labels},
        "preprocessing": _preprocessing(image_processor, (images.shape[-2], images.shape[-1]), augmentation),
        "prompt_config": config,
        "base_model": {"name_or_path": base, "class": type(model).__name__, "model_type": model.config.model_type},
        "versions": {
            "vpt_peft": __version__,
            "peft": peft_version,
            "transformers": transformers_version,
            "torch": torch.__version__,
        },
    }
    # Names in configurations may be sets
    return {name: json.dumps(value, default=list) for name, value in values.items()}


def _preprocessing(image_processor: Any, size: tuple[int, int], augmentation: str) -> dict[str, Any]:
    """The image processor's settings, with the geometry that gives `size` in the augmentation's evaluation form."""
    input_size = dict(zip(("height", "width"), size, strict=True))
    if image_processor is None:
        return {"size": input_size}
    settings = json.loads(image_processor.to_json_string())
    if augmentation == "resize_crop_flip":
        edge = {"shortest_edge": round(RESIZE_RATIO * max(size))}
        settings.update(do_resize=True, size=edge, do_center_crop=True, crop_size=input_size)
    elif augmentation == "none" and settings.get("do_center_crop") and settings.get("crop_size"):
        scale = max(size) / max(settings["crop_size"].values())
        resized = {side: round(pixels * scale) for side, pixels in settings["size"].items()}
        settings.update(size=resized, crop_size=input_size)
    else:
        settings.update(do_resize=True, size=input_size, do_center_crop=False)
    return settings
