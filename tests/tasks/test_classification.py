from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction, ViTImageProcessorPil

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.images import DataError
from vpt_peft.tasks import get_task, task_names
from vpt_peft.tasks.accuracy import Accuracy, ClassificationMetrics, MacroF1
from vpt_peft.tasks.classification import TASK


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


@pytest.mark.parametrize("predictions", [LOGITS, (LOGITS, np.zeros((4, 7))), torch.from_numpy(LOGITS)])
def test_one_batch(predictions):
    results = TASK.compute_metrics()(EvalPrediction(predictions=predictions, label_ids=np.array(REFERENCES)))
    assert results == {"accuracy": pytest.approx(0.75), "macro_f1": pytest.approx(7 / 9)}
    assert all(type(value) is float for value in results.values())


def test_batches_add_up_and_start_anew():
    compute = TASK.compute_metrics()
    for _ in range(2):
        for rows, last in ((slice(0, 3), False), (slice(3, 4), True)):
            found = compute(EvalPrediction(LOGITS[rows], np.array(REFERENCES)[rows]), compute_result=last)
            assert bool(found) == last
        assert found == {"accuracy": pytest.approx(0.75), "macro_f1": pytest.approx(7 / 9)}


def test_the_metrics_are_those_it_names():
    found = TASK.compute_metrics()(EvalPrediction(LOGITS, np.array(REFERENCES)))
    assert list(found) == [metric.name for metric in TASK.metrics] and TASK.best_metric in found
    assert [metric.format(0.93754) for metric in TASK.metrics] == ["93.75 %"] * 2
    assert [metric.label for metric in TASK.metrics] == ["accuracy (%)", "macro F1 (%)"]


@pytest.mark.parametrize("shape", [(3, 2), (4, 2, 2), (0, 2), (4,)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="do not fit labels"):
        ClassificationMetrics()(EvalPrediction(predictions=np.zeros(shape), label_ids=np.array(REFERENCES)))


def test_an_empty_split():
    with pytest.raises(ValueError, match="at least one image"):
        ClassificationMetrics()(EvalPrediction(predictions=np.zeros((0, 2)), label_ids=np.zeros(0, dtype=int)))


def test_unknown_tasks():
    with pytest.raises(ValueError, match="task='depth' is unknown; choose one of image-classification"):
        get_task("depth")
    assert get_task() is TASK and task_names()[0] == "image-classification"


def test_images_and_labels_travel_together():
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    transform = TASK.transform(processor, "resize_crop_flip", train=True)
    images = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(3)]
    output = transform({"image": images, "label": [2, 0, 1], "other": [0] * 3})
    assert set(output) == {"pixel_values", "labels"} and output["labels"] == [2, 0, 1]
    assert set(transform({"image": images})) == {"pixel_values"}
    examples = [{"pixel_values": p, "labels": n} for p, n in zip(output["pixel_values"], [2, 0, 1], strict=True)]
    batch = TASK.collate(examples)
    assert torch.equal(batch["pixel_values"], output["pixel_values"]) and batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [2, 0, 1]
    assert set(TASK.collate([{"pixel_values": torch.zeros(3, 2, 2)}])) == {"pixel_values"}


def test_targets_are_the_transformed_labels():
    split = TASK.read(DataArguments("digits", max_eval_samples=10))["validation"]
    rows = split.with_transform(TASK.transform(ViTImageProcessorPil(size={"height": 8, "width": 8})))
    assert TASK.targets(split) == [{"labels": row["labels"]} for row in rows]


def test_labels_numbered_as_a_model_does():
    digits, own = (
        TASK.read(DataArguments("digits"), id2label=names) for names in ({str(i): str(9 - i) for i in range(10)}, None)
    )
    for name in own:
        assert digits[name]["label"][:] == [9 - label for label in own[name]["label"]]
    # Names of a model need not be unique, nor all in the data
    more = {**{i: str(i) for i in range(10)}, 10: "x", 11: "x"}
    assert TASK.read(DataArguments("digits"), id2label=more)["test"]["label"][:] == own["test"]["label"][:]
    with pytest.raises(DataError, match="does not know the labels '9'; it knows '0'"):
        TASK.read(DataArguments("digits"), id2label={i: str(i) for i in range(9)})


def test_metrics_need_no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    assert TASK.compute_metrics()(EvalPrediction(np.eye(2), np.array([0, 0])))["accuracy"] == 0.5
