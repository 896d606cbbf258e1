"""Prompts in encoders that write their attention out in torch calls: the calls are intercepted, the module is not.

Keys of prompts join at the product with the queries, the softmax runs over prompts and tokens together, and values of
prompts join at the product with the weights. All tensors the module itself sees keep the shapes they have without
prompts, so relative-position biases, window masks and shape checks between the calls hold as they are.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vpt_peft.encoder.trace import first_tensor

from .extras import AttentionExtras, PromptedBlock, grouped, scale_queries, widen_mask


PRODUCTS = frozenset({torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__})
SOFTMAXES = frozenset({torch.softmax, nn.functional.softmax, torch.Tensor.softmax})
SCALINGS = frozenset(
    {torch.mul, torch.div, torch.Tensor.mul, torch.Tensor.div, torch.Tensor.__mul__, torch.Tensor.__rmul__,
     torch.Tensor.__truediv__, torch.Tensor.__imul__, torch.Tensor.__itruediv__, torch.Tensor.mul_, torch.Tensor.div_}
)  # fmt: skip
ADDITIONS = frozenset(
    {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__}
)
DROPOUTS = frozenset({nn.functional.dropout, torch.dropout})
SDPA = nn.functional.scaled_dot_product_attention


class PromptInterceptor(TorchFunctionMode):
    """Adds prompts to the one softmax attention that runs while it is active.

    Args:
        extras: The prompts' keys and values, `(batch or 1, heads, prompts, head_dim)`.
    """

    def __init__(self, extras: AttentionExtras) -> None:
        super().__init__()
        self.extras = extras
        self.scores: Any = None
        self.prompt_scores: torch.Tensor | None = None
        self.softmaxed = False
        self.values: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is SDPA:
            return self._sdpa(*args, **kwargs)
        if func in PRODUCTS:
            return self._product(func, args[0], args[1])
        if self.scores is not None and args and isinstance(args[0], torch.Tensor):
            if func in SOFTMAXES and not self.softmaxed and args[0].shape[-2:] == self.scores.shape[-2:]:
                return self._softmax(func, args, kwargs)
            if args[0] is self.scores:
                return self._follow(func, args, kwargs)
        return func(*args, **kwargs)

    def _follow(self, func, args, kwargs):
        """Carry the prompts' part along with the tensor it belongs to; biases and masks leave prompts alone."""
        other = args[1] if len(args) > 1 else None
        if func in ADDITIONS and isinstance(other, torch.Tensor) and self.extras.inserted:
            inserted_only = AttentionExtras(prefix=self.extras.prefix, inserted=self.extras.inserted)
            args = (args[0], widen_mask(other, *args[0].shape[-2:], inserted_only), *args[2:])
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        is_bias = isinstance(other, torch.Tensor) and other.shape[-1:] == self.scores.shape[-1:]
        followed = func in SCALINGS and not is_bias or func in DROPOUTS and self.softmaxed
        if self.prompt_scores is not None and followed:
            self.prompt_scores = func(self.prompt_scores, *args[1:], **kwargs)
        self.scores = result
        return result

    def _product(self, func, left: torch.Tensor, right: torch.Tensor):
        extras = self.extras
        if self.scores is None and left.shape[-1] == right.shape[-2] and left.dim() >= 3:
            left = left if extras.temperature is None else scale_queries(left, extras.temperature)
            self.scores = func(left, right)
            if extras.keys is not None:
                self.prompt_scores = torch.matmul(left, grouped(extras.keys, left).transpose(-1, -2))
            return self.scores
        result = func(left, right)
        if self.softmaxed and self.prompt_scores is not None and left.shape[-2:] == self.scores.shape[-2:]:
            weights = self.prompt_scores.to(right.dtype).reshape(*left.shape[:-1], -1)
            result = result + torch.matmul(weights, grouped(extras.values, right))  # type: ignore[arg-type]
            self.prompt_scores = None
        return result

    def _softmax(self, func, args, kwargs):
        scores, self.softmaxed = args[0], True
        tokens, hidden = scores.shape[-1], self.extras.hidden_columns(scores.shape[-1], scores)
        if self.prompt_scores is not None:
            prompts = self.prompt_scores.to(scores.dtype).reshape(*scores.shape[:-1], -1)
            scores = torch.cat([prompts, scores], dim=-1)
        weights = func(scores if hidden is None else scores + hidden, *args[1:], **kwargs)
        self._record(weights)
        prompts, self.scores = weights.split([weights.shape[-1] - tokens, tokens], dim=-1)
        self.prompt_scores = None if self.prompt_scores is None else prompts
        return self.scores

    def _record(self, weights: torch.Tensor) -> None:
        if self.extras.maps is not None:
            heads = 1 if self.extras.keys is None else self.extras.keys.shape[1]
            self.extras.record(weights.unflatten(0, (-1, heads)) if weights.dim() == 3 else weights)

    def _sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        query, key, value, attn_mask = self.extras.add_to(query, key, value, attn_mask)
        if self.extras.maps is not None:
            self._record(_attention_weights(query, key, attn_mask, is_causal, kwargs.get("scale")))
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)


def _attention_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """The weights of a fused attention call, `(..., queries, keys)`."""
    if is_causal:
        raise ValueError("attention maps of causal attention are not defined for prompts")
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


class _Running(threading.local):
    """The interceptors of the attention modules that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.interceptors: list[PromptInterceptor | None] = []


_running = _Running()


def _enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module."""
    layer: PromptedBlock = module.__dict__["_prompted_block"]
    tokens = first_tensor(args) if args else None
    tokens = first_tensor(kwargs) if tokens is None else tokens
    extras = None if tokens is None else layer.extras(tokens)
    interceptor = None if extras is None else PromptInterceptor(extras)
    _running.interceptors.append(interceptor)
    if interceptor is not None:
        interceptor.__enter__()


def _leave(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of an attention module; it also runs where the forward pass failed."""
    interceptor = _running.interceptors.pop() if _running.interceptors else None
    if interceptor is None:
        return None
    interceptor.__exit__(None, None, None)
    if not interceptor.extras.inserted or interceptor.scores is None or not isinstance(output, tuple):
        return None
    lengths = interceptor.scores.shape[-2:]
    # Attention maps among the outputs hold prompt tokens
    are_maps = (isinstance(part, torch.Tensor) and part.dim() > 2 and part.shape[-2:] == lengths for part in output)
    parts = zip(output, are_maps, strict=True)
    return tuple(interceptor.extras.without_prompts(part) if is_map else part for part, is_map in parts)


def attach_interceptor(attention: nn.Module, layer: PromptedBlock) -> list:
    """Intercept the attention of a module without the interface; returns the hooks' handles."""
    attention.__dict__["_prompted_block"] = layer
    return [
        attention.register_forward_pre_hook(_enter, with_kwargs=True),
        attention.register_forward_hook(_leave, always_call=True),
    ]
