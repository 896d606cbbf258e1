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

from .extras import AttentionExtras, PromptedBlock, over_rows, scale_queries, widen_mask, without_columns


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
        if func in ADDITIONS and isinstance(args[1], torch.Tensor) and self.extras.inserted:
            args = (args[0], self._wide(args[1], args[0]), *args[2:])
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        other = args[1] if len(args) > 1 else None
        if self.prompt_scores is not None:
            if (
                func in SCALINGS
                and not (isinstance(other, torch.Tensor) and other.shape[-1:] == self.scores.shape[-1:])
                or func in DROPOUTS
                and self.softmaxed
            ):
                self.prompt_scores = func(self.prompt_scores, *args[1:], **kwargs)
        self.scores = result
        return result

    def _wide(self, bias: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inserted_only = AttentionExtras(prefix=self.extras.prefix, inserted=self.extras.inserted)
        return widen_mask(bias, scores.shape[-2], scores.shape[-1], inserted_only)

    def _product(self, func, left: torch.Tensor, right: torch.Tensor):
        if self.scores is None and left.shape[-1] == right.shape[-2] and left.dim() >= 3:
            left = self._scaled(left)
            self.scores = func(left, right)
            if self.extras.keys is not None:
                keys = self._grouped(self.extras.keys, left).to(left.dtype)
                self.prompt_scores = torch.matmul(left, keys.transpose(-1, -2))
            return self.scores
        result = func(left, right)
        if self.softmaxed and self.prompt_scores is not None and left.shape[-2:] == self.scores.shape[-2:]:
            values = self._grouped(self.extras.values, right).to(right.dtype)
            result = result + torch.matmul(self.prompt_scores.to(right.dtype).reshape(*left.shape[:-1], -1), values)
            self.prompt_scores = None
        return result

    def _softmax(self, func, args, kwargs):
        scores = args[0]
        self.softmaxed = True
        if self.prompt_scores is None:
            self.scores = func(*args, **kwargs)
            self._record(self.scores)
            return self.scores
        prompts = self.prompt_scores.to(scores.dtype).reshape(*scores.shape[:-1], -1)
        if self.extras.mask is not None:
            prompts = prompts + self._mask_like(scores)
        weights = func(torch.cat([prompts, scores], dim=-1), *args[1:], **kwargs)
        self._record(weights)
        self.prompt_scores, self.scores = weights.split([prompts.shape[-1], scores.shape[-1]], dim=-1)
        return self.scores

    def _grouped(self, extra: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Bring `(batch or 1, heads, prompts, head_dim)` to the grouping of `like`.

        `like` is `(rows, heads, tokens, head_dim)`, `(rows · heads, tokens, head_dim)` or
        `(rows, heads, windows, tokens, head_dim)`.
        """
        if extra is None:
            raise ValueError("no prompts to group")
        if like.dim() == 3:
            return over_rows(extra, like.shape[0] // extra.shape[1]).flatten(0, 1)
        extra = over_rows(extra, like.shape[0])
        return extra if like.dim() == 4 else extra.unsqueeze(2).expand(-1, -1, like.shape[2], -1, -1)

    def _scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Queries divided by the temperature, where there is one."""
        return query if self.extras.temperature is None else scale_queries(query, self.extras.temperature)

    def _record(self, weights: torch.Tensor) -> None:
        if self.extras.maps is not None:
            heads = 1 if self.extras.keys is None else self.extras.keys.shape[1]
            self.extras.record(weights.unflatten(0, (-1, heads)) if weights.dim() == 3 else weights)

    def _mask_like(self, scores: torch.Tensor) -> torch.Tensor:
        """The mask over padding among prompts, with the rows of `scores`."""
        mask = over_rows(self.extras.mask.flatten(1), scores.shape[0])  # type: ignore[union-attr]
        return mask.view(mask.shape[0], *[1] * (scores.dim() - 2), -1).to(scores.dtype)

    def _sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        queries, keys, rows = query.shape[-2], key.shape[-2], query.shape[0]
        query = self._scaled(query)
        if attn_mask is not None:
            attn_mask = widen_mask(attn_mask, queries, keys, self.extras)
        if self.extras.keys is not None:
            key = torch.cat([self._grouped(self.extras.keys, key).to(key.dtype), key], dim=-2)
            value = torch.cat([self._grouped(self.extras.values, value).to(value.dtype), value], dim=-2)
        hidden = self.extras.hidden_columns(keys, rows)
        if hidden is not None and key.dim() == 4:
            hidden = hidden.to(query.dtype)
            attn_mask = hidden if attn_mask is None else attn_mask + hidden
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
    inserted = interceptor.extras.inserted
    if not inserted or interceptor.scores is None or not isinstance(output, tuple):
        return None
    return tuple(_without_prompts(part, interceptor) for part in output)


def _without_prompts(part: Any, interceptor: PromptInterceptor) -> Any:
    """Attention maps among an attention module's outputs, without the rows and columns of prompt tokens."""
    if not isinstance(part, torch.Tensor) or part.dim() < 3 or part.shape[-2:] != interceptor.scores.shape[-2:]:
        return part
    extras = interceptor.extras
    return without_columns(
        without_columns(part, -1, extras.prefix, extras.inserted), -2, extras.prefix, extras.inserted
    )


def attach_interceptor(attention: nn.Module, layer: PromptedBlock) -> list:
    """Intercept the attention of a module without the interface; returns the hooks' handles."""
    attention.__dict__["_prompted_block"] = layer
    return [
        attention.register_forward_pre_hook(_enter, with_kwargs=True),
        attention.register_forward_hook(_leave, always_call=True),
    ]
