"""Find, by comparing numbers, which linear layers of an attention module compute its queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from .quantized import has_packed_weights
from .spec import Projection, submodule
from .trace import Call


Measure = Callable[[torch.Tensor], torch.Tensor]


def apply_projection(attention: nn.Module, projection: Projection, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Project tokens `(..., tokens, width)` to `(..., heads, tokens, head_dim)` with the module's own layer."""
    projected = submodule(attention, projection.path)(tokens)
    if projection.bias:
        projected = projected + torch.cat([submodule(attention, name) for name in projection.bias])
    return _split(attention, projection, projected, heads)


def _split(attention: nn.Module, projection: Projection, projected: torch.Tensor, heads: int) -> torch.Tensor:
    if projection.parts > 1:
        order = (heads, projection.parts) if projection.heads_first else (projection.parts, heads)
        split = projected.unflatten(-1, (*order, -1))
        projected = split.select(-2 if projection.heads_first else -3, projection.part).flatten(-2)
    if projection.norm is not None and not projection.norm_per_head:
        projected = submodule(attention, projection.norm)(projected)
    result = projected.reshape(*projected.shape[:-1], heads, -1).transpose(-2, -3)
    if projection.norm is not None and projection.norm_per_head:
        result = submodule(attention, projection.norm)(result)
    if projection.unit_length:
        result = nn.functional.normalize(result, dim=-1)
    return result


def _moments(by_head: torch.Tensor) -> torch.Tensor:
    """Moments over tokens, per head and channel; they depend on neither order nor grouping of the tokens."""
    by_head = by_head.float()
    return torch.stack([by_head.sum(1), by_head.square().sum(1), by_head.pow(3).sum(1)])


def _lengths(by_head: torch.Tensor) -> torch.Tensor:
    """Moments of the tokens' vector lengths per head, which rotary embeddings preserve."""
    length = by_head.float().norm(dim=-1)
    return torch.stack([length.sum(1), length.pow(3).sum(1)])


def _first_token(by_head: torch.Tensor) -> torch.Tensor:
    return by_head[:, 0].float()


def _agree(made: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return bool((made - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-6))


def _heads_of(target: torch.Tensor, heads: int) -> torch.Tensor | None:
    """A key or value tensor as `(heads, all tokens, head_dim)`, however it is grouped into windows."""
    if target.dim() == 3:
        return target.unflatten(0, (-1, heads)).transpose(0, 1).flatten(1, 2) if target.shape[0] % heads == 0 else None
    if target.dim() >= 4 and target.shape[1] == heads:
        return target.transpose(0, 1).flatten(1, -2)
    return None


def _candidates(
    calls: list[Call], target: torch.Tensor, attention_path: str
) -> Iterator[tuple[Call, Projection, int]]:
    head_dim = target.shape[-1]
    for call in sorted(calls, key=lambda call: (call.path.count("."), call.order)):
        if call.output is None or call.input is None or call.path == attention_path:
            continue
        has_weights = isinstance(getattr(call.module, "weight", None), torch.Tensor) or has_packed_weights(call.module)
        if not has_weights or "norm" in type(call.module).__name__.lower():
            continue
        start = len(attention_path) + 1 if attention_path else 0
        path, bias = call.path[start:], tuple(name[start:] for name in call.bias)
        for parts in (1, 2, 3):
            if call.output.shape[-1] % (parts * head_dim):
                continue
            heads = call.output.shape[-1] // (parts * head_dim)
            for part in range(parts):
                for heads_first in (False, True) if parts > 1 else (False,):
                    yield call, Projection(path, parts, part, heads_first, bias=bias), heads


def match_projection(
    attention: nn.Module, calls: list[Call], target: torch.Tensor, attention_path: str, name: str
) -> Projection | None:
    """Find the projection among `calls` whose output, split into heads, is `target`.

    Tokens may be in any order. Rotary embeddings rotate keys after the projection; where nothing matches, the first
    token is compared, which is not rotated if it has position zero, and then vector lengths.

    Args:
        attention: The attention module.
        calls: Calls inside it.
        target: Queries, keys or values as the attention received them, `(batch, heads, tokens, head_dim)` or
            `(batch * heads, tokens, head_dim)`.
        attention_path: Dotted path of the attention module, as in `calls`.
        name: "query", "key" or "value"; breaks ties.
    """
    for measure in (_moments, _first_token, _lengths):
        found = [
            variant
            for call, projection, heads in _candidates(calls, target, attention_path)
            for variant in _variants(attention_path, calls, call, projection)
            if _makes(attention, variant, call, target, heads, measure)
        ]
        if found:
            part = ("query", "key", "value").index(name)
            likeliest = min(found, key=lambda projection: _unlikely(projection, name, part))
            return replace(likeliest, exact=measure is not _lengths)
    return None


def _unlikely(projection: Projection, name: str, part: int) -> int:
    if projection.parts > 1:
        return int(projection.part != part - (projection.parts == 2))
    return int(not projection.path.rsplit(".", 1)[-1].startswith(name[0]))


def _makes(
    attention: nn.Module, projection: Projection, call: Call, target: torch.Tensor, heads: int, measure: Measure
) -> bool:
    wanted = _heads_of(target, heads)
    if wanted is None or call.output is None:
        return False
    try:
        made = _split(attention, projection, call.output.reshape(-1, call.output.shape[-1]), heads)
    except (RuntimeError, ValueError):
        return False
    return made.shape == wanted.shape and _agree(measure(made), measure(wanted), made.dtype)


def _variants(attention_path: str, calls: list[Call], call: Call, projection: Projection) -> Iterator[Projection]:
    """The projection as it is, scaled to unit length, or followed by a norm on its output."""
    yield projection
    yield replace(projection, unit_length=True)
    for norm in calls:
        if "norm" in type(norm.module).__name__.lower() and norm.input is not None and call.output is not None:
            if norm.input.untyped_storage().data_ptr() == call.output.untyped_storage().data_ptr():
                path = norm.path[len(attention_path) + 1 if attention_path else 0 :]
                per_head = norm.input.shape[-1] < call.output.shape[-1] // projection.parts
                yield replace(projection, norm=path, norm_per_head=per_head)
