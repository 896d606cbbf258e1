"""The model card: README.md of an adapter folder, with metadata that the Hub reads and a snippet that runs."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_whole


_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_ADAPTER_LINE = re.compile(r'^adapter = ".*"', re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """One line of the table of results.

    Args:
        split: "validation" or "test".
        kind: the metric's id on the Hub.
        title: the metric as shown.
        value: as the metadata have it.
        text: as the table shows it.
    """

    split: str
    kind: str
    title: str
    value: float
    text: str


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of a finished run.

    Args:
        name: of the model.
        pipeline_tag: of the task.
        library: "peft" or "transformers".
        method: as a sentence ends with it, in markdown.
        tags: of the Hub.
        base_name: Hub id, or only the name of a folder.
        data_name: likewise.
        data_on_hub: whether `data_name` is a data set of the Hub.
        snippet: code that loads the folder; a line `adapter = "..."` says from where.
        loading_note: markdown, what else loads it; may be empty.
        results: in the order shown.
        classes: their names in order.
        protocol: remaining fields of the template about data, parameters and seed.
        image_processor: gives size and normalisation.
        hyper_parameters: what was given or filled in.
    """

    name: str
    pipeline_tag: str
    library: str
    method: str
    tags: Sequence[str]
    base_name: str
    data_name: str
    data_on_hub: bool
    snippet: str
    loading_note: str
    results: Sequence[Result]
    classes: Sequence[str]
    protocol: Mapping[str, Any]
    image_processor: Any
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)


def build_card(facts: CardFacts) -> ModelCard:
    """Return the card of a run; needs Jinja."""
    task = {"task_type": facts.pipeline_tag, "task_name": facts.pipeline_tag.replace("-", " ").title()}
    data = ModelCardData(
        library_name=facts.library,
        base_model=facts.base_name,
        datasets=[facts.data_name] if facts.data_on_hub else None,
        tags=list(facts.tags),
        pipeline_tag=facts.pipeline_tag,
        metrics=list(dict.fromkeys(result.kind for result in facts.results)),
        model_name=facts.name,
        eval_results=[_as_eval_result(result, facts.data_name, task) for result in facts.results] or None,
    )
    processor = facts.image_processor
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=facts.name,
        base_name=facts.base_name,
        data_name=facts.data_name,
        method=facts.method,
        snippet=facts.snippet.rstrip(),
        loading_note=facts.loading_note,
        results=[(result.split, result.title, result.text) for result in facts.results],
        classes=list(facts.classes),
        size=_size(processor),
        mean=getattr(processor, "image_mean", None),
        std=getattr(processor, "image_std", None),
        hyper_parameters=dict(facts.hyper_parameters),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"Python {platform.python_version()}",
        **facts.protocol,
    )


def _as_eval_result(result: Result, data_name: str, task: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        **task,
        dataset_type=data_name,
        dataset_name=data_name,
        dataset_split=result.split,
        metric_type=result.kind,
        metric_name=result.title,
        metric_value=result.value,
    )


def write_card(facts: CardFacts, folder: str | Path) -> Path:
    """Write README.md into `folder`, whole or not at all, and return its path."""
    path = Path(folder) / "README.md"
    write_whole(path, build_card(facts).content)
    return path


def add_results(folder: str | Path, results: Sequence[Result]) -> None:
    """Add results to the card of a run that was tested later, whole or not at all."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    known = list(card.data.eval_results or [])
    task = {"task_type": known[0].task_type, "task_name": known[0].task_name}
    card.data.eval_results = [*known, *(_as_eval_result(result, known[0].dataset_name, task) for result in results)]
    rows = "".join(f"| {result.split} | {result.title} | {result.text} |\n" for result in results)
    text = card.text.replace("\n\nTrained parameters:", f"\n{rows}\nTrained parameters:", 1)
    write_whole(path, ModelCard(f"---\n{card.data.to_yaml()}\n---\n{text}").content)


def retarget(card: str, adapter: str) -> str:
    """Return the card's text with its snippet loading `adapter`, a Hub id or folder."""
    return _ADAPTER_LINE.sub(lambda _: f"adapter = {json.dumps(adapter)}", card)


def _size(processor: Any) -> str:
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    return " x ".join(str(value) for value in dict(size).values()) or "as the image processor says"
