"""Tiny random models that several test files share."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification


def tiny_vit(seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> ViTForImageClassification:
    """Three blocks of width 32 on 32 px images in patches of 8 px: a class token and 16 patches; seven classes."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "patch_size": 8,
        "image_size": 32,
        "num_labels": 7,
    }
    return ViTForImageClassification(ViTConfig(**{**sizes, **fields})).to(dtype).eval()


def images(count: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomize(model: torch.nn.Module, seed: int = 2) -> torch.nn.Module:
    """Give all adapter values and heads random numbers, so that no two adapters are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "prompt_tuner" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data.copy_(noise.abs() + 0.5 if "temperatures" in name else noise)
    return model
