import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DeformableDetrImageProcessorPil,
    DetrImageProcessorPil,
    EvalPrediction,
    ViTConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from vpt_peft.dense.detector import ViTFCOSConfig, ViTFCOSForObjectDetection
from vpt_peft.tasks.detection import TASK, find_boxes


PROCESSOR = DeformableDetrImageProcessorPil(size={"height": 48, "width": 64})
NAMES = {0: "cat", 1: "dog"}


def rows():
    """Two pictures: of 32x24 pixels with an object and a crowd, and of 20x24 pixels with nothing."""
    objects = {
        "bbox": [[8.0, 6.0, 10.0, 12.0], [0.0, 0.0, 5.0, 5.0]],
        "category": [1, 0],
        "area": [120.0, 25.0],
        "iscrowd": [False, True],
    }
    nothing: dict = {name: [] for name in objects}
    return {"image": [Image.new("RGB", (32, 24)), Image.new("RGB", (20, 24))], "objects": [objects, nothing]}


def batch():
    out = TASK.transform(PROCESSOR)(rows())
    return TASK.collate([dict(zip(out, values, strict=True)) for values in zip(*out.values(), strict=True)])


def test_labels_are_those_of_transformers():
    labels = batch()["labels"]
    assert labels[0]["class_labels"].tolist() == [1]
    torch.testing.assert_close(labels[0]["boxes"], torch.tensor([[13 / 32, 0.5, 10 / 32, 0.5]]))
    assert labels[0]["crowd_labels"].tolist() == [0] and labels[0]["crowd_area"].tolist() == [25.0]
    assert labels[0]["canvas"].tolist() == [24.0, 32.0] and labels[0]["orig_size"].tolist() == [24, 32]
    assert labels[1]["boxes"].shape == (0, 4) and labels[1]["canvas"].tolist() == [24.0, 32.0]
    assert batch()["pixel_values"].shape == (2, 3, 48, 64)
    assert set(TASK.transform(PROCESSOR)({"image": rows()["image"]})) == {"pixel_values"}


def perfect(labels, exclusive=False):
    """Outputs that find all objects and crowds of the labels, and one thing that is not there, with a lower score."""
    logits = torch.full((len(labels), 3, 2 + exclusive), -8.0)
    if exclusive:
        logits[..., 2] = 0.0
    boxes = torch.full((len(labels), 3, 4), 0.9)
    for index, label in enumerate(labels):
        classes = torch.cat([label["class_labels"], label["crowd_labels"]])
        sides = torch.cat([label["boxes"], label["crowd_boxes"]])
        logits[index, torch.arange(len(classes)), classes] = 8.0
        boxes[index, : len(sides)] = sides
    logits[:, 2, 0] = 1.0 if exclusive else 0.0
    return logits, boxes


def measured(logits, boxes, labels):
    model = type("Model", (), {"config": type("Config", (), {"num_labels": 2})})
    tensors = TASK.measurable(model, ({"loss_box": torch.zeros(())}, logits, boxes, torch.zeros(2, 3, 8)), labels)
    return EvalPrediction(tensors, labels), tensors


@pytest.mark.parametrize("exclusive", [False, True])
def test_measured_in_pixels_of_the_image(exclusive):
    labels = batch()["labels"]
    prediction, (found, expected) = measured(*perfect(labels, exclusive), labels)
    assert found.shape == (2, 6, 6) and expected.shape == (2, 3, 7)
    best = found[0, found[0, :, 0] == 1][0]
    torch.testing.assert_close(best[2:], torch.tensor([8.0, 6.0, 10.0, 12.0]))
    assert expected[0].tolist() == [[24, 32, 0, 0, 0, 0, 0], [1, 8, 6, 10, 12, 120, 0], [0, 0, 0, 5, 5, 25, 1]]
    assert expected[1].tolist() == [[24, 20, 0, 0, 0, 0, 0], [-1] * 7, [-1] * 7]
    metrics = TASK.compute_metrics()
    assert metrics(prediction, compute_result=False) == {}
    result = metrics(prediction, compute_result=True)
    assert result["map"] == pytest.approx(1.0)
    # Moved by half its width, it is not the object
    logits, boxes = perfect(labels, exclusive)
    boxes[0, 0, 0] += 0.15
    assert metrics(measured(logits, boxes, labels)[0], compute_result=True)["map_50"] < 0.1


def test_boxes_end_at_the_image_not_at_the_canvas():
    labels = batch()["labels"]
    logits, boxes = perfect(labels)
    boxes[1, 0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    logits[1, 0, 0] = 9.0
    _, (found, _) = measured(logits, boxes, labels)
    assert found[1, 0, 2:].tolist() == [0.0, 0.0, 20.0, 24.0]


@pytest.mark.parametrize("exclusive", [False, True])
def test_findings_are_those_of_transformers_processors(exclusive):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 2 + exclusive, generator=generator)
    boxes = torch.rand(2, 30, 4, generator=generator)
    output = type("Output", (), {"logits": logits, "pred_boxes": boxes})
    sizes = torch.tensor([[24.0, 32.0], [100.0, 50.0]])
    processor = DetrImageProcessorPil() if exclusive else PROCESSOR
    expected = processor.post_process_object_detection(output, threshold=0.5, target_sizes=sizes)
    scores, classes, found = find_boxes(logits, boxes, 2, sizes)
    for index, theirs in enumerate(expected):
        ours = scores[index] > 0.5
        order = theirs["scores"].argsort(descending=True)
        assert ours.sum() == len(order) > 5
        torch.testing.assert_close(scores[index][ours], theirs["scores"][order])
        assert torch.equal(classes[index][ours], theirs["labels"][order])
        torch.testing.assert_close(found[index][ours], theirs["boxes"][order])


def test_outputs_that_are_not_of_a_detector():
    with pytest.raises(ValueError, match="not an object detector"):
        measured(torch.zeros(2, 5), torch.zeros(2, 5), batch()["labels"])


def test_augmentation_is_for_training_alone():
    evaluation = TASK.transform(PROCESSOR, "resize_crop_flip")
    assert evaluation.augmentation is None and TASK.transform(PROCESSOR, "none", train=True).augmentation is None
    training = TASK.transform(PROCESSOR, "resize_crop_flip", train=True)
    torch.manual_seed(0)
    first, second = training(rows())["labels"][0]["boxes"], training(rows())["labels"][0]["boxes"]
    assert not torch.equal(first, second)


def test_predictions_in_pixels():
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = ViTFCOSForObjectDetection(ViTFCOSConfig(vit, channels=16, num_convs=1, id2label=NAMES)).eval()
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, w, 3), np.uint8)) for w in (32, 20)]
    assert TASK.predict(model, PROCESSOR, images) == [[], []]
    found = TASK.predict(model, PROCESSOR, images, threshold=0.01)
    assert len(found[0]) > 5 and set(found[0][0]) == {"label", "score", "xmin", "ymin", "xmax", "ymax"}
    for image, rows in zip(images, found, strict=True):
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert all(0 <= row["xmin"] <= row["xmax"] <= image.width and row["label"] in NAMES.values() for row in rows)
        assert all(0 <= row["ymin"] <= row["ymax"] <= image.height for row in rows)
    assert max(row["xmax"] for row in found[0]) > 20
    assert TASK.predict(model, PROCESSOR, images, top_k=2, threshold=0.01)[0] == found[0][:2]


def test_yolos_trains_on_the_same_batch():
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[48, 64],
        patch_size=16,
        num_detection_tokens=5,
        id2label=NAMES,
    )
    torch.manual_seed(0)
    model, data = YolosForObjectDetection(config), batch()
    output = model(**data)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    found, expected = TASK.measurable(model, tuple(v for k, v in output.items() if k != "loss"), data["labels"])
    assert found.shape == (2, 10, 6) and expected.shape == (2, 3, 7)


def test_it_reads_and_names_its_classes(tmp_path):
    from vpt_peft.data.arguments import DataArguments

    table = datasets.Dataset.from_dict(
        rows(),
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "objects": {
                    "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                    "category": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
                    "area": datasets.List(datasets.Value("float32")),
                    "iscrowd": datasets.List(datasets.Value("bool")),
                },
            }
        ),
    )
    table.to_parquet(tmp_path / "train.parquet")
    table.to_parquet(tmp_path / "validation.parquet")
    splits = TASK.read(DataArguments(str(tmp_path)), cache_dir=str(tmp_path / "cache"))
    assert TASK.id2label(splits["train"]) == NAMES
    labels = splits["train"].with_transform(TASK.transform(PROCESSOR))[0]["labels"]
    torch.testing.assert_close(labels["boxes"], batch()["labels"][0]["boxes"])


def test_packages_are_asked_for_before_anything_is_read(monkeypatch):
    from vpt_peft.data.arguments import DataArguments

    monkeypatch.setattr("vpt_peft.dense.find_spec", lambda name: None if name == "kornia" else object())
    with pytest.raises(ModuleNotFoundError, match=r"need kornia: pip install 'vpt_peft\[dense\]'"):
        TASK.read(DataArguments("missing"))
