import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from vpt_peft.training.metrics import Accuracy, MacroF1, compute_metrics, preprocess_logits_for_metrics


ROOT = Path(__file__).parents[2]
# per class: F1 of 0 is 2/3 (one of one found, one wrong), of 1 is 2/3 (one of two found), of 2 is 1
PREDICTIONS, REFERENCES = [0, 0, 1, 2], [0, 1, 1, 2]
LOGITS = np.eye(3, dtype=np.float32)[PREDICTIONS]


@pytest.mark.parametrize(
    ("metric", "name", "predictions", "references", "value"),
    [
        (Accuracy, "accuracy", PREDICTIONS, REFERENCES, 0.75),
        (MacroF1, "macro_f1", PREDICTIONS, REFERENCES, (2 / 3 + 2 / 3 + 1) / 3),
        (Accuracy, "accuracy", [1, 1], [0, 0], 0.0),
        # two classes occur; neither is right
        (MacroF1, "macro_f1", [1, 1], [0, 0], 0.0),
        (MacroF1, "macro_f1", [0, 0, 0, 0], [0, 0, 0, 1], (6 / 7) / 2),
    ],
)
def test_metrics(tmp_path, metric, name, predictions, references, value):
    module = metric(cache_dir=str(tmp_path))
    assert isinstance(module, evaluate.Metric) and module.module_type == "metric"
    assert module.compute(predictions=predictions, references=references) == {name: pytest.approx(value)}
    for prediction, reference in zip(predictions, references, strict=True):
        module.add(prediction=prediction, reference=reference)
    assert module.compute() == {name: pytest.approx(value)}
    assert (
        "scikit-learn" in module.citation
        and module.description
        and set(module.features)
        == {
            "predictions",
            "references",
        }
    )


def test_metrics_combine(tmp_path):
    both = evaluate.combine([Accuracy(cache_dir=str(tmp_path)), MacroF1(cache_dir=str(tmp_path))])
    assert set(both.compute(predictions=PREDICTIONS, references=REFERENCES)) == {"accuracy", "macro_f1"}


@pytest.mark.parametrize(
    "predictions",
    [LOGITS, (LOGITS, np.zeros((4, 7))), np.array(PREDICTIONS), (np.array(PREDICTIONS),)],
    ids=["logits", "tuple", "classes", "tuple of classes"],
)
def test_compute_metrics(predictions):
    results = compute_metrics(EvalPrediction(predictions=predictions, label_ids=np.array(REFERENCES)))
    assert results == {"accuracy": pytest.approx(0.75), "macro_f1": pytest.approx(7 / 9)}
    assert all(type(value) is float for value in results.values())


@pytest.mark.parametrize("predictions", [np.zeros((3, 2)), np.zeros((4, 2, 2)), np.zeros((0, 2))])
def test_compute_metrics_refuses_shapes_that_do_not_fit(predictions):
    with pytest.raises(ValueError, match="do not fit labels"):
        compute_metrics(EvalPrediction(predictions=predictions, label_ids=np.array(REFERENCES)))


def test_compute_metrics_refuses_an_empty_split():
    with pytest.raises(ValueError, match="at least one image"):
        compute_metrics(EvalPrediction(predictions=np.zeros((0, 2)), label_ids=np.zeros(0, dtype=int)))


def test_preprocess_logits():
    logits, labels = torch.from_numpy(LOGITS), torch.tensor(REFERENCES)
    assert preprocess_logits_for_metrics(logits, labels).tolist() == PREDICTIONS
    assert preprocess_logits_for_metrics((logits, torch.zeros(4, 9)), labels).tolist() == PREDICTIONS


def test_metrics_need_no_network(tmp_path):
    code = (
        "import numpy as np; from transformers import EvalPrediction\n"
        "from vpt_peft.training.metrics import compute_metrics\n"
        "print(compute_metrics(EvalPrediction(np.eye(2), np.array([0, 0])))['accuracy'])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert run.stdout.strip() == "0.5"
