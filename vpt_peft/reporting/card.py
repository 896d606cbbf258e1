"""The model card: README.md of an adapter folder, with metadata that the Hub reads and a snippet that runs."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def build_card(metadata: Mapping[str, Any], results: Sequence[Result], fields: Mapping[str, Any]) -> ModelCard:
    """Return the card of a run; needs Jinja.

    Args:
        metadata: for `ModelCardData`, with the name of the data set as "data_name".
        results: in the order shown.
        fields: what the template `card.md.jinja` tells beside them.
    """
    given = dict(metadata)
    data_name, tag = given.pop("data_name"), given["pipeline_tag"]
    data = ModelCardData(
        **given,
        metrics=list(dict.fromkeys(result.kind for result in results)),
        eval_results=[_as_eval_result(result, data_name, tag) for result in results] or None,
    )
    versions = {"torch": torch, "transformers": transformers, "peft": peft}
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=data.model_name,
        base_name=data.base_model,
        data_name=data_name,
        results=results,
        versions=", ".join(f"{name} {module.__version__}" for name, module in versions.items())
        + f", Python {platform.python_version()}",
        **fields,
    )


def _as_eval_result(result: Result, data_name: str, pipeline_tag: str) -> EvalResult:
    return EvalResult(
        task_type=pipeline_tag,
        task_name=pipeline_tag.replace("-", " ").title(),
        dataset_type=data_name,
        dataset_name=data_name,
        dataset_split=result.split,
        metric_type=result.kind,
        metric_name=result.title,
        metric_value=result.value,
    )


def add_results(folder: str | Path, results: Sequence[Result]) -> None:
    """Add results to the card of a run that was tested later, whole or not at all."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    known = list(card.data.eval_results or [])
    name, tag = known[0].dataset_name, known[0].task_type
    card.data.eval_results = [*known, *(_as_eval_result(result, name, tag) for result in results)]
    rows = "".join(f"| {result.split} | {result.title} | {result.text} |\n" for result in results)
    text = card.text.replace("\n\nTrained parameters:", f"\n{rows}\nTrained parameters:", 1)
    write_whole(path, ModelCard(f"---\n{card.data.to_yaml()}\n---\n{text}").content)


def retarget(card: str, adapter: str) -> str:
    """Return the card's text with its snippet loading `adapter`, a Hub id or folder."""
    return _ADAPTER_LINE.sub(lambda _: f"adapter = {json.dumps(adapter)}", card)
