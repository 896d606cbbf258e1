"""Find, by numbers, which linear maps of an attention module make the keys and values it attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from .quantized import has_packed_weights
from .spec import HeadMap, submodule
from .trace import Call


Measure = Callable[[torch.Tensor], torch.Tensor]


def apply_head_map(attention: nn.Module, head_map: HeadMap, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Map tokens of shape `(..., tokens, width)` to `(..., heads, tokens, head_dim)` through the module's own maps."""
    return _split(attention, head_map, submodule(attention, head_map.path)(tokens), heads)


def _split(attention: nn.Module, head_map: HeadMap, projected: torch.Tensor, heads: int) -> torch.Tensor:
    if head_map.parts > 1:
        order = (heads, head_map.parts) if head_map.heads_first else (head_map.parts, heads)
        split = projected.unflatten(-1, (*order, -1))
        projected = split.select(-2 if head_map.heads_first else -3, head_map.part).flatten(-2)
    if head_map.norm is not None and not head_map.norm_per_head:
        projected = submodule(attention, head_map.norm)(projected)
    result = projected.reshape(*projected.shape[:-1], heads, -1).transpose(-2, -3)
    if head_map.norm is not None and head_map.norm_per_head:
        result = submodule(attention, head_map.norm)(result)
    if head_map.unit_length:
        result = nn.functional.normalize(result, dim=-1)
    return result


def _moments(by_head: torch.Tensor) -> torch.Tensor:
    """Moments over tokens, per head and channel: equal for equal sets of tokens, however they are grouped."""
    by_head = by_head.float()
    return torch.stack([by_head.sum(1), by_head.square().sum(1), by_head.pow(3).sum(1)])


def _lengths(by_head: torch.Tensor) -> torch.Tensor:
    """Moments of token lengths per head, which rotary embeddings leave alone."""
    length = by_head.float().norm(dim=-1)
    return torch.stack([length.sum(1), length.pow(3).sum(1)])


def _first_token(by_head: torch.Tensor) -> torch.Tensor:
    return by_head[:, 0].float()


def _agree(made: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return bool((made - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-6))


def _heads_of(target: torch.Tensor, heads: int) -> torch.Tensor | None:
    """A key or value tensor as `(heads, all tokens, head_dim)`, whatever the grouping in windows."""
    if target.dim() == 3:
        return target.unflatten(0, (-1, heads)).transpose(0, 1).flatten(1, 2) if target.shape[0] % heads == 0 else None
    if target.dim() >= 4 and target.shape[1] == heads:
        return target.transpose(0, 1).flatten(1, -2)
    return None


def _candidates(calls: list[Call], target: torch.Tensor, attention_path: str) -> Iterator[tuple[Call, HeadMap, int]]:
    head_dim = target.shape[-1]
    for call in sorted(calls, key=lambda call: (call.path.count("."), call.order)):
        if call.output is None or call.input is None or call.path == attention_path:
            continue
        has_weights = isinstance(getattr(call.module, "weight", None), torch.Tensor) or has_packed_weights(call.module)
        if not has_weights or "norm" in type(call.module).__name__.lower():
            continue
        path = call.path[len(attention_path) + 1 if attention_path else 0 :]
        for parts in (1, 2, 3):
            if call.output.shape[-1] % (parts * head_dim):
                continue
            heads = call.output.shape[-1] // (parts * head_dim)
            for part in range(parts):
                for heads_first in (False, True) if parts > 1 else (False,):
                    yield call, HeadMap(path, parts, part, heads_first), heads


def match_map(
    attention: nn.Module, calls: list[Call], target: torch.Tensor, attention_path: str, name: str
) -> HeadMap | None:
    """The map among `calls` whose split output is `target`.

    Tokens may come in any order. Where nothing matches (rotary embeddings turn keys after the map), the first token is
    compared, which is not turned where it has position zero, then lengths. `name` ("key" or "value") breaks ties.
    """
    for measure in (_moments, _first_token, _lengths):
        found = [
            variant
            for call, head_map, heads in _candidates(calls, target, attention_path)
            for variant in _variants(attention_path, calls, call, head_map)
            if _makes(attention, variant, call, target, heads, measure)
        ]
        if found:
            part = ("query", "key", "value").index(name)
            likeliest = min(found, key=lambda head_map: _unlikely(head_map, name, part))
            return replace(likeliest, exact=measure is not _lengths)
    return None


def _unlikely(head_map: HeadMap, name: str, part: int) -> int:
    if head_map.parts > 1:
        return int(head_map.part != part - (head_map.parts == 2))
    return int(not head_map.path.rsplit(".", 1)[-1].startswith(name[0]))


def _makes(
    attention: nn.Module, head_map: HeadMap, call: Call, target: torch.Tensor, heads: int, measure: Measure
) -> bool:
    wanted = _heads_of(target, heads)
    if wanted is None or call.output is None:
        return False
    try:
        made = _split(attention, head_map, call.output.reshape(-1, call.output.shape[-1]), heads)
    except (RuntimeError, ValueError):
        return False
    return made.shape == wanted.shape and _agree(measure(made), measure(wanted), made.dtype)


def _variants(attention_path: str, calls: list[Call], call: Call, head_map: HeadMap) -> Iterator[HeadMap]:
    """The map as it is, scaled to unit length, or followed by a norm that read its output."""
    yield head_map
    yield replace(head_map, unit_length=True)
    for norm in calls:
        if "norm" in type(norm.module).__name__.lower() and norm.input is not None and call.output is not None:
            if norm.input.untyped_storage().data_ptr() == call.output.untyped_storage().data_ptr():
                path = norm.path[len(attention_path) + 1 if attention_path else 0 :]
                per_head = norm.input.shape[-1] < call.output.shape[-1] // head_map.parts
                yield replace(head_map, norm=path, norm_per_head=per_head)
