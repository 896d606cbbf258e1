"""Quantised linear layers: recognised by their tensors, tried out before prompts run through them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .spec import EncoderError


# bitsandbytes' flag on 4-bit layers: the first pass without gradients repacks the weights for a kernel without backward
PACKING_FLAG = "support_avx512bf16_for_cpu"


def has_packed_weights(module: nn.Module) -> bool:
    """Whether a layer stores its weights as integers or 8-bit floats, whatever the attribute is called."""
    if next(module.children(), None) is not None:
        return False
    tensors: Iterable[torch.Tensor] = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return any(_is_packed(tensor) for tensor in tensors)


def _is_packed(tensor: torch.Tensor) -> bool:
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return any(_is_packed(each) for each in inner)
    # 64-bit integers are indices, never weights
    if tensor.dim() < 2 or tensor.dtype in (torch.bool, torch.int64):
        return False
    return not (tensor.is_floating_point() or tensor.is_complex()) or tensor.element_size() == 1


def forbid_packing(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from repacking 4-bit weights for CPUs, which would block gradients; returns the layers."""
    layers = [module for module in model.modules() if getattr(module, PACKING_FLAG, False)]
    for module in layers:
        setattr(module, PACKING_FLAG, False)
    return layers


def allow_packing(layers: Iterable[nn.Module]) -> None:
    """Undo [`forbid_packing`]."""
    for module in layers:
        setattr(module, PACKING_FLAG, True)


def try_map(module: nn.Module, path: str, rows: int, dtype: torch.dtype, needs_gradient: bool) -> None:
    """Run a quantised layer on random tokens of one image.

    Args:
        module: The layer, with `in_features`.
        path: Its dotted path, for messages.
        rows: Number of tokens.
        dtype: Dtype of the tokens.
        needs_gradient: Prompts in front of it are going to train.

    Raises:
        EncoderError: It fails on this number of tokens, or lets no gradient pass.
    """
    device = next(tensor.device for tensor in chain(module.parameters(), module.buffers()))
    tokens = torch.ones(1, rows, int(module.in_features), dtype=dtype, device=device, requires_grad=needs_gradient)  # type: ignore[arg-type]
    what = f"{path} ({type(module).__name__}, quantised)"
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if needs_gradient and getattr(state, "packing_format_for_cpu", False):
        raise EncoderError(
            f"{what} lets no gradient pass any more: bitsandbytes packed its weights for inference on CPUs in the first "
            "pass without gradients. Load the model again and attach prompts before it runs."
        )
    try:
        with torch.set_grad_enabled(needs_gradient):
            output = module(tokens)
            gradient = None
            if output.requires_grad:
                (gradient,) = torch.autograd.grad(output.float().sum(), tokens, allow_unused=True)
    except Exception as error:
        raise EncoderError(
            f"{what} does not run on {rows} tokens: {error}. Exclude it from quantisation (modules_to_not_convert), or "
            "use another quantisation method."
        ) from error
    if needs_gradient and (gradient is None or not gradient.any()):
        raise EncoderError(
            f"{what} lets no gradient pass, so the prompts in front of it cannot train; use quantisation of weights only, or "
            "exclude the module from quantisation (modules_to_not_convert)."
        )
