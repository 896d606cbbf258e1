"""What is measured, predicted and drawn of semantic segmentation, on models whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from transformers import EvalPrediction
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vpt_peft.data.masks import IGNORED
from vpt_peft.plots.segments import class_colour, draw_classes
from vpt_peft.tasks import get_task, task_names
from vpt_peft.tasks.instance import run_lengths
from vpt_peft.tasks.mean_iou import SegmentationMetrics, count_pixels
from vpt_peft.tasks.segmentation import decode_mask


NAMES = {0: "ground", 1: "dark", 2: "bright"}
TASK = get_task("semantic-segmentation")


class ByBrightness(torch.nn.Module):
    """Tells the class of a pixel by its brightness, at half of the resolution."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(40.0))
        self.config = SimpleNamespace(num_labels=3, id2label=NAMES)

    def forward(self, pixel_values, labels=None):
        grey = torch.nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), 2)
        middle = torch.tensor([0.5, 0.0, 1.0])[:, None, None]
        return SimpleNamespace(logits=-self.scale * (grey - middle).abs())


def processor(height=16, width=16):
    return ViTImageProcessorPil(size={"height": height, "width": width}, do_normalize=False)


def scene(height=40, width=52):
    mask = np.zeros((height, width), int)
    mask[4:20, 8:24], mask[22:36, 30:50] = 1, 2
    return Image.fromarray(np.array([128, 0, 255], np.uint8)[mask]).convert("RGB"), mask


def test_measures_are_those_of_torchmetrics():
    torch.manual_seed(0)
    predicted, labels = torch.randint(0, 4, (6, 8, 8)), torch.randint(0, 4, (6, 8, 8))
    labels[0] = IGNORED
    # Class 4 occurs nowhere, class 3 in no label
    labels[labels == 3] = 2
    metrics, whole = SegmentationMetrics(), MulticlassJaccardIndex(5, ignore_index=IGNORED)
    whole.update(predicted, labels)
    for start in (0, 4):
        part = slice(start, start + 4)
        counts = count_pixels(predicted[part], labels[part], 5, IGNORED)
        found = metrics(EvalPrediction(counts.numpy(), None), compute_result=start == 4)
    assert found["mean_iou"] == pytest.approx(whole.compute().item(), abs=1e-6)
    counted = labels != IGNORED
    exact = (predicted == labels)[counted].float().mean().item()
    assert found["pixel_accuracy"] == pytest.approx(exact, abs=1e-6)
    each = MulticlassAccuracy(5, average="none", ignore_index=IGNORED)(predicted, labels)
    assert found["mean_accuracy"] == pytest.approx(each[:3].mean().item(), abs=1e-6)
    # A result ends a run
    again = metrics(EvalPrediction(counts.numpy(), None))
    assert again["mean_iou"] != pytest.approx(found["mean_iou"], abs=1e-6)


def test_measured_at_the_size_of_the_labels():
    image, mask = scene(16, 16)
    labels = torch.from_numpy(mask)[None]
    logits = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()[..., ::2, ::2]
    model = SimpleNamespace(config=SimpleNamespace(num_labels=3))
    counts = TASK.measurable(model, logits, labels)
    assert counts.shape == (1, 3, 3) and counts.sum() == 256
    # Beside an auxiliary output, and where Trainer unpacks the only one
    assert torch.equal(counts, TASK.measurable(model, (torch.zeros(3), logits), labels))


@pytest.mark.parametrize("augmentation", ["none", "resize_crop_flip", "resize"])
def test_probabilities_cover_an_image_of_any_size(augmentation):
    image, mask = scene()
    found = TASK.probabilities(ByBrightness(), processor(40, 52), image, augmentation)
    assert found.shape == (3, 40, 52)
    torch.testing.assert_close(found.sum(0), torch.ones(40, 52))
    assert (found.argmax(0).numpy() == mask).mean() > 0.97


def test_tiles_give_what_the_whole_image_gives():
    image, _ = scene()
    whole = TASK.probabilities(ByBrightness(), processor(40, 52), image)
    tiled = TASK.probabilities(ByBrightness(), processor(16, 16), image)
    # Only where a tile ends at an odd pixel do its halves fall otherwise
    assert ((whole - tiled).abs().amax(0) < 1e-4).float().mean() > 0.85
    assert (whole.argmax(0) == tiled.argmax(0)).float().mean() > 0.98


def test_predictions_and_the_picture():
    image, mask = scene()
    found = TASK.predict(ByBrightness(), processor(), [image])[0]
    assert [each["label"] for each in found] == ["ground", "bright", "dark"]
    bright = found[1]
    assert bright["share"] == pytest.approx(14 * 20 / 2080, abs=0.02) and 0.9 < bright["score"] <= 1
    sides = [bright[side] for side in ("xmin", "ymin", "xmax", "ymax")]
    assert np.abs(np.array(sides) - (30, 22, 50, 36)).max() <= 1
    overlap = decode_mask(bright["segmentation"]) & (mask == 2)
    assert overlap.sum() > 0.9 * 280 and bright["area"] == decode_mask(bright["segmentation"]).sum()
    assert TASK.predict(ByBrightness(), processor(), [image], top_k=1)[0] == found[:1]
    assert TASK.predict(ByBrightness(), processor(), [image], threshold=1.0)[0] == []

    drawn = np.asarray(TASK.draw(image, found, NAMES))
    assert drawn.shape == (480, 624, 3)
    # Beside the name: the colour over the white square, and white lines around it
    middle = drawn[round(24 * 12), round(31.5 * 12)]
    assert np.abs(middle - (255 + 0.55 * (np.array(class_colour(2)) - 255))).max() <= 2


def test_run_lengths():
    mask = np.random.default_rng(0).random((7, 11)) > 0.5
    encoded = run_lengths(torch.from_numpy(mask)[None])[0]
    assert encoded["size"] == [7, 11] and isinstance(encoded["counts"], str)
    assert np.array_equal(decode_mask(encoded), mask)


def test_colours_tell_classes_apart():
    colours = np.array([class_colour(number) for number in range(35)], dtype=float)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(35)
    assert apart.min() > 25 and class_colour(7) != class_colour(0)


def test_pixels_without_a_class_stay():
    image, _ = scene()
    drawn = draw_classes(image, np.full((40, 52), -1), NAMES)
    assert np.array_equal(np.asarray(drawn), np.asarray(image.resize(drawn.size, Image.Resampling.LANCZOS)))


def test_names_do_not_cover_each_other():
    classes = np.zeros((480, 480), int)
    classes[200:240, 200:240] = 1
    classes[240:280, 200:240] = 2
    names = {0: "a long name of the ground", 1: "another name", 2: "a third name"}
    drawn = np.asarray(draw_classes(Image.new("RGB", (480, 480)), classes, names)).astype(int)
    for number in range(3):
        # The plates are the only places with the pure colour
        assert (np.abs(drawn - class_colour(number)).max(-1) == 0).sum() > 400


def test_found_by_its_name():
    assert "semantic-segmentation" in task_names() and TASK.hub_tag == "image-segmentation"
    with pytest.raises(ValueError, match="cache_features"):
        TASK.targets(None)
