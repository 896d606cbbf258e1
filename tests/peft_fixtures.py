"""Tiny models with random weights, configurations and measures shared by the tests of PEFT's life."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.integrations.peft import PeftAdapterMixin

from vpt_peft import GatedVPTConfig, VPTConfig


ROOT = Path(__file__).parents[1]
# Earlier transformers leave out heads (modules_to_save) of adapters of any PEFT method, and report them as missing
LOADS_HEADS = "AuxiliaryTrainingWrapper" in inspect.getsource(PeftAdapterMixin.load_adapter)
needs_heads_to_load = pytest.mark.skipif(not LOADS_HEADS, reason="load_adapter of transformers before 5.18")
BLOCKS, WIDTH, TOKENS, LABELS = 3, 32, 17, 5
VIT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": LABELS,
}

# Every way prompts can run through a plain ViT; each entry makes a fresh configuration.
CONFIGS: dict[str, Callable[..., VPTConfig]] = {
    "deep": lambda **given: VPTConfig(**{"num_virtual_tokens": 4, **given}),
    "deep_tokens": lambda **given: VPTConfig(**{"num_virtual_tokens": 4, "implementation": "token", **given}),
    "shallow": lambda **given: VPTConfig(**{"num_virtual_tokens": 3, "deep": False, **given}),
    "partly_deep": lambda **given: VPTConfig(**{"num_virtual_tokens": 3, "layers_to_transform": [0, 2], **given}),
    "shared": lambda **given: VPTConfig(**{"num_virtual_tokens": 3, "share_prompts": True, **given}),
    "projected": lambda **given: VPTConfig(**{"num_virtual_tokens": 3, "projection_dim": 8, **given}),
    "project_patches": lambda **given: VPTConfig(**{"num_virtual_tokens": 3, "project_patches": True, **given}),
    "pooled": lambda **given: VPTConfig(**{"num_virtual_tokens": 3, "pooling": "image_prompt", **given}),
    "class_tokens": lambda **given: VPTConfig(**{"num_virtual_tokens": 3, "token_type": "class", **given}),
    "added": lambda **given: VPTConfig(**{"prompt_location": "add", **given}),
    "strip": lambda **given: VPTConfig(**{"num_virtual_tokens": 2, "prompt_location": "prepend_pixel", **given}),
    "channel": lambda **given: VPTConfig(**{"num_virtual_tokens": 2, "prompt_location": "channel", **given}),
    "gated": lambda **given: GatedVPTConfig(**{"num_virtual_tokens": 3, "gate_init": 0.0, **given}),
    "gated_elementwise": lambda **given: GatedVPTConfig(
        **{"num_virtual_tokens": 3, "gate": "elementwise", "gate_init": 0.0, **given}
    ),
}
PLAIN = [name for name in CONFIGS if "gated" not in name]
MAIN = ["deep", "deep_tokens", "shallow", "gated"]


def randomize(model: nn.Module, seed: int = 0, trainable_only: bool = False) -> nn.Module:
    """Draw all parameters anew, so that none is zero, one, or equal to another by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not trainable_only:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
                around = 1.0 if "norm" in name and name.endswith("weight") or "temperatures" in name else 0.0
                parameter.copy_(around + 0.2 * noise)
    return model


def vit(dtype: torch.dtype = torch.float64, seed: int = 0, **given: Any) -> ViTForImageClassification:
    """A classifier of 5 labels: 3 blocks of width 32, 17 tokens of 32 px images, in eval mode."""
    model = ViTForImageClassification(ViTConfig(**{**VIT, **given}))
    return randomize(model, seed).to(dtype).eval()  # type: ignore[return-value]


def bare_vit(dtype: torch.dtype = torch.float64, seed: int = 0, **given: Any) -> ViTModel:
    """The backbone of `vit`, without pooler and head."""
    model = ViTModel(ViTConfig(**{**VIT, **given}), add_pooling_layer=False)
    return randomize(model, seed).to(dtype).eval()  # type: ignore[return-value]


def dinov2(dtype: torch.dtype = torch.float64, seed: int = 0, **given: Any) -> Dinov2ForImageClassification:
    """A DINOv2 classifier of the same size as `vit`."""
    fields = {**VIT, "mlp_ratio": 2, **given}
    fields.pop("intermediate_size")
    model = Dinov2ForImageClassification(Dinov2Config(**fields))
    return randomize(model, seed).to(dtype).eval()  # type: ignore[return-value]


def images(batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0, size: int = 32) -> torch.Tensor:
    """`(batch, 3, size, size)`."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(**given: Any) -> LoraConfig:
    """LoRA on queries and values that is not the identity at the start."""
    return LoraConfig(**{"r": 2, "target_modules": r".*\.(q|v|query|value|q_proj|v_proj)", "init_lora_weights": False,
                         **given})  # fmt: skip


def logits(model: nn.Module, pixels: torch.Tensor, **given: Any) -> torch.Tensor:
    """Logits of a classifier, last hidden state of a backbone, without gradients."""
    with torch.no_grad():
        output = model(pixel_values=pixels, **given)
    return output.logits if "logits" in output else output.last_hidden_state


def gradients(model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a fixed loss, by name, of everything trainable."""
    model.zero_grad()
    output = model(pixel_values=pixels)
    output = output.logits if "logits" in output else output.last_hidden_state
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    (output * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def hook_count(model: nn.Module) -> int:
    """Number of forward and backward hooks on all modules."""
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and "state_dict" not in name and isinstance(hooks, dict)
    )


def own_attributes(model: nn.Module) -> dict[str, set[str]]:
    """Names of the instance attributes of every module: what an unload has to leave as it was."""
    return {
        path: {*vars(module)} | {*module._modules} | {*module._parameters} for path, module in model.named_modules()
    }


def run_python(code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that knows the package but has not imported it."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=240
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done
