"""Prompts in encoders that call transformers' `AttentionInterface`, whatever attention function is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .extras import AttentionExtras, PromptedBlock, over_rows, project, widen_mask


PREFIX = "vpt_"


class PromptedConfig:
    """Stands in for the config of one attention module and differs in one answer: the name of the attention function.

    The name is made from the wrapped config each time it is asked for, so a later `set_attn_implementation` holds and
    keeps the prompts. The model's own config is not touched, so masks are made as without prompts.
    """

    def __init__(self, wrapped: Any, layer: PromptedBlock) -> None:
        self.wrapped = wrapped
        self.layer = layer

    @property
    def _attn_implementation(self) -> str:
        name = self.wrapped._attn_implementation or "eager"
        prompted = PREFIX + name
        if prompted not in AttentionInterface._global_mapping:
            AttentionInterface.register(prompted, partial(prompted_attention, name))
        return prompted

    def __getattr__(self, name: str) -> Any:
        if name in ("wrapped", "layer") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.wrapped, name)


class _Unprompted:
    """A view of an attention module that shows its own config, for functions that read the attention name from it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.config = module.config.wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def prompted_attention(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of a prompted block: the chosen one, on keys and values that include the prompts.

    Args:
        name: The chosen attention function.
        module: The attention module.
        query, key, value: `(batch, heads, tokens, head_dim)`, from the module.
        attention_mask: As the chosen function takes it: a tensor, a flex `BlockMask` or `None`.

    Returns:
        The output `(batch, tokens, heads, head_dim)` and the attention maps `(batch, heads, tokens, tokens)` where the
        function returns them, without the rows and columns of prompts.
    """
    layer: PromptedBlock = module.config.layer
    extras: AttentionExtras | None = layer.extras(query)
    if extras is None:
        return _base_function(layer, name)(_seen_by(name, module), query, key, value, attention_mask, *args, **kwargs)
    if extras.maps is not None:
        name = "eager"
    if extras.keys is not None and kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError(
            f"{name} takes the keys of several images as one sequence, in which prompts have no place; use "
            "set_attn_implementation('sdpa')."
        )
    if extras.all_tokens is not None:
        # The module itself has seen the prefix tokens only, which ask; all tokens answer
        key, value = project(layer.block, layer.spec.attention, extras.all_tokens, "key", "value")
    queries, rows = query.shape[-2], query.shape[0]
    bias = kwargs.get("position_bias")
    if bias is not None:
        kwargs["position_bias"] = widen_mask(bias, queries, key.shape[-2], extras, value=0.0)
    query, key, value, attention_mask = extras.add_to(query, key, value, attention_mask)
    if extras.queries is not None:
        query = torch.cat([over_rows(extras.queries, rows), query], dim=2)
    function = _base_function(layer, name)
    output, maps = function(_seen_by(name, module), query, key, value, attention_mask, *args, **kwargs)
    if extras.queries is not None:
        beside, output = output.split([extras.queries.shape[2], queries], dim=1)
        layer.receive_outputs(beside)
        maps = maps[:, :, -queries:] if maps is not None else None
    if maps is not None:
        extras.record(maps)
        maps = extras.without_prompts(maps[..., extras.prompts :])
    return output, maps


def _base_function(layer: PromptedBlock, name: str) -> Callable:
    eager: Any = layer.spec.attention.eager
    return ALL_ATTENTION_FUNCTIONS[name] if name != "eager" else eager


def _seen_by(name: str, module: Any) -> Any:
    """Flash and hub-kernel functions read the attention name from the module's config; they get to see the real one."""
    return module if name in ("eager", "sdpa", "flex_attention") else _Unprompted(module)
