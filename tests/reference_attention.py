"""Attention with prompts, written apart from the package: an oracle for encoders whose blocks take no prompt tokens.

Attention over prompts and tokens is the mean of the two attentions, weighted by their shares of the softmax's sum:
with a the log-sum-exp of the tokens' logits and b that of the prompts', out = out_t + sigmoid(b - a) (out_p - out_t).
Prompts have no bias and no mask, and see no position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from architectures import Architecture
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


NAME = "reference_attention"
PRODUCTS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__)
SOFTMAXES = (torch.softmax, nn.functional.softmax, torch.Tensor.softmax)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def with_prompts(
    output: torch.Tensor,
    total: torch.Tensor,
    scaled: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask_open: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention over tokens and prompts.

    Args:
        output: Attention over the tokens alone, `(..., tokens, head_dim)`.
        total: Log-sum-exp of its logits, `(..., tokens)`.
        scaled: Queries times the scale, `(..., tokens, head_dim)`.
        keys, values: Of the prompts, `(..., prompts, head_dim)`.
        mask_open: What the mask adds to logits that are allowed.
        softcap: Bound on the logits.
    """
    keys, values = (tensor.expand(*scaled.shape[:-2], -1, -1) for tensor in (keys, values))
    logits = capped(torch.einsum("...qd,...pd->...qp", scaled, keys), softcap) + mask_open
    prompt_output = torch.einsum("...qp,...pd->...qd", logits.softmax(-1), values)
    share = torch.sigmoid(torch.logsumexp(logits, -1) - total).unsqueeze(-1)
    return output + share * (prompt_output - output)


class PromptedAttention:
    """The prompts of one attention module, with names and arithmetic from the oracle.

    Args:
        architecture: The oracle.
        block: The block that holds the attention.
        prompts: `(prompts, width)`.
    """

    def __init__(self, architecture: Architecture, block: nn.Module, prompts: torch.Tensor) -> None:
        self.architecture, self.prompts = architecture, prompts
        self.norm: nn.Module = block.get_submodule(architecture.norm) if architecture.norm else nn.Identity()
        self.module = block.get_submodule(architecture.attention)

    def keys_and_values(self, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(heads, prompts, head_dim)`."""
        oracle = self.architecture
        normed = self.norm(self.prompts)
        if oracle.key == oracle.value:
            _, keys, values = self.module.get_submodule(oracle.key)(normed).chunk(3, dim=-1)
        else:
            keys = self.module.get_submodule(oracle.key)(normed)
            values = self.module.get_submodule(oracle.value)(normed)
        norm = self.module.get_submodule(oracle.key_norm) if oracle.key_norm else nn.Identity()
        if oracle.key_norm and norm.weight.numel() == keys.shape[-1]:
            keys, norm = norm(keys), nn.Identity()
        keys, values = (tensor.reshape(len(normed), -1, head_dim).transpose(0, 1) for tensor in (keys, values))
        keys = norm(keys)
        if oracle.scaling == "cosine":
            keys = keys / keys.norm(dim=-1, keepdim=True)
        return keys, values

    def scale(self, head_dim: int) -> torch.Tensor | float:
        """What multiplies the product of queries and keys, as the module makes it."""
        if self.architecture.scaling == "cosine":
            return self.module.logit_scale.clamp(max=math.log(100.0)).exp()
        return head_dim**-0.5 if self.architecture.scaling == "after" else 1.0


def interface_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for `AttentionInterface`; prompts come in where the module has a `reference` attribute."""
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    logits = capped(torch.einsum("bhqd,bhkd->bhqk", scaled, key), softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    output = torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), value)
    reference: PromptedAttention | None = module.__dict__.get("reference")
    if reference is not None:
        keys, values = (t.repeat_interleave(groups, dim=0) for t in reference.keys_and_values(query.shape[-1]))
        mask_open = reference.architecture.mask_open if attention_mask is not None else 0.0
        output = with_prompts(output, torch.logsumexp(logits, -1), scaled, keys, values, mask_open, softcap)
    return output.transpose(1, 2), None


class ReferenceMode(TorchFunctionMode):
    """Brings prompts into attention that is written out in torch calls, behind its last product."""

    def __init__(self) -> None:
        super().__init__()
        self.reference: PromptedAttention | None = None
        self.product: tuple[torch.Tensor, torch.Tensor] | None = None
        self.logits: torch.Tensor | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        self.reference, self.product, self.logits = module.__dict__["reference"], None, None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self.product is None, "the attention was not reached"
        self.reference = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.reference is None:
            return func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            return self.whole(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAXES:
            self.logits = args[0]
        elif func in PRODUCTS and self.logits is None:
            self.product = args[0], result
        elif func in PRODUCTS and self.product is not None and self.logits is not None:
            query, scores = self.product
            assert scores.shape[-2:] == self.logits.shape[-2:] == args[0].shape[-2:]
            total = torch.logsumexp(self.logits, -1).reshape(query.shape[:-1])
            result = self.prompted(result, total, query * self.reference.scale(query.shape[-1]))
            self.product = None
        return result

    def whole(self, query, key, value, attn_mask=None, **kwargs):
        scaled = query * query.shape[-1] ** -0.5
        logits = torch.einsum("bhqd,bhkd->bhqk", scaled, key)
        logits = logits if attn_mask is None else logits + attn_mask
        output = torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), value)
        return self.prompted(output, torch.logsumexp(logits, -1), scaled)

    def prompted(self, output: torch.Tensor, total: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """`output` is `(rows, heads, tokens, head_dim)`, `(rows, heads, windows, ...)` or `(rows · heads, ...)`."""
        assert self.reference is not None
        reference, self.reference = self.reference, None
        try:
            keys, values = reference.keys_and_values(scaled.shape[-1])
            if scaled.dim() == 3:
                keys, values = (t.repeat(len(scaled) // len(t), 1, 1) for t in (keys, values))
            elif scaled.dim() == 5:
                keys, values = keys.unsqueeze(1), values.unsqueeze(1)
            return with_prompts(output, total, scaled, keys, values)
        finally:
            self.reference = reference


@contextmanager
def prompted_by_reference(
    model: nn.Module, architecture: Architecture, prompts: dict[int, torch.Tensor]
) -> Iterator[None]:
    """Let `model` run with prompts by the oracle's names and this file's arithmetic.

    A model with the attention interface keeps this file's attention function, without prompts.

    Args:
        model: The encoder, untouched by the package.
        architecture: Its oracle.
        prompts: By block index, `(prompts, width)`; blocks that are missing get none.
    """
    attached, handles = {}, []
    for index, values in prompts.items():
        reference = PromptedAttention(architecture, model.get_submodule(architecture.blocks[index]), values)
        reference.module.__dict__["reference"] = reference
        attached[index] = reference.module
    try:
        if architecture.interface:
            AttentionInterface.register(NAME, interface_function)
            AttentionMaskInterface.register(NAME, eager_mask)
            for module in model.modules():
                if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
                    module.config._attn_implementation_internal = NAME
            yield
        else:
            mode = ReferenceMode()
            handles = [module.register_forward_pre_hook(mode.enter) for module in attached.values()]
            handles += [module.register_forward_hook(mode.leave) for module in attached.values()]
            with mode:
                yield
    finally:
        for module in attached.values():
            del module.__dict__["reference"]
