"""The labels of a model: which of them its configuration names, for each adapter and without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Labels:
    """The labels of one adapter, or of the model without one.

    Args:
        id2label: Label names by index.
        label2id: Indices by label name.
        problem_type: What the loss takes the labels for; `None` until it has decided.
    """

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None = None

    @classmethod
    def from_names(cls, id2label: dict[int, str], problem_type: str | None = None) -> Labels:
        """Labels with the reverse map made from `id2label`."""
        named = {int(index): name for index, name in id2label.items()}
        return cls(named, {name: index for index, name in named.items()}, problem_type)

    @property
    def num_labels(self) -> int:
        """Number of labels."""
        return len(self.id2label)

    @property
    def is_regression(self) -> bool:
        """Whether outputs are numbers, not scores of classes: transformers takes one label for that too."""
        return self.problem_type == "regression" or (self.problem_type is None and self.num_labels == 1)


def read_labels(config: Any) -> Labels | None:
    """The labels a model's configuration names; `None` for one without labels."""
    id2label = getattr(config, "id2label", None)
    if id2label is None:
        return None
    label2id = getattr(config, "label2id", None) or {name: index for index, name in id2label.items()}
    return Labels(dict(id2label), dict(label2id), getattr(config, "problem_type", None))


def apply_labels(config: Any, labels: Labels) -> None:
    """Write labels into a model's configuration."""
    config.id2label, config.label2id = dict(labels.id2label), dict(labels.label2id)
    config.problem_type = labels.problem_type


class LabelSwitch:
    """Keeps the labels of a model and of its adapters, and gives the model those of the active one.

    Args:
        model: The model, with the labels it has without adapters. One without labels in its configuration is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.base = read_labels(getattr(model, "config", None))
        self.of_adapters: dict[str, Labels] = {}
        self.active: str | None = None

    def add(self, adapter_name: str, labels: Labels | None = None) -> None:
        """Note an adapter's labels; `None` for the base's."""
        labels = labels or self.base
        if labels is not None:
            self.of_adapters[adapter_name] = labels

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter's labels; the base's are given back where it was active."""
        if self.active == adapter_name:
            self.use(None)
        self.of_adapters.pop(adapter_name, None)

    def of(self, adapter_name: str | None) -> Labels | None:
        """Labels of an adapter or of the base, with what the loss or the user has changed since they are in use."""
        current = read_labels(getattr(self._model, "config", None)) if adapter_name == self.active else None
        return current or (self.base if adapter_name is None else self.of_adapters.get(adapter_name, self.base))

    def use(self, adapter_name: str | None) -> None:
        """Give the model the labels of an adapter, or of the base for `None`."""
        if self.base is None:
            return
        if adapter_name not in self.of_adapters:
            adapter_name = None
        current = self.of(self.active)
        if self.active is None:
            self.base = current
        elif current is not None and self.active in self.of_adapters:
            self.of_adapters[self.active] = current
        self.active, labels = adapter_name, self.of_adapters[adapter_name] if adapter_name is not None else self.base
        if labels is None or current is None:
            return
        apply_labels(getattr(self._model, "config", None), labels)
        if labels.num_labels != current.num_labels:
            _resize_losses(self._model, current.num_labels, labels.num_labels)


def _resize_losses(model: nn.Module, before: int, after: int) -> None:
    """Set the number of labels that a model and its losses keep beside the configuration.

    Heads are left alone: they are under a wrapper with a copy for each adapter.
    """
    if vars(model).get("num_labels") == before:
        model.num_labels = after  # type: ignore[assignment]
    for child in model.children():
        weights = child._buffers.get("empty_weight")
        if vars(child).get("num_labels") == before and weights is not None:
            # DETR-like losses weigh each class, and "no object" at the end
            child._buffers["empty_weight"] = torch.cat([weights.new_ones(after), weights[-1:]])
            child.num_labels = after  # type: ignore[assignment]
