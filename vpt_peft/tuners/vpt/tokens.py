"""Prompt tokens in a block's sequence: in after the prefix tokens, out again, and everything that counts tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vpt_peft.attention.extras import insert_columns


try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # the collector has moved: hidden_states[0] then shows the prompts, nothing else depends on it
    _active_collector = None  # type: ignore[assignment]


def join(parts: Sequence[torch.Tensor], dim: int = -2) -> torch.Tensor:
    """Parts `(batch or 1, ...)` one after the other along `dim`."""
    if len(parts) == 1:
        return parts[0]
    rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(rows, *part.shape[1:]) for part in parts], dim=dim)


def insert_tokens(hidden: torch.Tensor, prompts: list[torch.Tensor], position: int) -> torch.Tensor:
    """`(batch, tokens, width)` with all prompts put in at `position`."""
    before, _, behind = split_tokens(hidden, position, [])
    return torch.cat([before, *prompts, behind], dim=1)


def split_tokens(
    hidden: torch.Tensor, position: int, lengths: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The tokens before `position`, the prompts of each length that stand there, and the tokens behind them."""
    # One split, since the gradient of each slice by itself would be as large as `hidden`
    rest = hidden.shape[1] - position - sum(lengths)
    before, *parts, behind = hidden.split_with_sizes([position, *lengths, rest], dim=1)
    return before, parts, behind


def widen_positions(
    args: tuple, kwargs: dict[str, Any], tokens: int, position: int, count: int
) -> tuple[tuple, dict[str, Any]]:
    """Give rotary tables among a block's arguments a neutral entry (no rotation) for each prompt.

    A table is a pair (cos, sin) over all `tokens`, or a complex tensor; tables over patches only fit as they are,
    since prompts stand before the patches.
    """
    where = tokens, position, count
    return (
        tuple([_widen_table(value, *where) for value in args]),
        {name: _widen_table(value, *where) for name, value in kwargs.items()},
    )


def _widen_table(value: Any, tokens: int, position: int, count: int) -> Any:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(p, torch.Tensor) for p in value)
    if is_pair and all(part.dim() >= 2 and part.shape[-2] == tokens for part in value):
        cosine, sine = value
        return type(value)(
            (insert_columns(cosine, -2, position, count, 1.0), insert_columns(sine, -2, position, count, 0.0))
        )
    if isinstance(value, torch.Tensor) and value.is_complex():
        dim = next((d for d, size in enumerate(value.shape) if size == tokens), None)
        return value if dim is None else insert_columns(value, dim, position, count, 1.0)
    return value


def keep_initial_hidden_state(hidden: torch.Tensor) -> None:
    """Record the first block's input as `hidden_states[0]` before prompts come in, if hidden states are collected.

    transformers records it after the block, from the arguments the block received - which hold the prompts.
    """
    if _active_collector is None:
        return
    collected = _active_collector.get()
    if not collected or "hidden_states" not in collected or len(collected["hidden_states"]) > 0:
        return
    selection = collected.get("_hidden_states_layers")
    collected["hidden_states"].append(hidden if selection is None or 0 in selection else None)
