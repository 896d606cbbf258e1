"""Accuracy and macro-F1 as `evaluate` metrics over scikit-learn; they work offline, as no script is fetched."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction


_CITATION = """\
@article{scikit-learn,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}"""
_INPUTS = """
Args:
    predictions (list of int): predicted classes.
    references (list of int): true classes.
"""


def _metric_info(description: str, page: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=_INPUTS,
        features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        reference_urls=[f"https://scikit-learn.org/stable/modules/generated/sklearn.metrics.{page}.html"],
    )


class Accuracy(evaluate.Metric):
    """Share of images whose predicted class is the true one, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info("Share of images whose predicted class is the true one.", "accuracy_score")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(evaluate.Metric):
    """Unweighted mean over the classes of F1 = 2 precision recall / (precision + recall), in [0, 1].

    The mean runs over the classes that occur among references or predictions; a class that is never predicted, or
    predicted but never true, counts with 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info("Unweighted mean of the F1 scores of the classes.", "f1_score")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """{"accuracy", "macro_f1"} for `Trainer(compute_metrics=...)`.

    `predictions` are logits (images, classes), a tuple that starts with them, or class numbers (images,), as
    `preprocess_logits_for_metrics` makes them.

    Raises:
        ValueError: if there is not one prediction per label.
    """
    logits, references = _first(eval_prediction.predictions), np.asarray(_first(eval_prediction.label_ids))
    predictions = np.asarray(logits)
    if predictions.ndim > 1:
        predictions = predictions.argmax(axis=-1)
    if predictions.shape != references.shape or predictions.size == 0:
        raise ValueError(
            f"predictions of shape {np.shape(logits)} do not fit labels of shape {references.shape}; expected "
            "(images, classes) or (images,) for (images,) labels, and at least one image."
        )
    results: dict[str, float] = {}
    for metric in (Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)):
        results.update(metric.compute(predictions=predictions, references=references) or {})
    return results


def preprocess_logits_for_metrics(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Class numbers (batch,) of logits (batch, classes), so that an evaluation does not gather all the logits."""
    return _first(logits).argmax(dim=-1)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
