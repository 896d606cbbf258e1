"""From a prompted model to a checked file."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from ..files import written_beside
from ..tuners.vpt.parameters import find_parameters
from .files import compare, write_onnx, write_torch
from .metadata import make_metadata
from .prepare import float_copy, merge_prompts, random_images, sample, trace


logger = logging.getLogger(__name__)

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
CHECKED_BATCHES = (1, 3, 8)
# torch's exporter writes no older opsets
LEAST_OPSET = 18


def export_model(
    model: PeftModel | PreTrainedModel,
    output: str | Path,
    format: Literal["onnx", "torch"] = "onnx",
    image_size: int | tuple[int, int] | None = None,
    opset: int | None = None,
    check: bool = True,
    image_processor: Any = None,
    augmentation: str = "none",
) -> Path:
    """Export a prompted model with its head, in float32 on the CPU, for batches of any size.

    Deep prompts become constant keys and values, merged on a copy: the model itself is not changed. The file takes
    images `(batch, channels, height, width)` and gives the model's outputs by name (a classifier: "logits",
    `(batch, labels)`). Its metadata holds labels, preprocessing, prompt configuration, base model and versions as
    JSON: ONNX `metadata_props`, or the extra file "metadata.json" of `torch.export.load`. Weights of more than 2 GB
    go into a second file beside it, as ONNX asks.

    Args:
        model (`PeftModel` or `PreTrainedModel`): has one active prompt adapter.
        output (`str | Path`): the file to write (its ending may be left out), or a folder for `model.onnx` or
            `model.pt2`.
        format (`str`): "onnx", or "torch" for `torch.export`.
        image_size (`int` or `tuple[int, int]`, *optional*): pixels a side, or (height, width); by default the image
            processor's, else the model's.
        opset (`int`, *optional*): ONNX opset; by default the exporter's.
        check (`bool`): compare the written file with PyTorch at batches of 1, 3 and 8 (within 1e-4, absolute plus
            relative).
        image_processor (`Any`, *optional*): goes into the metadata; by default the base model's if it is on this
            machine.
        augmentation (`str`): that of the training, whose evaluation form goes into the metadata.

    Returns:
        The written file.

    Raises:
        ModuleNotFoundError: a package of the extra [export] is missing.
        OSError: the file cannot be written.
        RuntimeError: the outputs of the exported file differ from PyTorch's; nothing is written then.
        TypeError: an argument has the wrong type.
        ValueError: unknown format, wrong ending or opset, none or several active prompt adapters, quantised weights, or
            a model that takes more than images.
    """
    path, size = check_target(output, format, image_size, opset, check)
    base = _base_model(model)
    adapter = _active_adapter(base)
    if image_processor is None:
        image_processor = _local_processor(base)
    copied = float_copy(base)
    wrapper, images = sample(copied, size, image_processor)
    batches = [random_images(images, rows, seed) for seed, rows in enumerate(CHECKED_BATCHES if check else (1,))]
    with torch.no_grad():
        expected = [wrapper(batch) for batch in batches]
        merge_prompts(copied, adapter)
        program = trace(wrapper, images)
    names = list(expected[0])
    metadata = make_metadata(copied, adapter, image_processor, augmentation, images, "logits" in names)
    with written_beside(path.parent) as folder:
        scratch = folder / path.name
        if format == "onnx":
            write_onnx(program, scratch, wrapper.argument, names, metadata, opset)
        else:
            write_torch(program, scratch, metadata)
        if check:
            compare(scratch, format, batches, expected)
    return path


def check_target(
    output: str | Path, format: str, image_size: Any = None, opset: int | None = None, check: bool = True
) -> tuple[Path, tuple[int, int] | None]:
    """Check all arguments of [`export_model`] but the model; return the file's path and (height, width).

    Raises:
        As [`export_model`].
    """
    path = _output_path(output, format)
    _check_opset(opset, format)
    size = _pair(image_size)
    _require_packages(format, check)
    return path, size


def _output_path(output: str | Path, format: str) -> Path:
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(SUFFIXES)}.")
    path, suffix = Path(output), SUFFIXES[format]
    if path.is_dir():
        path = path / f"model{suffix}"
    if path.suffix in set(SUFFIXES.values()) - {suffix}:
        raise ValueError(
            f"output={str(output)!r}: files of format={format!r} end in {suffix}; rename one or the other."
        )
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"output={str(output)!r}: {above.name!r} is a file; give a path in a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output={str(output)!r}: the folder {str(above)!r} cannot be written to; choose another."
        )
    return path if path.suffix == suffix else path.with_name(path.name + suffix)


def _check_opset(opset: int | None, format: str) -> None:
    if opset is None:
        return
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset={opset!r} must be an integer or None.")
    if format != "onnx":
        raise ValueError(f"opset={opset} has no meaning for format={format!r}; leave it out.")
    _require_packages(format, check=False)
    from onnx.defs import onnx_opset_version

    if not LEAST_OPSET <= opset <= onnx_opset_version():
        raise ValueError(f"opset={opset} must be from {LEAST_OPSET} to {onnx_opset_version()}.")


def _pair(image_size: Any) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"image_size={image_size!r} must be an integer, or (height, width).")
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size={image_size!r} must be one side or (height, width), each at least 1 pixel.")
    return sides[0], sides[1]


def _require_packages(format: str, check: bool) -> None:
    needed = [] if format != "onnx" else ["onnx", "onnxscript", *(["onnxruntime"] if check else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"format={format!r} needs {', '.join(missing)}: pip install vpt_peft[export]")


def _base_model(model: Any) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; pass a PEFT model of a transformers model. `vpt-peft export` takes the "
            "folder of an adapter."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(model).__name__} has quantised weights, which are not exported; load the base model without "
            "quantization_config, attach the adapter to it and export that."
        )
    return model


def _active_adapter(model: nn.Module) -> str:
    """The one prompt adapter that is active."""
    parameters = find_parameters(model)
    known = [] if parameters is None else list(parameters.configs)
    active = [] if parameters is None else [name for name in parameters.active_names() if name in parameters.configs]
    if len(active) > 1:
        raise ValueError(
            f"active adapters {active}: a file holds one; choose it with model.set_adapter({active[0]!r}) and export each."
        )
    if not active:
        raise ValueError(
            f"no prompt adapter is active (the model's prompt adapters: {known or 'none'}); attach one, or choose it with "
            "model.set_adapter(...) while adapters are enabled."
        )
    return active[0]


def _local_processor(model: PreTrainedModel) -> Any:
    """The image processor of the base model if it can be had without a network."""
    name = model.config._name_or_path
    try:
        return AutoImageProcessor.from_pretrained(name, local_files_only=True) if name else None
    except (OSError, ValueError, ImportError):
        logger.warning(
            "the image processor of %r is not on this machine; pass image_processor=... to record it.", name
        )
        return None
