import numpy as np
import pytest
import torch
from composites import mask2former, maskformer
from PIL import Image
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    EvalPrediction,
    MaskFormerForInstanceSegmentation,
    ViTImageProcessorPil,
)

from vpt_peft.data.canvas import JointAugmentation
from vpt_peft.tasks.instance import TASK, find_masks, run_lengths


PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


class Model:
    class config:
        num_labels = 2
        id2label = {0: "cat", 1: "dog"}


def rows():
    """Two pictures: 16x8 pixels with two instances, and 8x8 pixels with none."""
    ids = np.zeros((8, 16), np.uint16)
    ids[2:6, 1:5], ids[0:4, 10:16] = 700, 3
    return {
        "image": [Image.new("RGB", (16, 8), "white"), Image.new("RGB", (8, 8))],
        "instances": [Image.fromarray(ids), Image.fromarray(np.zeros((8, 8), np.uint16))],
        "category": [1, 1],
    }


def batch(**options):
    out = TASK.transform(PROCESSOR, **options)(rows())
    return TASK.collate([dict(zip(out, values, strict=True)) for values in zip(*out.values(), strict=True)])


def perfect(data, score=8.0):
    """Outputs with a query for each object, and one that finds what is not there with a lower score."""
    classes, masks = torch.zeros(2, 4, 3), torch.full((2, 4, 32, 32), -9.0)
    classes[..., 2] = 8.0
    for index, (shapes, numbers) in enumerate(zip(data["mask_labels"], data["class_labels"], strict=True)):
        count = len(numbers)
        masks[index, :count] = shapes * 18 - 9
        classes[index, range(count), 2], classes[index, range(count), numbers] = 0.0, score
    masks[:, 3, 20:, 20:] = 9.0
    return classes, masks


def measure(classes, masks, data):
    labels = (data["mask_labels"], data["class_labels"])
    return TASK.measurable(Model, (classes, masks, torch.zeros(2, 5, 3)), labels)


def test_masks_lie_on_the_canvas_as_the_image_does():
    data = batch()
    assert data["pixel_values"].shape == (2, 3, 32, 32)
    assert (data["pixel_values"][0, :, :16] == 1).all() and (data["pixel_values"][0, :, 16:] == 0).all()
    # Sorted by their numbers, 3 and 700; twice as large
    masks = data["mask_labels"][0]
    assert masks.shape == (2, 32, 32) and masks[0, 0:8, 20:32].all() and masks[0].sum() == 96
    assert masks[1, 4:12, 2:10].all() and masks[1].sum() == 64
    assert data["class_labels"][0].tolist() == [1, 1]
    assert data["mask_labels"][1].shape == (0, 32, 32) and data["class_labels"][1].shape == (0,)
    assert set(TASK.transform(PROCESSOR)({"image": rows()["image"]})) == {"pixel_values"}


def test_masks_follow_the_augmented_image():
    augment, moved = JointAugmentation(), 0
    torch.manual_seed(0)
    for _ in range(12):
        pixels = torch.zeros(3, 60, 80)
        pixels[:, 20:40, 24:40] = 1
        image, masks, stays = augment.with_masks(pixels, pixels[:1])
        overlap = ((image[0] > 0.5) & (masks[0] > 0)).sum() / ((image[0] > 0.5) | (masks[0] > 0)).sum()
        assert overlap > 0.85 and stays.tolist() == [True] and set(masks.unique().tolist()) == {0.0, 1.0}
        moved += not torch.equal(masks, pixels[:1])
    assert moved > 8
    image, masks, stays = augment.with_masks(torch.zeros(3, 60, 80), torch.zeros(0, 60, 80))
    assert masks.shape == (0, 60, 80) and stays.shape == (0,)
    torch.manual_seed(1)
    trained = batch(augmentation="resize_crop_flip", train=True)
    assert not torch.equal(trained["pixel_values"], batch()["pixel_values"])


def test_scores_are_class_times_mask():
    classes = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    masks = torch.full((3, 4, 4), -5.0)
    masks[0, :2], masks[1, 2:] = 1.0, 3.0
    scores, kinds, shapes = find_masks(classes, masks, 2, (4, 4))
    # The third query has an empty mask: four findings of two masks are left
    assert len(scores) == 4 and shapes.shape == (4, 4, 4)
    first = classes[0].softmax(-1)[0] * torch.tensor(1.0).sigmoid()
    second = classes[1].softmax(-1)[1] * torch.tensor(3.0).sigmoid()
    torch.testing.assert_close(scores[:2], torch.stack([first, second]))
    assert kinds[:2].tolist() == [0, 1]
    assert (shapes[0] > 0).sum() == 8 and (shapes[0, :2] > 0).all()


def test_measured_by_masks():
    data, metrics = batch(), TASK.compute_metrics()
    tensors = measure(*perfect(data), data)
    assert [tuple(each.shape[:2]) for each in tensors] == [(2, 6), (2, 6), (2, 2), (2, 2), (2, 2)]
    assert metrics(EvalPrediction(tensors, None), compute_result=False) == {}
    result = metrics(EvalPrediction(tensors, None), compute_result=True)
    assert result["map"] == pytest.approx(1.0) and result["map_class_1"] == pytest.approx(1.0)
    # Half of each mask is an IoU of 1/2: it counts at one of ten thresholds
    classes, masks = perfect(data)
    masks[0, 0, :, 26:], masks[0, 1, :, 6:] = -9.0, -9.0
    found = metrics(EvalPrediction(measure(classes, masks, data), None), compute_result=True)
    assert found["map_50"] == pytest.approx(1.0) and found["map_75"] == 0 and found["map"] == pytest.approx(0.1)
    # Confident of what is not there
    classes, masks = perfect(data)
    classes[:, 3, 1], classes[:, 3, 2] = 9.0, -9.0
    assert metrics(EvalPrediction(measure(classes, masks, data), None), compute_result=True)["map"] < 0.6


def test_run_lengths_are_those_of_coco():
    from faster_coco_eval.core import mask as coco_mask

    shapes = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    for shape, runs in zip(shapes, run_lengths(shapes), strict=True):
        assert np.array_equal(coco_mask.decode(runs), shape.numpy().astype(np.uint8)) and runs["size"] == [7, 5]
    assert run_lengths(shapes[:0]) == []


@pytest.mark.parametrize("make", [mask2former, maskformer])
def test_it_trains_universal_segmenters(make):
    torch.manual_seed(0)
    model, data = make(), batch()
    output = model(**data)
    output.loss.backward()
    assert torch.isfinite(output.loss) and isinstance(model, MaskFormerForInstanceSegmentation) == (make is maskformer)
    with torch.no_grad():
        output = model.eval()(**data)
    predictions = tuple(value for name, value in output.items() if name != "loss")
    tensors = TASK.measurable(model, predictions, (data["mask_labels"], data["class_labels"]))
    assert (tensors[0][..., 0] < model.config.num_labels).all()
    assert "map" in TASK.compute_metrics()(EvalPrediction(tensors, None), compute_result=True)


def test_outputs_without_queries_are_refused():
    with pytest.raises(ValueError, match="no class and mask for each query"):
        TASK.measurable(Model, (torch.zeros(2, 3), torch.zeros(2, 3)), ([], []))


def test_an_eomt_keeps_its_size(tmp_path):
    config = EomtConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_blocks=1,
        num_queries=5,
        num_register_tokens=0,
    )
    EomtForUniversalSegmentation(config).save_pretrained(tmp_path)
    model = TASK.load_model(str(tmp_path), {0: "a"}, {}, image_processor=PROCESSOR)
    assert model.class_predictor.out_features == 2
    torch.testing.assert_close(model.criterion.empty_weight, torch.tensor([1.0, config.no_object_weight]))
    larger = ViTImageProcessorPil(size={"height": 48, "width": 48})
    with pytest.raises(ValueError, match=r"image_size=\[48, 48\]: .* is built for 32 32"):
        TASK.load_model(str(tmp_path), {0: "a"}, {}, image_processor=larger)
