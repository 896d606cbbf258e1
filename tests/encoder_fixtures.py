"""Tiny encoders to test with: built with fixed seeds, in float64 throughout."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, CASTING
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class Float64(TorchFunctionMode):
    """Computation that casts to float32 is done in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def computing_in_float64(name: str) -> AbstractContextManager:
    """A context in which architecture `name` computes in float64 throughout."""
    return Float64() if name in CASTING else nullcontext()


def model_class(name: str) -> type[PreTrainedModel] | None:
    """The class of an architecture, `None` where the installed transformers does not have it."""
    path, _, leaf = ARCHITECTURES[name].model.rpartition(".")
    try:
        return getattr(importlib.import_module(path) if path else transformers, leaf, None)
    except ImportError:
        return None


def require_installed(name: str) -> None:
    """Skip a test of an architecture that the installed transformers does not have."""
    if model_class(name) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {ARCHITECTURES[name].model}")


def to_double(model: nn.Module) -> nn.Module:
    """Float64 in place; complex buffers stay complex, which `Module.to` would cut down to their real part."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                    tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return model


def build(name: str, noise: float = 0.1, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The tiny model in eval mode, float64 by default.

    Noise is added to all parameters: several models start with weights of zero, at which prompts have no effect.
    """
    cls = model_class(name)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no {ARCHITECTURES[name].model}")
    config_class = getattr(cls, "config_class", None) or cls.config
    torch.manual_seed(0)
    model = cls(config_class(**ARCHITECTURES[name].config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return (to_double(model) if dtype == torch.float64 else model).eval()


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Its inputs, floating-point tensors in `dtype`."""
    made = ARCHITECTURES[name].inputs()
    return {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in made.items()
    }


class TimmAttention(nn.Module):
    """Attention as timm has it: a fused `qkv`, its biases beside it where they are separate (EVA, BEiT).

    Args:
        width: Hidden size.
        separate_bias: The biases are parameters of the attention; keys have none.
        fused: By torch's fused function, or by products and a softmax module.
    """

    def __init__(self, width: int, separate_bias: bool, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=not separate_bias), nn.Linear(width, width)
        self.softmax, self.fused = nn.Softmax(dim=-1), fused
        self.q_bias = nn.Parameter(torch.randn(width)) if separate_bias else None
        self.v_bias = nn.Parameter(torch.randn(width)) if separate_bias else None
        self.register_buffer("k_bias", torch.zeros(width) if separate_bias else None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            qkv = nn.functional.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            x = self.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    def __init__(self, width: int, **attention: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), TimmAttention(width, **attention)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmPatchEmbed(nn.Module):
    """Patches of images of one size only, as timm's."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[-2:]) != self.img_size:
            raise AssertionError(f"Input size {tuple(x.shape[-2:])} doesn't match model {self.img_size}.")
        return self.proj(x).flatten(2).transpose(1, 2)


class TimmVisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        num_classes: int,
        depth: int,
        width: int,
        **attention: bool,
    ) -> None:
        super().__init__()
        self.patch_embed = TimmPatchEmbed(img_size, patch_size, in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TimmBlock(width, **attention) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class TimmWrapperConfig(PreTrainedConfig):
    """Stands in for the configuration of transformers' wrapper of timm, which needs torchvision."""

    model_type = "timm_wrapper_stand_in"

    def __init__(self, architecture: str = "", model_args: Any = None, pretrained_cfg: Any = None, **kwargs) -> None:
        self.architecture, self.model_args, self.pretrained_cfg = architecture, model_args, pretrained_cfg
        super().__init__(**kwargs)


class TimmWrapperForImageClassification(PreTrainedModel):
    """Stands in for transformers' wrapper of timm: the same names and arguments, and no size in its configuration."""

    config_class, base_model_prefix, main_input_name = TimmWrapperConfig, "timm_model", "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: TimmWrapperConfig) -> None:
        super().__init__(config)
        sizes = {"patch_size": 16, "in_chans": 3, "depth": 3, "width": 32, "separate_bias": False, "fused": True}
        self.timm_model = TimmVisionTransformer(num_classes=config.num_labels, **{**sizes, **config.model_args})
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.timm_model(pixel_values))


def timm_wrapper(pretrained_size: int | None = None, **model_args: Any) -> TimmWrapperForImageClassification:
    """A tiny stand-in of a timm model with 5 classes; `pretrained_size` is what its configuration tells."""
    pretrained = None if pretrained_size is None else {"input_size": [3, pretrained_size, pretrained_size]}
    torch.manual_seed(0)
    config = TimmWrapperConfig(model_args={"img_size": 32, **model_args}, pretrained_cfg=pretrained, num_labels=5)
    return TimmWrapperForImageClassification(config).eval()
