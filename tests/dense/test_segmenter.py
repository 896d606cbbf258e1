"""A plain ViT with our heads: shapes, positions, losses, what trains, and saving."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSemanticSegmentation,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from vpt_peft import VPTConfig
from vpt_peft.dense.decoders import DPTDecoder, LinearDecoder, SetrPupDecoder
from vpt_peft.dense.segmenter import ViTForSemanticSegmentation, ViTSegmenterConfig, pixel_loss


NAMES = {0: "a", 1: "b", 2: "c"}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SMALL)).save_pretrained(path)
    return str(path)


def segmenter(folder, **fields):
    torch.manual_seed(1)
    model = ViTForSemanticSegmentation.from_backbone(folder, NAMES, **fields).eval()
    # The last layer starts at zero
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    return model


@pytest.mark.parametrize("fields", [{}, {"blocks": [0, 1, 2, 3]}, {"decoder": "setr_pup", "channels": 8}])
@pytest.mark.parametrize("size", [(16, 16), (24, 40), (10, 13)])
def test_logits_cover_the_image(folder, fields, size):
    model = segmenter(folder, **fields)
    images, labels = torch.randn(2, 3, *size), torch.randint(0, 3, (2, *size))
    output = model(pixel_values=images, labels=labels)
    patches = (size[0] // 4, size[1] // 4)
    expected = patches if size[0] % 4 == 0 and "decoder" not in fields else size
    assert output.logits.shape == (2, 3, *expected)
    enlarged = F.interpolate(output.logits, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.loss, F.cross_entropy(enlarged, labels))


def test_what_is_filled_up_changes_no_scale(folder):
    """An image whose sides are no multiple of the patch is the larger one's upper left corner."""
    model = segmenter(folder)
    image = torch.randn(1, 3, 10, 13)
    whole = model(pixel_values=F.pad(image, (0, 3, 0, 2))).logits
    enlarged = F.interpolate(whole, size=(12, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(pixel_values=image).logits, enlarged[..., :10, :13])


def test_blocks_are_those_of_the_encoder(folder):
    model = segmenter(folder, blocks=[1, 3])
    images = torch.randn(2, 3, 16, 16)
    seen = []
    model.decode_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(pixel_values=images)
    states = model.backbone(pixel_values=images, output_hidden_states=True)
    expected = [states.hidden_states[2], states.last_hidden_state]
    expected = [each[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for each in expected]
    torch.testing.assert_close(seen[0], torch.cat(expected, 1))


def test_the_loss_leaves_pixels_out():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0] = 255
    torch.testing.assert_close(pixel_loss(logits, labels, 255), F.cross_entropy(logits[1:], labels[1:]))
    assert pixel_loss(logits, torch.full_like(labels, 255), 255) == 0


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (1, 1)])
def test_dpt_reads_the_patches_of_each_block(size):
    torch.manual_seed(0)
    decoder, features = DPTDecoder(16, 8, 3, 0.0).eval(), torch.randn(2, 4 * 16, *size)
    seen = []
    for layer in decoder.neck.reassemble_stage.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = decoder(features)
    assert logits.shape[:2] == (2, 3) and all(
        got >= 8 * given for got, given in zip(logits.shape[2:], size, strict=True)
    )
    torch.testing.assert_close(torch.cat(seen, 1), features)
    assert [layer.projection.out_channels for layer in decoder.neck.reassemble_stage.layers] == [2, 4, 8, 16]


def test_heads():
    linear = LinearDecoder(8, 3, 0.2)
    kinds = [type(module).__name__ for module in linear]
    assert kinds == ["BatchNorm2d", "Dropout2d", "PixelClassifier"] and linear.dropout.p == 0.2
    # 16 pixels are four steps, and each doubles the map
    pup = SetrPupDecoder(8, 6, 3, 0.1, 4).eval()
    assert pup(torch.randn(1, 8, 2, 3)).shape == (1, 3, 32, 48) and len(pup.convolutions) == 4


def test_a_fresh_head_takes_all_classes_for_alike(folder):
    for decoder in ("linear", "setr_pup"):
        model = ViTForSemanticSegmentation.from_backbone(folder, NAMES, decoder=decoder, channels=8)
        logits = model(pixel_values=torch.randn(2, 3, 16, 16)).logits
        assert torch.equal(logits, torch.zeros_like(logits))


@pytest.mark.parametrize("method", ["vpt", "gated"])
def test_an_adapter_trains_and_comes_back(folder, method, tmp_path):
    from vpt_peft import GatedVPTConfig

    torch.manual_seed(1)
    base = ViTForSemanticSegmentation.from_backbone(folder, NAMES, blocks=[1, 3])
    config = VPTConfig(num_virtual_tokens=2) if method == "vpt" else GatedVPTConfig(num_virtual_tokens=2)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    images, labels = torch.randn(4, 3, 24, 16), torch.randint(0, 3, (4, 24, 16))
    model.train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for _ in range(3):
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    model.eval()
    expected = model(pixel_values=images).logits
    model.save_pretrained(tmp_path)
    # Also what the head's batch norm counted
    again = PeftModel.from_pretrained(
        ViTForSemanticSegmentation.from_backbone(folder, NAMES, blocks=[1, 3]), tmp_path
    ).eval()
    torch.testing.assert_close(again(pixel_values=images).logits, expected)
    assert again.peft_config["default"].id2label == NAMES
    with model.disable_adapter():
        assert not torch.allclose(model(pixel_values=images).logits, expected)


def test_it_is_a_model_of_transformers(folder, tmp_path):
    model = segmenter(folder, decoder="setr_pup", channels=8, dropout=0.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 16, 24)
    assert type(again) is ViTForSemanticSegmentation and again.config.id2label == NAMES
    torch.testing.assert_close(again(pixel_values=images).logits, model(pixel_values=images).logits)


@pytest.mark.parametrize("kind", ["deit", "mae", "clip"])
def test_other_plain_encoders(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "deit":
        source = DeiTModel(DeiTConfig(**SMALL))
    elif kind == "mae":
        decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        source = ViTMAEForPreTraining(ViTMAEConfig(**SMALL, **decoder))
    else:
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        source = CLIPModel(CLIPConfig(vision_config=SMALL, text_config=text))
    source.save_pretrained(tmp_path)
    model = ViTForSemanticSegmentation.from_backbone(str(tmp_path), NAMES, blocks=[0, 3])
    model = get_peft_model(model, VPTConfig(num_virtual_tokens=2))
    output = model(pixel_values=torch.randn(2, 3, 24, 20), labels=torch.zeros(2, 24, 20, dtype=torch.long))
    assert output.logits.shape == (2, 3, 6, 5) and output.loss > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": "unet"}, "decoder='unet' is unknown; choose one of linear, setr_pup"),
        ({"blocks": [4]}, r"blocks=\[4\] must be some of the 4 blocks 0..3"),
        ({"blocks": [2, 1]}, "in order"),
        ({"blocks": []}, r"blocks=\[\]"),
        ({"channels": 0}, "channels=0 must be 1 or more"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_refused_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTSegmenterConfig(backbone_config=ViTConfig(**SMALL), **fields)
