"""Conversion of official checkpoints: the folder computes what the checkpoint's formulas say, for every naming."""

import json
import os

import numpy as np
import pytest
import torch
from conversion_samples import (
    DEPTH,
    HEADS,
    HIDDEN,
    IMAGE,
    LABELS,
    LAYOUTS,
    PATCH,
    WIDE,
    check_equal,
    junk,
    moco_v3,
    npz_arrays,
    reference,
    save,
    timm_weights,
)
from torch.nn import functional as F

from vpt_peft.conversion import convert_checkpoint


@pytest.mark.parametrize("auto", [True, False], ids=["auto", "named"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_outputs_equal_the_formulas(case, auto, tmp_path):
    wrap, source, head = LAYOUTS[case]
    weights = timm_weights(head=head)
    suffix = {"npz": ".npz", "npz_head": ".npz", "timm_safetensors": ".safetensors"}.get(case, ".pth.tar")
    path = save(tmp_path / f"weights{suffix}", wrap(weights))
    # JAX's shapes tell the heads, so naming them is not needed there.
    heads = None if source == "npz" else HEADS
    folder = convert_checkpoint(path, tmp_path / "vit", "auto" if auto else source, num_heads=heads)

    assert folder == tmp_path / "vit"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(os.listdir(tmp_path)) == ["vit", path.name]
    check_equal(folder, weights)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification" if head else "ViTModel"]
    assert (config["num_hidden_layers"], config["intermediate_size"], config["image_size"]) == (DEPTH, WIDE, IMAGE)
    assert (config["patch_size"], config["layer_norm_eps"], config["qkv_bias"]) == (PATCH, 1e-6, True)
    assert len(config.get("id2label", ())) == (LABELS if head else 0)
    statistics = json.loads((folder / "preprocessor_config.json").read_text())
    assert statistics["image_mean"][0] == (0.5 if source == "npz" else 0.485)
    assert statistics["size"] == {"height": IMAGE, "width": IMAGE}


def test_no_qkv_bias(tmp_path):
    weights = timm_weights(qkv_bias=False)
    folder = convert_checkpoint(save(tmp_path / "w.pth", weights), tmp_path / "vit", num_heads=HEADS)
    assert json.loads((folder / "config.json").read_text())["qkv_bias"] is False
    check_equal(folder, weights)


@pytest.mark.parametrize(("hidden", "source", "heads"), [(64, "timm", 1), (384, "timm", 6), (384, "moco_v3", 12)])
def test_heads_without_being_told(hidden, source, heads, tmp_path):
    weights = timm_weights(hidden=hidden)
    content = moco_v3(weights) if source == "moco_v3" else weights
    folder = convert_checkpoint(save(tmp_path / "w.pth", content), tmp_path / "vit")
    assert json.loads((folder / "config.json").read_text())["num_attention_heads"] == heads
    check_equal(folder, weights, heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_number_format_is_kept(dtype, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in timm_weights().items()}
    folder = convert_checkpoint(save(tmp_path / "w.pth", weights), tmp_path / "vit", num_heads=HEADS)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    check_equal(folder, weights)


def test_bfloat16_in_npz(tmp_path):
    """JAX writes bfloat16 as two raw bytes, which numpy reads back as void."""
    weights = {name: tensor.bfloat16().float() for name, tensor in timm_weights().items()}
    arrays = {
        name: torch.from_numpy(array.copy()).bfloat16().view(torch.int16).numpy().view("V2")
        for name, array in npz_arrays(weights).items()
    }
    folder = convert_checkpoint(save(tmp_path / "w.npz", arrays), tmp_path / "vit")
    check_equal(folder, weights)


@pytest.mark.parametrize("case", ["npz", "timm"])
def test_a_head_behind_pre_logits_is_left_out(case, tmp_path):
    weights = timm_weights(head=True)
    if case == "npz":
        layer = {"pre_logits/kernel": np.ones((HIDDEN, HIDDEN)), "pre_logits/bias": np.ones(HIDDEN)}
        path = save(tmp_path / "w.npz", npz_arrays(weights) | layer)
    else:
        path = save(tmp_path / "w.pth", weights | junk("pre_logits.fc.weight"))
    folder = convert_checkpoint(path, tmp_path / "vit", num_heads=HEADS)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTModel"]
    check_equal(folder, {name: tensor for name, tensor in weights.items() if not name.startswith("head")})


@pytest.mark.parametrize(
    ("normalization", "stated", "mean"),
    [("auto", None, 0.485), ("half", None, 0.5), ("imagenet", 0.5, 0.485), ("auto", 0.5, 0.5), ("auto", "?", 0.485)],
)
def test_normalization(normalization, stated, mean, tmp_path):
    """timm states the statistics in a config.json beside the weights, since its models differ."""
    if stated is not None:
        cfg = {"pretrained_cfg": {"mean": [stated] * 3, "std": [stated] * 3}}
        (tmp_path / "config.json").write_text(json.dumps(cfg))
    path = save(tmp_path / "w.safetensors", timm_weights())
    folder = convert_checkpoint(path, tmp_path / "vit", num_heads=HEADS, normalization=normalization)
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"][0] == mean


def test_an_image_size_with_a_rest_is_kept(tmp_path):
    path = save(tmp_path / "w.pth", timm_weights())
    folder = convert_checkpoint(path, tmp_path / "vit", num_heads=HEADS, image_size=IMAGE + 1)
    assert json.loads((folder / "config.json").read_text())["image_size"] == IMAGE + 1


def test_the_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").mkdir()
    folder = convert_checkpoint(save(tmp_path / "w.pth", timm_weights()), tmp_path / "vit", num_heads=HEADS)
    assert folder.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_functional_is_the_same_reference():
    """The formulas above agree with PyTorch's own layer norm, GELU and convolution."""
    weights, images = timm_weights(), torch.randn(1, 3, IMAGE, IMAGE, dtype=torch.float64)
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w["cls_token"], x.flatten(2).transpose(1, 2)], dim=1) + w["pos_embed"]
    for i in range(DEPTH):
        p = f"blocks.{i}."
        y = F.layer_norm(x, (HIDDEN,), w[p + "norm1.weight"], w[p + "norm1.bias"], 1e-6)
        y = F.linear(y, w[p + "attn.qkv.weight"], w[p + "attn.qkv.bias"]).view(1, -1, 3, HEADS, HIDDEN // HEADS)
        y = F.scaled_dot_product_attention(*y.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(y, w[p + "attn.proj.weight"], w[p + "attn.proj.bias"])
        y = F.layer_norm(x, (HIDDEN,), w[p + "norm2.weight"], w[p + "norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, w[p + "mlp.fc1.weight"], w[p + "mlp.fc1.bias"]))
        x = x + F.linear(y, w[p + "mlp.fc2.weight"], w[p + "mlp.fc2.bias"])
    x = F.layer_norm(x, (HIDDEN,), w["norm.weight"], w["norm.bias"], 1e-6)
    assert (reference(weights, images) - x).abs().max() < 1e-10
