"""What a run wrote loads by PEFT's and transformers' own Auto classes and by `pipeline`, without further arguments."""

import json

import pytest
import torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModel
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    pipeline,
)

from vpt_peft.embedded import embedded_path
from vpt_peft.hub import push_adapter
from vpt_peft.training.inference import backbone_name, load_adapter_model


pytest_plugins = ["training_fixtures"]
DIGITS = {number: str(number) for number in range(10)}


@pytest.mark.parametrize("load", [AutoPeftModel.from_pretrained, AutoModelForImageClassification.from_pretrained])
@pytest.mark.parametrize("method", ["vpt", "gated_vpt"])
def test_auto_classes(finished, method, load):
    _, out = finished(method=method)
    assert not (out / "config.json").exists()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = load_adapter_model(out)[0](pixel_values=images).logits
        model = load(str(out)).eval()
        # The head of the backbone on disk has five labels
        assert torch.equal(model(pixel_values=images).logits, expected) and expected.shape == (2, 10)
    assert model.config.id2label == DIGITS


def test_backbones_without_a_class_for_the_task(run, tmp_path):
    """transformers has no classifier of ViTMAE; PEFT loads it as the ViT it is, and the card names no other way."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"decoder_" + name: value // 2 for name, value in sizes.items()}
    ViTMAEForPreTraining(ViTMAEConfig(image_size=16, patch_size=4, **sizes)).save_pretrained(tmp_path / "mae")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "mae")
    _, out = run(method="vpt", model_name_or_path=str(tmp_path / "mae"), max_steps=1)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = load_adapter_model(out)[0](pixel_values=images).logits
        assert torch.equal(AutoPeftModel.from_pretrained(str(out)).eval()(pixel_values=images).logits, expected)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForImageClassification.from_pretrained(str(out))
    card = (out / "README.md").read_text()
    assert "AutoPeftModel" in card and "AutoModelForImageClassification" not in card


def test_pipeline(copied):
    _, out = copied(method="vpt")
    processor = json.loads((out / "preprocessor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": [0.1, 0.2, 0.3]}))
    image = Image.new("RGB", (20, 20), (250, 120, 0))
    for given, mean in (({}, (0.5, 0.5, 0.5)), ({"image_processor": str(out)}, (0.1, 0.2, 0.3))):
        classify = pipeline("image-classification", str(out), **given)
        assert tuple(classify.image_processor.image_mean) == mean
        found = {row["label"]: row["score"] for row in classify(image, top_k=10)}
        model, _ = load_adapter_model(out)
        with torch.no_grad():
            pixels = classify.image_processor(images=image, return_tensors="pt")
            expected = model(**pixels).logits[0].softmax(-1)
        assert found == {name: pytest.approx(expected[number].item(), abs=1e-6) for number, name in DIGITS.items()}


@pytest.mark.parametrize("backbone", ["embedded", "embedded-mae"])
def test_embedded_backbones(hub, copied, backbone):
    _, out = copied(method="vpt", model_name_or_path=backbone, max_steps=1)
    images = torch.randn(2, 3, *[load_adapter_model(out)[0].config.image_size] * 2)
    with torch.no_grad():
        expected = load_adapter_model(out)[0](pixel_values=images).logits
        for auto_class in (AutoPeftModel, AutoModelForImageClassification):
            assert torch.equal(auto_class.from_pretrained(str(out)).eval()(pixel_values=images).logits, expected)
        # A path on this machine is nobody's business
        push_adapter(out, "user/digits")
        pushed = json.loads(open(hf_hub_download("user/digits", "adapter_config.json")).read())
        assert pushed["base_model_name_or_path"] == backbone
        assert torch.equal(load_adapter_model("user/digits")[0](pixel_values=images).logits, expected)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(embedded_path(backbone))
        config["base_model_name_or_path"] = f"/elsewhere/vpt_peft/embedded/{embedded_path(backbone).name}"
        (out / "adapter_config.json").write_text(json.dumps(config))
        assert torch.equal(load_adapter_model(out)[0](pixel_values=images).logits, expected)


@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "/data/embedded/vit", "vpt_peft/embedded/none"])
def test_other_backbones_keep_their_name(name):
    assert backbone_name(name) == name


@pytest.mark.parametrize(("first", "second"), [("linear", "vpt"), ("full", "vpt"), ("vpt", "mlp"), ("linear", "full")])
def test_a_run_of_another_method_leaves_nothing_of_the_first(run, first, second):
    _, out = run(method=first, max_steps=1)
    _, out = run(method=second, max_steps=1, overwrite_output_dir=True)
    names = {path.name for path in out.iterdir()}
    assert ("adapter_config.json" in names) == (second == "vpt") and ("config.json" in names) == (second != "vpt")
    assert ("vpt_peft_baseline.safetensors" in names) == (second == "mlp")
    model, _ = load_adapter_model(out)
    assert hasattr(model, "peft_config") == (second == "vpt")
