"""Save adapters of every kind with their outputs, or load those that other versions have saved.

Usage: python scripts/corners.py save FOLDER | load FOLDER_OF_FOLDERS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from vpt_peft import GatedVPTConfig, VPTConfig


CONFIGS: dict[str, Any] = {
    "deep": lambda: VPTConfig(num_virtual_tokens=3),
    "shallow": lambda: VPTConfig(num_virtual_tokens=3, deep=False),
    "pooled": lambda: VPTConfig(num_virtual_tokens=2, pooling="image_prompt"),
    "biases": lambda: VPTConfig(num_virtual_tokens=2, bias="all"),
    "labels": lambda: VPTConfig(num_virtual_tokens=2, id2label={0: "a", 1: "b", 2: "c"}),
    "gated": lambda: GatedVPTConfig(num_virtual_tokens=3, gate_init=0.0),
    "elementwise": lambda: GatedVPTConfig(num_virtual_tokens=3, gate="elementwise", gate_init=0.0),
    "swin": lambda: VPTConfig(num_virtual_tokens=3),
}


def backbone(kind: str) -> transformers.PreTrainedModel:
    """A tiny model without weights of its own."""
    if kind == "swin":
        return SwinForImageClassification(
            SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2)
        )
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5))


def fill(model: torch.nn.Module, seed: int) -> None:
    """Values that need no generator, so that they are the same in every version of torch."""
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        count = torch.arange(parameter.numel(), dtype=torch.float64)
        around = 1.0 if "temperatures" in name or ("norm" in name and name.endswith("weight")) else 0.0
        values = around + 0.2 * torch.sin(count * 0.7 + number + seed)
        parameter.data.copy_(values.view(parameter.shape))


def images() -> torch.Tensor:
    return torch.cos(torch.arange(2 * 3 * 32 * 32, dtype=torch.float32) * 0.37).view(2, 3, 32, 32)


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(pixel_values=images()).logits.contiguous()


def save(folder: Path) -> None:
    """A backbone, an adapter and its outputs of each kind."""
    for kind, make in CONFIGS.items():
        base = backbone(kind)
        fill(base, 0)
        base.save_pretrained(folder / kind / "backbone")
        # Biases of Swin's position tables and others are read from the file, as for everybody
        model = get_peft_model(type(base).from_pretrained(folder / kind / "backbone"), make())
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if name in trained:
                around = 1.0 if "temperatures" in name else 0.0
                count = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.data.copy_((around + 0.2 * torch.cos(count + number)).view(parameter.shape))
        model.save_pretrained(folder / kind / "adapter")
        save_file({"logits": output(model)}, folder / kind / "outputs.safetensors")
    versions = {each.__name__: each.__version__ for each in (torch, transformers, peft)}
    (folder / "versions.json").write_text(json.dumps(versions), encoding="utf-8")


def load(folder: Path) -> None:
    """Every adapter below `folder`: onto its backbone, and beside another adapter."""
    corners = sorted(path for path in folder.iterdir() if (path / "versions.json").is_file())
    worst = 0.0
    for corner in corners:
        for kind in CONFIGS:
            place = corner / kind
            cls = SwinForImageClassification if kind == "swin" else ViTForImageClassification
            expected = load_file(place / "outputs.safetensors")["logits"]
            model = PeftModel.from_pretrained(cls.from_pretrained(place / "backbone"), place / "adapter")
            outputs = [output(model)]
            model = get_peft_model(cls.from_pretrained(place / "backbone"), type(model.peft_config["default"])())
            result = model.load_adapter(place / "adapter", "second")
            model.set_adapter("second")
            outputs.append(output(model))
            if result.missing_keys:
                raise SystemExit(f"{place}: missing {result.missing_keys}")
            for found in outputs:
                difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
                worst = max(worst, difference)
                if difference > 1e-5:
                    raise SystemExit(f"{place}: outputs differ by {difference:.1e} from {corner.name}'s")
    here = f"transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{here}: {len(corners)} corners x {len(CONFIGS)} adapters load; largest difference {worst:.1e}")


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
