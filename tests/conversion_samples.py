"""Small official-looking checkpoints, and what the ViT in them computes, written from the formulas."""

import argparse

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import ViTForImageClassification, ViTModel


HIDDEN, DEPTH, HEADS, WIDE, PATCH, GRID, LABELS = 32, 3, 4, 48, 4, 3, 7
IMAGE = PATCH * GRID


def timm_weights(head=False, qkv_bias=True, hidden=HIDDEN, seed=0):
    """Random float32 weights of a small ViT under timm's names."""
    shapes = {
        "cls_token": (1, 1, hidden),
        "pos_embed": (1, GRID**2 + 1, hidden),
        "patch_embed.proj.weight": (hidden, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (hidden,),
        "norm.weight": (hidden,),
        "norm.bias": (hidden,),
    }
    for i in range(DEPTH):
        for name, shape in {
            "norm1": (hidden,),
            "attn.qkv": (3 * hidden, hidden),
            "attn.proj": (hidden, hidden),
            "norm2": (hidden,),
            "mlp.fc1": (WIDE, hidden),
            "mlp.fc2": (hidden, WIDE),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            if qkv_bias or name != "attn.qkv":
                shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    if head:
        shapes |= {"head.weight": (LABELS, hidden), "head.bias": (LABELS,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def reference(weights, images, heads=HEADS):
    """A pre-norm ViT written from its formulas, in float64: the normalised tokens."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    batch, width = len(images), w["cls_token"].shape[-1]
    # Patches in row order, each flattened as (channel, row, column), are what a strided convolution reads.
    patches = images.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
    x = patches.reshape(batch, -1, 3 * PATCH**2) @ w["patch_embed.proj.weight"].flatten(1).T
    x = torch.cat([w["cls_token"].expand(batch, -1, -1), x + w["patch_embed.proj.bias"]], dim=1) + w["pos_embed"]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.view(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).reshape(x.shape), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{block}.mlp.fc2")
    return norm(x, "norm")


def npz_arrays(weights):
    """The same weights under the names and in the layouts of google-research/vision_transformer."""
    w = {name: tensor.numpy() for name, tensor in weights.items()}
    split = (HEADS, HIDDEN // HEADS)
    arrays = {
        "cls": w["cls_token"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
    }
    for i in range(DEPTH):
        old, new = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
            target = f"{new}/MultiHeadDotProductAttention_1/{name}"
            arrays[f"{target}/kernel"] = w[f"{old}.attn.qkv.weight"][rows].T.reshape(HIDDEN, *split)
            arrays[f"{target}/bias"] = w[f"{old}.attn.qkv.bias"][rows].reshape(split)
        out = f"{new}/MultiHeadDotProductAttention_1/out"
        arrays[f"{out}/kernel"] = w[f"{old}.attn.proj.weight"].T.reshape(*split, HIDDEN)
        arrays[f"{out}/bias"] = w[f"{old}.attn.proj.bias"]
        for index, name in ((0, "norm1"), (2, "norm2")):
            arrays[f"{new}/LayerNorm_{index}/scale"] = w[f"{old}.{name}.weight"]
            arrays[f"{new}/LayerNorm_{index}/bias"] = w[f"{old}.{name}.bias"]
        for index, name in ((0, "fc1"), (1, "fc2")):
            arrays[f"{new}/MlpBlock_3/Dense_{index}/kernel"] = w[f"{old}.mlp.{name}.weight"].T
            arrays[f"{new}/MlpBlock_3/Dense_{index}/bias"] = w[f"{old}.mlp.{name}.bias"]
    if "head.weight" in w:
        arrays |= {"head/kernel": w["head.weight"].T, "head/bias": w["head.bias"]}
    return arrays


def prefixed(weights, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def junk(*names):
    return {name: torch.ones(2, 2) for name in names}


def moco_v3(w):
    head = junk("module.base_encoder.head.0.weight", "module.base_encoder.head.1.running_mean")
    momentum = prefixed(timm_weights(seed=9), "module.momentum_encoder.")
    state = prefixed(w, "module.base_encoder.") | head | momentum | junk("module.predictor.0.weight")
    return {"epoch": 300, "arch": "vit_tiny", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def moco_v3_linear(w):
    return {"epoch": 90, "arch": "vit_base", "state_dict": prefixed(w, "module."), "best_acc1": torch.tensor(76.7)}


def mae_pretrain(w):
    decoder = junk("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_pred.bias")
    return {"model": w | decoder, "args": argparse.Namespace(lr=1e-3, model="mae_vit"), "epoch": 1}


def mae_encoder(w):
    return {"model": w}


def mae_finetuned(w):
    renamed = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in w.items()}
    return {"model": renamed | junk("head.weight", "head.bias")}


def dino_full(w):
    heads = junk("head.mlp.0.weight", "head.last_layer.weight_g")
    student = prefixed(timm_weights(seed=9), "module.backbone.") | prefixed(heads, "module.")
    return {"student": student, "teacher": prefixed(w, "backbone.") | heads, "args": argparse.Namespace(arch="vit")}


def dino_student(w):
    return {"student": prefixed(w, "module.backbone.") | junk("module.head.mlp.0.weight")}


def timm_wrapped(w):
    return {"state_dict": w, "arch": "vit_tiny_patch4_12", "epoch": 1}


LAYOUTS = {
    "moco_v3": (moco_v3, "moco_v3", False),
    "moco_v3_linear": (moco_v3_linear, "moco_v3", True),
    "mae_pretrain": (mae_pretrain, "mae", False),
    "mae_encoder": (mae_encoder, "mae", False),
    "mae_finetuned": (mae_finetuned, "mae", False),
    "dino_bare": (dict, "dino", False),
    "dino_full": (dino_full, "dino", False),
    "dino_student": (dino_student, "dino", False),
    "timm": (dict, "timm", True),
    "timm_no_head": (dict, "timm", False),
    "timm_wrapped": (timm_wrapped, "timm", True),
    "deit": (mae_encoder, "timm", True),
    "timm_safetensors": (dict, "timm", True),
    "npz": (npz_arrays, "npz", False),
    "npz_head": (npz_arrays, "npz", True),
}


def save(path, content):
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def check_equal(folder, weights, heads=HEADS):
    """The folder's model computes in float64 what the formulas say, and so does its classifier if it has one."""
    images = torch.randn(2, 3, IMAGE, IMAGE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = reference(weights, images, heads)
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False).double().eval()
    with torch.no_grad():
        assert (model(images).last_hidden_state - expected).abs().max() < 1e-9
    if "head.weight" in weights:
        model = ViTForImageClassification.from_pretrained(folder).double().eval()
        logits = expected[:, 0] @ weights["head.weight"].double().T + weights["head.bias"].double()
        with torch.no_grad():
            assert (model(images).logits - logits).abs().max() < 1e-9
