"""Accuracy and macro-F1, `evaluate` metrics over scikit-learn; they work offline, as no script is fetched."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
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


class ClassificationMetrics:
    """Accuracy and macro-F1 of batches that come one by one, as `Trainer` wants them with `batch_eval_metrics`."""

    def __init__(self) -> None:
        self._metrics: list[evaluate.Metric] = [Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)]

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; return the metrics of all batches since the last result, or {} before the last one.

        Args:
            eval_prediction: logits `(batch, classes)`, or a tuple that starts with them, and labels `(batch,)`.
            compute_result: this batch is the last.

        Raises:
            ValueError: there is not one prediction per label.
        """
        logits, references = _first(eval_prediction.predictions), _first(eval_prediction.label_ids)
        logits, references = torch.as_tensor(logits), torch.as_tensor(references)
        if logits.ndim != 2 or references.shape != logits.shape[:1] or not len(references):
            raise ValueError(
                f"predictions of shape {tuple(logits.shape)} do not fit labels of shape {tuple(references.shape)}; "
                "expected (images, classes) for (images,) labels, and at least one image."
            )
        predictions = logits.argmax(-1)
        results: dict[str, float] = {}
        for metric in self._metrics:
            metric.add_batch(predictions=predictions.cpu().numpy(), references=references.cpu().numpy())
            if compute_result:
                results |= metric.compute() or {}
        return results


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
