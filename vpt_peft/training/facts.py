"""The card of a run: what it tells, gathered from arguments, model and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from textwrap import indent
from typing import Any

import transformers
from transformers import AutoConfig

from ..data.digits import DIGITS
from ..embedded import EMBEDDED_FOLDERS
from ..files import write_whole
from ..methods import METHODS, PROMPT_METHODS
from ..reporting import SPLITS
from ..reporting.card import Result, add_results, build_card
from ..tasks import Task, get_task
from .arguments import Arguments, MethodArguments, VPTTrainingArguments
from .checkpoints import labels_of_adapter
from .inference import read_record
from .model import ParameterCounts, resolve_model_path


# Where and how a run was done, not what was tried
_HIDDEN = {"hub_model_id", "hub_private_repo", "push_to_hub", "feature_cache_dir", "report_to", "run_name"}


def write_card(
    arguments: Arguments,
    counts: ParameterCounts,
    metrics: Mapping[str, float],
    classes: Mapping[int, str],
    images: Mapping[str, int],
    image_processor: Any,
    model_class: str,
    saved_bytes: int,
) -> None:
    """Write the card of a finished run into its folder, whole or not at all.

    Args:
        arguments: as parsed.
        counts: parameters of the trained model.
        metrics: with the prefixes `train_`, `eval_` and `test_`.
        classes: names by number.
        images: number of images per split.
        image_processor: the one used.
        model_class: name of the base model's class in transformers.
        saved_bytes: size of the saved weights.
    """
    task = get_task(arguments.model.task)
    method, data, training = arguments.method, arguments.data, arguments.training
    folder = Path(training.output_dir or ".")
    peft_tag = ["peft"] if METHODS[method.method].configure else []
    kept = "the weights of the last epoch are kept"
    if training.load_best_model_at_end:
        kept = f"the weights with the best validation {training.metric_for_best_model} are kept"
    data_path, data_name = Path(data.dataset_name).expanduser(), _public_name(data.dataset_name)
    metadata = {
        "model_name": folder.resolve().name,
        "pipeline_tag": task.hub_tag,
        "library_name": "peft" if peft_tag else "transformers",
        "tags": ["vpt_peft", task.pipeline_tag, "vision", method.method, *peft_tag],
        "base_model": _public_name(arguments.model.model_name_or_path),
        "datasets": [data_name] if not data_path.exists() and data.dataset_name not in DIGITS else None,
        "data_name": data_name,
    }
    fields = {
        "method": METHODS[method.method].markdown,
        "snippet": _snippet(arguments, task, folder, model_class).rstrip(),
        "loading_note": _loading_note(arguments, task, folder),
        "counts": counts,
        "saved_bytes": saved_bytes,
        "seconds": metrics["train_runtime"],
        "data": data,
        "data_source": f"{data_name} (a local {'folder' if data_path.is_dir() else 'file'})"
        if data_path.exists()
        else data.dataset_name,
        "images": ", ".join(f"{count:,} {name}" for name, count in images.items()),
        "classes": list(classes.values()),
        "processor": image_processor,
        "size": _size(image_processor),
        "seed": training.seed,
        "kept": kept,
        "hyper_parameters": _hyper_parameters(arguments),
        "limits": task.limits,
    }
    write_whole(folder / "README.md", build_card(metadata, _results(task, metrics), fields).content)


def add_test_results(folder: str | Path, metrics: Mapping[str, float]) -> None:
    """Add the metrics with the prefix `test_` to the card of a run that was tested later."""
    task = get_task(read_record(folder).get("task", get_task().pipeline_tag))
    add_results(folder, _results(task, {name: metrics[name] for name in metrics if name.startswith("test_")}))


def _results(task: Task, metrics: Mapping[str, float]) -> list[Result]:
    return [
        Result(split, metric.kind, metric.title, round(float(metrics[key]), 4), metric.format(metrics[key]))
        for prefix, split in SPLITS.items()
        for metric in task.metrics
        if (key := f"{prefix}_{metric.name}") in metrics
    ]


def _public_name(name: str) -> str:
    """Return a Hub id as it is, and of a folder or a file only its name."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _size(processor: Any) -> str:
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    return " x ".join(str(value) for value in dict(size).values()) or "as the image processor says"


def _hyper_parameters(arguments: Arguments) -> dict[str, Any]:
    """Return what was given, or filled in by the recipe, about method and training."""
    names = {item.name for item in (*fields(MethodArguments), *fields(VPTTrainingArguments))} - _HIDDEN
    shown = {name: value for name, value in arguments.record().items() if name in names}
    return {"method": arguments.method.method, "recipe": arguments.method.recipe, **shown}


def _snippet(arguments: Arguments, task: Task, folder: Path, model_class: str) -> str:
    """Return code that loads the folder and predicts an image, as it can be pasted."""
    method, base = arguments.method.method, arguments.model.model_name_or_path
    embedded = base in EMBEDDED_FOLDERS
    target = f"adapter = {json.dumps(str(folder))}  # this folder or its Hub id\n"
    use = (
        'image = Image.new("RGB", (224, 224))  # or Image.open("your.jpg").convert("RGB")\n'
        f"with torch.no_grad():\n{indent(task.example, '    ')}\n"
    )
    # transformers does not know the heads of this package
    if not METHODS[method].configure or not hasattr(transformers, model_class) or arguments.model.decoder:
        return (
            "import torch\nfrom PIL import Image\nfrom vpt_peft.training.inference import load_adapter_model\n\n"
            f"{target}model, processor = load_adapter_model(adapter)\n{use}"
        )
    registers = "import vpt_peft  # registers the method with PEFT\n" if method in PROMPT_METHODS else ""
    packaged = "from vpt_peft.embedded import embedded_path\n" if embedded else ""
    located = f"embedded_path({json.dumps(base)})" if embedded else json.dumps(base)
    has_labels = labels_of_adapter(folder) is not None
    auto_class = model_class if embedded else task.auto_class.__name__
    if has_labels and not embedded:
        imported, classes = "AutoPeftModel", "AutoImageProcessor"
        load = "model = AutoPeftModel.from_pretrained(adapter, dtype=torch.float32).eval()\n"
    elif has_labels:
        imported, classes = "PeftModel", f"AutoImageProcessor, {auto_class}"
        load = (
            f"base = {auto_class}.from_pretrained({located}, dtype=torch.float32)\n"
            "model = PeftModel.from_pretrained(base, adapter).eval()\n"
        )
    else:
        imported, classes = "PeftModel", f"AutoConfig, AutoImageProcessor, {auto_class}"
        load = (
            "config = AutoConfig.from_pretrained(adapter)  # with the names of the classes\n"
            f"base = {auto_class}.from_pretrained(\n"
            f"    {located}, config=config, dtype=torch.float32, ignore_mismatched_sizes=True\n)\n"
            "model = PeftModel.from_pretrained(base, adapter).eval()\n"
        )
    return (
        f"import torch\nfrom peft import {imported}\nfrom PIL import Image\nfrom transformers import {classes}\n\n"
        f"{registers}{packaged}\n{target}{load}processor = AutoImageProcessor.from_pretrained(adapter)\n{use}"
    )


def _loading_note(arguments: Arguments, task: Task, folder: Path) -> str:
    """Return how else an adapter loads, and how the image processor that was used gets in."""
    # Pipelines stretch images, where boxes and masks are trained on whole ones
    if task.finds_many or not (folder / "adapter_config.json").is_file() or labels_of_adapter(folder) is None:
        return ""
    model = arguments.model
    name, revision = resolve_model_path(model.model_name_or_path), model.model_revision or "main"
    config = AutoConfig.from_pretrained(name, revision=revision, token=model.token, cache_dir=model.cache_dir)
    if type(config) not in task.auto_class._model_mapping or model.decoder is not None:
        # Checkpoints of ViTMAE, say, for which transformers has no such class
        return ""
    # The package, and so the backbone in it, lies at another path elsewhere
    embedded = arguments.model.model_name_or_path in EMBEDDED_FOLDERS
    return (
        f"{'On the machine that wrote this folder, ' if embedded else ''}"
        f"`{task.auto_class.__name__}.from_pretrained(adapter)` loads it too, and so does "
        f'`pipeline("{task.hub_tag}", adapter, image_processor=adapter)`. Without `image_processor`, `pipeline` '
        "takes the image processor of the base model."
    )
