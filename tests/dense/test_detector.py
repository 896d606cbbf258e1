import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForObjectDetection,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from vpt_peft import VPTConfig
from vpt_peft.dense.boxes import corners
from vpt_peft.dense.detector import ViTFCOSConfig, ViTFCOSForObjectDetection
from vpt_peft.dense.fcos import Locations, Predictions, detection_loss, focal_loss
from vpt_peft.dense.plain_vit import patch_map
from vpt_peft.export import export_model


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = {0: "cat", 1: "dog"}
HEAD = {"channels": 16, "num_convs": 1}
LABELS = [
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])},
    {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
]


def make(seed=0, **fields):
    torch.manual_seed(seed)
    return ViTFCOSForObjectDetection(
        ViTFCOSConfig(ViTConfig(**TINY), id2label=NAMES, label2id={"cat": 0, "dog": 1}, **HEAD, **fields)
    )


def images(height=40, width=48, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return make().eval()


# Locations and losses


def locations():
    return Locations.of([torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)], [8.0, 16.0])


def test_locations_lie_in_the_middle_of_their_cells():
    found = locations()
    assert found.points[:2].tolist() == [[4.0, 4.0], [12.0, 4.0]]
    assert found.points[8].tolist() == [4.0, 12.0]
    assert found.points[64].tolist() == [8.0, 8.0]
    assert found.strides.tolist() == [8.0] * 64 + [16.0] * 16
    assert found.reach[0].tolist() == [0.0, 64.0] and found.reach[64].tolist() == [64.0, math.inf]


def test_boxes_at_locations():
    boxes = locations().boxes(torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    assert boxes[1].tolist() == [11.0, 2.0, 15.0, 9.0]


def test_the_smallest_object_has_the_location():
    found = locations()
    has_object, objects = found.match(torch.tensor([[0.0, 0.0, 56.0, 56.0], [20.0, 20.0, 36.0, 36.0]]))
    of_second = found.points[has_object & (objects == 1)]
    # The second holds one middle of a cell; the first has the others around its own middle, 28
    assert of_second.tolist() == [[28.0, 28.0]]
    assert int(has_object.sum()) == 9


def test_large_objects_are_on_the_coarse_level():
    found = Locations.of([torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 16, 16)], [8.0, 16.0])
    has_object, _ = found.match(torch.tensor([[0.0, 0.0, 200.0, 200.0]]))
    assert set(found.strides[has_object].tolist()) == {16.0}
    has_object, _ = found.match(torch.tensor([[0.0, 0.0, 40.0, 40.0]]))
    assert set(found.strides[has_object].tolist()) == {8.0}
    has_object, _ = found.match(torch.zeros(0, 4))
    assert not has_object.any()


def test_focal_loss_by_hand():
    loss = focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor([0.25, 0.75]) * 0.25 * math.log(2))


def test_perfect_predictions_have_no_loss_of_box_and_class():
    found, box = locations(), torch.tensor([0.5, 0.5, 0.375, 0.5])
    target = corners(box) * 64
    sides = torch.cat([found.points - target[:2], target[2:] - found.points], -1)
    has_object, _ = found.match(target[None])
    logits = torch.full((1, 80, 2), -20.0)
    logits[0, has_object, 1] = 20.0
    labels = [{"class_labels": torch.tensor([1]), "boxes": box[None]}]
    losses = detection_loss(Predictions(logits, sides.clamp(min=0)[None], torch.zeros(1, 80)), found, labels, (64, 64))
    assert losses["loss_class"] < 1e-6 and losses["loss_box"] < 1e-6
    torch.testing.assert_close(losses["loss_centerness"], torch.tensor(math.log(2)))
    wrong = [{"class_labels": torch.tensor([0]), "boxes": box[None]}]
    losses = detection_loss(Predictions(logits, sides.clamp(min=0)[None], torch.zeros(1, 80)), found, wrong, (64, 64))
    assert losses["loss_class"] > 10


# The model


def test_the_head_starts_at_its_prior(model):
    torch.testing.assert_close(model.head.class_predictor.bias.sigmoid(), torch.full((2,), 0.01))
    assert model.head.level_scales.tolist() == [1.0, 1.0, 1.0]


def test_suppressed_boxes_score_nothing(model):
    with torch.no_grad():
        output = model(images())
    scores, boxes = output.logits.sigmoid(), output.pred_boxes
    # 3 levels of a 40x48 image in patches of 8: 10x12, 5x6 and 3x3
    assert scores.shape == (2, 159, 2) and boxes.shape == (2, 159, 4)
    assert ((corners(boxes) >= -1e-6) & (corners(boxes) <= 1 + 1e-6)).all()
    gone = scores == 0
    assert 0 < gone.sum() < gone.numel() / 2
    with torch.enable_grad():
        training = model(images(), labels=LABELS)
    assert (training.logits.sigmoid() > 0).all()
    torch.testing.assert_close(training.logits[~gone], output.logits[~gone])


def test_loss_is_the_sum_of_its_parts_and_reaches_everything(model):
    output = model(images(), labels=LABELS)
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))
    output.loss.backward()
    # Every parameter of head and neck but for levels that no object is on
    without = {name for name, value in model.named_parameters() if value.grad is None}
    assert without <= {"backbone.embeddings.mask_token"}
    model.zero_grad()


def test_images_of_odd_sizes_are_filled_up_right_and_below(model):
    odd = images(37, 45)
    filled = torch.nn.functional.pad(odd, (0, 3, 0, 3))
    with torch.no_grad():
        torch.testing.assert_close(patch_map(model.backbone, odd), patch_map(model.backbone, filled))
        found, whole = model(odd).pred_boxes, model(filled).pred_boxes
        assert patch_map(model.backbone, images(3, 5)).shape == (2, 16, 1, 1)
    inside = (corners(whole)[..., 2] < 44 / 48) & (corners(whole)[..., 3] < 36 / 40)
    scale = torch.tensor([48 / 45, 40 / 37, 48 / 45, 40 / 37])
    torch.testing.assert_close(found[inside], (whole * scale)[inside])


def test_it_learns_one_image():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(images(), labels=LABELS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        output = model.eval()(images())
    scores = output.logits.sigmoid()
    best = scores[0].flatten().argmax()
    assert best % 2 == 1 and scores[0].max() > 2 * scores[1].max()
    torch.testing.assert_close(output.pred_boxes[0, best // 2], LABELS[0]["boxes"][0], atol=0.06, rtol=0)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert isinstance(loaded, ViTFCOSForObjectDetection)
    assert loaded.config.id2label == NAMES and loaded.config.scale_factors == [2.0, 1.0, 0.5]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images()).logits, model(images()).logits)


def checkpoint(kind, folder):
    torch.manual_seed(1)
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**TINY))
    elif kind == "deit":
        model = DeiTModel(DeiTConfig(**TINY))
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**TINY))
    elif kind == "mae":
        model = ViTMAEForPreTraining(
            ViTMAEConfig(**TINY, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
        )
    else:
        text = {**TINY, "vocab_size": 10, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
        model = CLIPModel(CLIPConfig(vision_config=TINY, text_config=text))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "mae", "clip"])
def test_any_plain_vit(kind, tmp_path):
    source = checkpoint(kind, tmp_path)
    model = ViTFCOSForObjectDetection.from_backbone(str(tmp_path), NAMES, **HEAD)
    theirs = {name: value for name, value in source.state_dict().items() if "mlp" in name or "fc" in name}
    kept = [v for v in theirs.values() if any(torch.equal(v, w) for w in model.backbone.state_dict().values())]
    assert len(kept) >= 4
    adapted = get_peft_model(model, VPTConfig(num_virtual_tokens=2))
    assert adapted.peft_config["default"].modules_to_save == ["neck", "head"]
    output = adapted(pixel_values=images(), labels=LABELS)
    output.loss.backward()
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert all("prompt_tuner" in name or "modules_to_save" in name for name in trained)
    prompts = [v for name, v in adapted.named_parameters() if "prompt_tuner" in name]
    assert len(prompts) == 2 and all(value.grad.abs().sum() > 0 for value in prompts)


def test_an_adapter_travels_with_its_classes(tmp_path):
    checkpoint("vit", tmp_path / "base")
    adapted = get_peft_model(
        ViTFCOSForObjectDetection.from_backbone(str(tmp_path / "base"), NAMES, **HEAD), VPTConfig(num_virtual_tokens=2)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    base = ViTFCOSForObjectDetection.from_backbone(str(tmp_path / "base"), {0: "x", 1: "y", 2: "z"}, **HEAD)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=images()).logits, adapted(pixel_values=images()).logits)
    assert loaded.config.id2label == NAMES


def test_it_is_exported_with_its_suppression(model, tmp_path):
    adapted = get_peft_model(make(), VPTConfig(num_virtual_tokens=2)).eval()
    processor = ViTImageProcessorPil(size={"height": 40, "width": 48})
    path = export_model(adapted, tmp_path, "torch", image_processor=processor)
    exported = torch.export.load(path).module()(images(count=3))
    with torch.no_grad():
        expected = adapted(pixel_values=images(count=3))
    assert (expected.logits.sigmoid() == 0).any()
    torch.testing.assert_close(exported["logits"].sigmoid(), expected.logits.sigmoid(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(exported["pred_boxes"], expected.pred_boxes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"num_convs": -1}, "num_convs=-1"),
        ({"scale_factors": [1.0, 2.0]}, "scale_factors"),
        ({"scale_factors": [3.0]}, "scale_factors"),
        ({"scale_factors": []}, "scale_factors"),
        ({"nms_threshold": 1.5}, "nms_threshold=1.5"),
        ({"backbone_config": SwinConfig()}, "not a plain ViT"),
    ],
)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTFCOSConfig(**{"backbone_config": ViTConfig(**TINY), **fields})
