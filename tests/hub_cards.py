"""Metadata of model and dataset cards, checked as the Hub's validate-yaml page does for what most often goes wrong."""

import re
from typing import Any

import yaml


TYPES: dict[str, type | tuple[type, ...]] = {
    "base_model": (str, list),
    "datasets": (str, list),
    "language": (str, list),
    "library_name": str,
    "license": (str, list),
    "metrics": list,
    "model-index": list,
    "pipeline_tag": str,
    "tags": list,
}
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_metadata(card: str) -> tuple[dict[str, Any], list[str]]:
    """The YAML block at the start of a card, and what is wrong with its syntax."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    if not match:
        return {}, []
    try:
        metadata = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return {}, [f"YAML Metadata Error: {error}"]
    return (metadata, []) if isinstance(metadata, dict) else ({}, ["YAML Metadata Error: not a mapping"])


def check_card(card: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings that the Hub would answer with."""
    metadata, errors = read_metadata(card)
    for name, types in TYPES.items():
        if metadata.get(name) is not None and not isinstance(metadata[name], types):
            errors.append(f'"{name}" has the wrong type')
    for name in ("base_model", "datasets"):
        values = metadata.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co')
    for entry in metadata.get("model-index") or []:
        if not isinstance(entry, dict) or "name" not in entry or not isinstance(entry.get("results"), list):
            errors.append('"model-index" needs a name and results')
        elif not all({"task", "dataset", "metrics"} <= result.keys() for result in entry["results"]):
            errors.append('"model-index" results need task, dataset and metrics')
    return errors, [] if metadata or errors else ["empty or missing yaml metadata in repo card"]
