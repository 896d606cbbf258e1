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
from transformers import PreTrainedModel


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
