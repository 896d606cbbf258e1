"""The model card: README.md of an adapter folder, with metadata that the Hub reads and a snippet that runs."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_whole
from ..methods import PROMPT_METHODS
from .arguments import Arguments
from .model import EMBEDDED, ParameterCounts


_METHOD_NAMES = {
    "vpt": "Visual Prompt Tuning, deep ([Jia et al., ECCV 2022](https://arxiv.org/abs/2203.12119))",
    "vpt_shallow": "Visual Prompt Tuning, shallow ([Jia et al., ECCV 2022](https://arxiv.org/abs/2203.12119))",
    "gated_vpt": "Gated Prompt Tuning ([Yoo et al., ICML 2023](https://arxiv.org/abs/2306.05067))",
    "linear": "a linear probe",
    "full": "full fine-tuning",
    "partial": "fine-tuning of the last blocks",
    "mlp": "an MLP head on frozen features",
    "bias": "bias tuning ([Ben Zaken et al., ACL 2022](https://arxiv.org/abs/2106.10199))",
    "adapter": "bottleneck adapters ([Houlsby et al., ICML 2019](https://arxiv.org/abs/1902.00751))",
    "sidetune": "side-tuning ([Zhang et al., ECCV 2020](https://arxiv.org/abs/1912.13503))",
    "lora": "LoRA ([Hu et al., ICLR 2022](https://arxiv.org/abs/2106.09685))",
}
_METRICS = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro F1")}
_SPLITS = {"eval": "validation", "test": "test"}
_ADAPTER_LINE = re.compile(r'^adapter = ".*"', re.MULTILINE)


@dataclass(frozen=True)
class RunFacts:
    """What a card tells of a finished run.

    Args:
        arguments (`Arguments`): as parsed.
        counts (`ParameterCounts`): of the trained model.
        metrics (`Mapping[str, float]`): with the prefixes `eval_` and `test_`.
        labels (`Mapping[int, str]`): names of the classes.
        images (`Mapping[str, int]`): number of images per split.
        image_processor (`Any`): gives size and normalisation.
        saved_bytes (`int`): size of what was saved.
        seconds (`float`): training time.
    """

    arguments: Arguments
    counts: ParameterCounts
    metrics: Mapping[str, float]
    labels: Mapping[int, str]
    images: Mapping[str, int]
    image_processor: Any
    saved_bytes: int = 0
    seconds: float = 0.0
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)


def build_card(facts: RunFacts, adapter: str) -> ModelCard:
    """Return the card of a run; `adapter` is the folder or Hub id that the snippet loads."""
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{_text(facts, adapter)}")


def write_card(facts: RunFacts, folder: str | Path) -> Path:
    """Write README.md into `folder`, whole or not at all, and return its path."""
    path = Path(folder) / "README.md"
    write_whole(path, build_card(facts, str(folder)).content)
    return path


def add_test_results(folder: str | Path, metrics: Mapping[str, float]) -> None:
    """Add `test_accuracy` and `test_macro_f1` to the card of a run that was tested later, whole or not at all."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    known = card.data.eval_results or []
    rows = ""
    for name, (kind, title) in _METRICS.items():
        value = float(metrics[f"test_{name}"])
        rows += f"| test | {title} | {100 * value:.2f} % |\n"
        validated = next(result for result in known if result.metric_type == kind)
        known = [*known, replace(validated, dataset_split="test", metric_value=round(value, 4))]
    card.data.eval_results = known
    text = card.text.replace("\n\nTrained parameters:", f"\n{rows}\nTrained parameters:", 1)
    write_whole(path, ModelCard(f"---\n{card.data.to_yaml()}\n---\n{text}").content)


def retarget(card: str, adapter: str) -> str:
    """The card's text with its snippet loading `adapter`, a Hub id or folder."""
    return _ADAPTER_LINE.sub(lambda _: f"adapter = {json.dumps(adapter)}", card)


def _base_name(facts: RunFacts) -> str:
    """A Hub id stays as it is; of a folder only its name is told."""
    name = facts.arguments.model.model_name_or_path
    return Path(name).resolve().name if Path(name).is_dir() else name


def _data_name(facts: RunFacts) -> str:
    name = facts.arguments.data.dataset_name
    return Path(name).resolve().name if Path(name).is_dir() else name


def _metadata(facts: RunFacts) -> ModelCardData:
    arguments = facts.arguments
    method = arguments.method.method
    is_peft = method in (*PROMPT_METHODS, "lora")
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=_data_name(facts),
            dataset_name=_data_name(facts),
            dataset_split=_SPLITS[prefix],
            metric_type=kind,
            metric_name=title,
            metric_value=round(float(facts.metrics[f"{prefix}_{name}"]), 4),
        )
        for prefix in _SPLITS
        for name, (kind, title) in _METRICS.items()
        if f"{prefix}_{name}" in facts.metrics
    ]
    from_hub = not Path(arguments.data.dataset_name).exists() and arguments.data.dataset_name != "digits"
    return ModelCardData(
        library_name="peft" if is_peft else "transformers",
        base_model=_base_name(facts),
        datasets=[arguments.data.dataset_name] if from_hub else None,
        tags=["vpt_peft", "image-classification", "vision", method, *(["peft"] if is_peft else [])],
        pipeline_tag="image-classification",
        metrics=[kind for kind, _ in _METRICS.values()],
        model_name=Path(arguments.training.output_dir or "adapter").name,
        eval_results=results or None,
    )


def _text(facts: RunFacts, adapter: str) -> str:
    arguments, counts = facts.arguments, facts.counts
    data, training = arguments.data, arguments.training
    rows = "\n".join(
        f"| {_SPLITS[prefix]} | {title} | {100 * facts.metrics[f'{prefix}_{name}']:.2f} % |"
        for prefix in _SPLITS
        for name, (_, title) in _METRICS.items()
        if f"{prefix}_{name}" in facts.metrics
    )
    images = ", ".join(f"{count:,} {name}" for name, count in facts.images.items())
    names = list(facts.labels.values())
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in sorted(facts.hyper_parameters.items()))
    processor = facts.image_processor
    kept = "the weights of the last epoch are kept"
    if training.load_best_model_at_end:
        kept = f"the weights with the best validation {training.metric_for_best_model} are kept"
    source = data.dataset_name if not Path(data.dataset_name).exists() else f"{_data_name(facts)} (a local folder)"
    return f"""# {Path(training.output_dir or "adapter").name}

{_base_name(facts)} adapted to {_data_name(facts)} ({len(names)} classes) by {_METHOD_NAMES[arguments.method.method]},
trained with [vpt_peft](https://pypi.org/project/vpt-peft/).

## Use

```python
{_snippet(facts, adapter)}```

`vpt-peft evaluate` and `vpt-peft predict` take the same folder or Hub id.

## Results

| split | metric | value |
|---|---|---|
{rows}

Trained parameters: {counts.trainable:,} of {counts.total:,} ({100 * counts.trainable / counts.total:.2f} %), of which
{counts.head:,} in the head. Saved weights: {facts.saved_bytes / 1e6:.3f} MB. Training took {facts.seconds:,.1f} s.

## Protocol

- Data: {source}; {images} images. Splits: train `{data.train_split}`, validation
  `{data.validation_split or "found, or drawn from train"}`, seed of the draw {data.split_seed}.
- Classes: {shown}.
- Images: size {_size(processor)}, mean {getattr(processor, "image_mean", None)}, standard deviation
  {getattr(processor, "image_std", None)} (the checkpoint's own), augmentation `{data.augmentation}`.
- Seed {training.seed}; {kept}.

## Hyper-parameters

| name | value |
|---|---|
{settings}

torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, Python
{platform.python_version()}.

## Limits

The model knows only the classes above and gives every image one of them. The numbers hold for images like those of the
data named; nothing was tested beyond it. Biases of the backbone and of the data remain.
"""


def _size(processor: Any) -> str:
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    return " x ".join(str(value) for value in dict(size).values()) or "as the image processor says"


def _snippet(facts: RunFacts, adapter: str) -> str:
    method, base = facts.arguments.method.method, facts.arguments.model.model_name_or_path
    target = f"adapter = {json.dumps(adapter)}  # this folder or its Hub id\n"
    image = 'image = Image.new("RGB", (224, 224))  # or Image.open("your.jpg").convert("RGB")\n'
    use = (
        "with torch.no_grad():\n"
        '    logits = model(**processor(images=image, return_tensors="pt")).logits\n'
        "print(model.config.id2label[logits.argmax(-1).item()])\n"
    )
    if method not in (*PROMPT_METHODS, "lora"):
        return (
            "import torch\nfrom PIL import Image\nfrom vpt_peft.training.inference import load_adapter_model\n\n"
            f"{target}model, processor = load_adapter_model(adapter)\n{image}{use}"
        )
    registers = "import vpt_peft  # registers the method with PEFT\n" if method in PROMPT_METHODS else ""
    located = f"embedded_path({json.dumps(base)})" if base in EMBEDDED else json.dumps(base)
    packaged = "from vpt_peft.embedded import embedded_path\n" if base in EMBEDDED else ""
    return (
        "import torch\nfrom peft import PeftModel\nfrom PIL import Image\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification\n\n"
        f"{registers}{packaged}\n{target}"
        "config = AutoConfig.from_pretrained(adapter)  # with the names of the classes\n"
        "base = AutoModelForImageClassification.from_pretrained(\n"
        f"    {located}, config=config, dtype=torch.float32, ignore_mismatched_sizes=True\n)\n"
        "model = PeftModel.from_pretrained(base, adapter).eval()\n"
        f"processor = AutoImageProcessor.from_pretrained(adapter)\n{image}{use}"
    )
