"""Segmenters of transformers: loaded with fresh heads for the classes, prompted, trained for a step, loaded again."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSemanticSegmentation,
    BeitConfig,
    BeitForSemanticSegmentation,
    Dinov2Config,
    Dinov2Model,
    EomtConfig,
    EomtForUniversalSegmentation,
    SwinConfig,
    SwinModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

from vpt_peft import VPTConfig
from vpt_peft.dense.mask_classifier import EomtForSemanticSegmentation, split_labels
from vpt_peft.dense.segmenter import ViTForSemanticSegmentation, ViTSegmenterConfig
from vpt_peft.methods import MethodOptions
from vpt_peft.methods.apply import apply_method
from vpt_peft.tasks import get_task


TASK = get_task("semantic-segmentation")
NAMES = {0: "a", 1: "b", 2: "c"}
PLAIN = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "image_size": 64,
    "patch_size": 2,
}


def upernet():
    backbone = SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, num_labels=5)
    )


def beit():
    # Two of its levels are enlarged by transposed convolutions
    return BeitForSemanticSegmentation(
        BeitConfig(**PLAIN, intermediate_size=32, out_indices=[1, 2, 3, 4], num_labels=5, auxiliary_loss_input_dim=16)
    )


def eomt():
    config = EomtConfig(**{**PLAIN, "image_size": 64}, num_queries=6, num_blocks=2, num_upscale_blocks=1, num_labels=5)
    return EomtForUniversalSegmentation(config)


MODELS = {
    "upernet": (upernet, None, UperNetForSemanticSegmentation),
    "beit": (beit, None, BeitForSemanticSegmentation),
    "eomt": (eomt, None, EomtForSemanticSegmentation),
    "dinov2-upernet": (lambda: Dinov2Model(Dinov2Config(**PLAIN)), "upernet", UperNetForSemanticSegmentation),
    "dinov2-dpt": (lambda: Dinov2Model(Dinov2Config(**PLAIN)), "dpt", ViTForSemanticSegmentation),
    "swin-upernet": (lambda: SwinModel(SwinConfig(**SWIN)), "upernet", UperNetForSemanticSegmentation),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the checkpoints, made when they are asked for."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = str(tmp_path_factory.mktemp(name))
            MODELS[name][0]().save_pretrained(made[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_prompted_trained_and_loaded_again(folders, name, tmp_path):
    _, decoder, kind = MODELS[name]
    size = 32 if name == "beit" else 64

    def load():
        torch.manual_seed(1)
        return TASK.load_model(folders(name), NAMES, {}, decoder=decoder).eval()

    base = load()
    assert type(base) is kind
    assert base.config.id2label == NAMES
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=2))
    images, labels = torch.randn(2, 3, size, size), torch.randint(0, 3, (2, size, size))
    labels[:, :8] = 255
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()
    loss = model(pixel_values=images, labels=labels).loss
    loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        counts = TASK.measurable(base, (expected,), labels)
    assert counts.shape == (2, 3, 3) and counts.sum() == 2 * (size - 8) * size
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixel_values=images).logits, expected)


@pytest.mark.parametrize("method", ["linear", "bias", "adapter", "lora", "full"])
def test_other_methods_train_the_whole_head(folders, method):
    model = TASK.load_model(folders("dinov2-upernet"), NAMES, {}, decoder="upernet")
    adapted = apply_method(model, method, MethodOptions())
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for part in ("decode_head", "auxiliary_head"):
        parameters = [name for name, _ in adapted.named_parameters() if f"{part}." in name and "original" not in name]
        assert parameters and set(parameters) <= trained
    if method == "linear":
        assert not any("backbone" in name for name in trained)


@pytest.mark.parametrize("method", ["vpt", "linear", "lora"])
def test_queries_of_eomt_train_with_the_head(folders, method):
    base = TASK.load_model(folders("eomt"), NAMES, {})
    start = base.query.weight.detach().clone()
    model = apply_method(base, method, MethodOptions())
    labels = torch.randint(0, 3, (1, 64, 64))
    model.train()(pixel_values=torch.randn(1, 3, 64, 64), labels=labels).loss.backward()
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0).step()
    assert ((base.query.weight - start).abs().sum(-1) > 0).all()


def test_eomt_says_what_its_queries_say(folders):
    torch.manual_seed(2)
    model = EomtForSemanticSegmentation.from_pretrained(folders("eomt")).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        universal = EomtForUniversalSegmentation.forward(model, images)
        logits = model(pixel_values=images).logits
    masks = F.interpolate(universal.masks_queries_logits, size=(64, 64), mode="bilinear", align_corners=False)
    scores = torch.einsum("bqc,bqhw->bchw", universal.class_queries_logits.softmax(-1)[..., :-1], masks.sigmoid())
    torch.testing.assert_close(logits.exp(), scores.clamp(min=1e-6))


def test_labels_are_split_by_class():
    labels = torch.tensor([[[0, 2], [255, 2]], [[255, 255], [255, 255]]])
    targets = split_labels(labels, torch.float32)
    assert [numbers.tolist() for numbers in targets["class_labels"]] == [[0, 2], []]
    assert targets["mask_labels"][0].tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 1]]]
    assert targets["mask_labels"][1].shape == (0, 2, 2)


def test_what_an_encoder_cannot_have(tmp_path):
    ViTModel(ViTConfig(**PLAIN)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="decoder='upernet' needs a backbone .*model_type='vit' is none; .* or dpt"):
        TASK.load_model(str(tmp_path / "vit"), NAMES, {}, decoder="upernet")
    with pytest.raises(ValueError, match="decoder='unet' is unknown"):
        TASK.load_model(str(tmp_path / "vit"), NAMES, {}, decoder="unet")
    SwinModel(SwinConfig(**SWIN)).save_pretrained(tmp_path / "swin")
    for decoder in ("dpt", None):
        with pytest.raises(ValueError, match="model_type='swin' is not a plain ViT"):
            TASK.load_model(str(tmp_path / "swin"), NAMES, {}, decoder=decoder)
    with pytest.raises(ValueError, match=r"blocks=\[0, 3\]: decoder='dpt' reads four"):
        ViTSegmenterConfig(ViTConfig(**PLAIN), decoder="dpt", blocks=[0, 3])


def test_a_saved_segmenter_loads_by_the_auto_class(folders, tmp_path):
    model = EomtForSemanticSegmentation.from_pretrained(folders("eomt"))
    model.save_pretrained(tmp_path)
    assert type(AutoModelForSemanticSegmentation.from_pretrained(tmp_path)) is EomtForSemanticSegmentation
