"""What prompts add to one attention call: the maps that make keys and values of prompts, masks and temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from vpt_peft.encoder import AttentionSpec, BlockSpec, submodule
from vpt_peft.encoder.projections import apply_projection


class AttentionMap(NamedTuple):
    """The attention of one block.

    Args:
        maps: `(batch, heads, tokens, prefix + prompts + patches)`; rows sum to 1.
        columns: The name of each column: "class" and registers, "prompt_0" ..., "patch_0" ....
    """

    maps: torch.Tensor
    columns: list[str]


class PromptedBlock(Protocol):
    """What attention needs of the layer that prompts a block."""

    spec: BlockSpec

    @property
    def block(self) -> nn.Module: ...

    def extras(self, like: torch.Tensor) -> AttentionExtras | None:
        """What prompts add to the attention call that runs, on the device and in the dtype of a tensor."""

    def receive_outputs(self, outputs: torch.Tensor) -> None:
        """Take the attention outputs of prompts beside windows, `(batch · windows, prompts, heads, head_dim)`."""


@dataclass(slots=True)
class AttentionExtras:
    """What one attention call gets from prompts.

    Args:
        keys, values: Of the prompts, `(batch or 1, heads, prompts, head_dim)`; `None` without key/value prompts.
        temperature: Divides the logits of all tokens, `(1 or batch,)`; `None` without.
        prefix: Number of class, register and other tokens in front of the patches.
        inserted: Number of prompt tokens that stand in the sequence, behind the prefix.
        queries: Of prompts that run beside windows, `(batch, heads, prompts, head_dim)`; `None` without.
        mask: Additive mask over the key/value prompts per image, `(batch, 1, 1, prompts)`; `None` if all are seen.
        inserted_mask: The same over prompt tokens in the sequence.
        mask_open: The value float masks hold where attention is allowed.
        all_tokens: All of the block's tokens `(batch, tokens, width)` where it makes its prefix tokens alone.
        maps: A list that takes the full attention maps; `None` where nobody asks for them.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    prefix: int = 0
    inserted: int = 0
    queries: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    inserted_mask: torch.Tensor | None = None
    mask_open: float = 0.0
    all_tokens: torch.Tensor | None = None
    maps: list[AttentionMap] | None = None

    @property
    def prompts(self) -> int:
        """Number of key/value prompts."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def hidden_columns(self, keys: int, query: torch.Tensor) -> torch.Tensor | None:
        """Additive mask `(rows, 1, ..., prompts + keys)` that hides padding among prompts; `None` if there is none.

        Args:
            keys: Length without key/value prompts.
            query: Of the call, or its scores: the mask has its number of dimensions, rows and dtype.
        """
        if self.mask is None and self.inserted_mask is None:
            return None
        rows, start = query.shape[0], self.prompts + self.prefix
        columns = query.new_zeros((rows, self.prompts + keys))
        if self.mask is not None:
            columns[:, : self.prompts] = over_rows(self.mask.flatten(1), rows)
        if self.inserted_mask is not None:
            columns[:, start : start + self.inserted] = over_rows(self.inserted_mask.flatten(1), rows)
        return columns.view(rows, *[1] * (query.dim() - 2), -1)

    def record(self, maps: torch.Tensor) -> None:
        """Take full maps `(batch, heads, inserted + tokens, prompts + inserted + tokens)` where they are asked for."""
        if self.maps is not None:
            rows = without_columns(maps, -2, self.prefix, self.inserted)
            before = rows[..., self.prompts : self.prompts + self.prefix]
            ordered = torch.cat([before, rows[..., : self.prompts], rows[..., self.prompts + self.prefix :]], dim=-1)
            prompts = self.prompts + self.inserted
            names = [f"prefix_{i}" for i in range(self.prefix)] + [f"prompt_{i}" for i in range(prompts)]
            names += [f"patch_{i}" for i in range(ordered.shape[-1] - len(names))]
            self.maps.append(AttentionMap(ordered, names))

    def without_prompts(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps `(..., inserted + tokens, inserted + tokens)` without the rows and columns of prompt tokens."""
        return without_columns(without_columns(maps, -1, self.prefix, self.inserted), -2, self.prefix, self.inserted)

    def add_to(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """An attention call's arguments with prompts in front of keys and values, temperature and masks included."""
        queries, keys = query.shape[-2], key.shape[-2]
        if self.temperature is not None:
            query = scale_queries(query, self.temperature)
        if mask is not None:
            mask = widen_mask(mask, queries, keys, self)
        if self.keys is not None and self.values is not None:
            key = torch.cat([grouped(self.keys, key), key], dim=-2)
            value = torch.cat([grouped(self.values, value), value], dim=-2)
        if self.mask is None and self.inserted_mask is None:
            return query, key, value, mask
        hidden: Any = self.hidden_columns(keys, query)
        if mask is None:
            return query, key, value, hidden.expand(*query.shape[:-1], -1)
        if not isinstance(mask, torch.Tensor) or mask.dim() != query.dim():
            raise ValueError(
                "adapter_names with prompts of different lengths needs eager or sdpa attention; set it so."
            )
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        return query, key, value, mask + hidden


def without_columns(maps: torch.Tensor, dim: int, position: int, count: int) -> torch.Tensor:
    """A tensor without `count` entries at `position` of dimension `dim`."""
    if not count:
        return maps
    before, _, behind = maps.split([position, count, maps.shape[dim] - position - count], dim=dim)
    return torch.cat([before, behind], dim=dim)


class _ScaleQueries(torch.autograd.Function):
    """Queries over a temperature.

    The gradient is computed from the result, which the attention keeps anyway; torch's own would keep the queries too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(query: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return query / temperature

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        scaled, temperature = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        of_temperature = (grad * scaled).sum_to_size(temperature.shape) / -temperature if learns else None
        return grad / temperature, of_temperature


def scale_queries(query: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Queries `(rows, ..., head_dim)` divided by a temperature, one for all or one per image.

    Args:
        temperature: `(1 or batch,)`; with several rows per image (windows) images vary slowest.
    """
    temperature = temperature.to(query)
    if temperature.shape[0] > 1:
        temperature = over_rows(temperature, query.shape[0]).view(-1, *[1] * (query.dim() - 1))
    return _ScaleQueries.apply(query, temperature) if torch.is_grad_enabled() else query / temperature


def project(block: nn.Module, spec: AttentionSpec, prompts: torch.Tensor, *names: str) -> list[torch.Tensor]:
    """Queries, keys or values of prompts, by the block's own norm and maps.

    Args:
        block: The block.
        spec: Its attention.
        prompts: `(batch or 1, prompts, width)`.
        names: What is wanted, of "query", "key" and "value".

    Returns:
        For each a tensor `(batch or 1, heads, prompts, head_dim)`.
    """
    normed = prompts if spec.norm is None else submodule(block, spec.norm)(prompts)
    attention = submodule(block, spec.path)
    return [apply_projection(attention, getattr(spec, name), normed, spec.heads) for name in names]


def grouped(prompts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Keys or values of prompts `(batch or 1, heads, prompts, head_dim)` in the grouping and dtype of `like`.

    `like` is `(rows, heads, tokens, head_dim)`, `(rows · heads, tokens, head_dim)` or
    `(rows, heads, windows, tokens, head_dim)`.
    """
    prompts = prompts if prompts.dtype == like.dtype else prompts.to(like.dtype)
    if like.dim() == 3:
        return over_rows(prompts, like.shape[0] // prompts.shape[1]).flatten(0, 1)
    prompts = over_rows(prompts, like.shape[0])
    return prompts if like.dim() == 4 else prompts.unsqueeze(2).expand(-1, -1, like.shape[2], -1, -1)


def over_rows(per_image: torch.Tensor, rows: int) -> torch.Tensor:
    """Expand `(batch or 1, ...)` to `rows` rows; with several rows per image (windows) images vary slowest."""
    if per_image.shape[0] == rows:
        return per_image
    if per_image.shape[0] == 1:
        return per_image.expand(rows, *per_image.shape[1:])
    return per_image.repeat_interleave(rows // per_image.shape[0], dim=0)


def insert_columns(mask: torch.Tensor, dim: int, position: int, count: int, value: Any) -> torch.Tensor:
    """`mask` with `count` entries of `value` put in at `position` of dimension `dim`."""
    shape = list(mask.shape)
    shape[dim] = count
    opened = torch.full(shape, value, dtype=mask.dtype, device=mask.device)
    before, after = mask.split([position, mask.shape[dim] - position], dim=dim)
    return torch.cat([before, opened, after], dim=dim)


def widen_mask(mask: Any, queries: int, keys: int, extras: AttentionExtras, value: float | None = None) -> Any:
    """Let all tokens see the prompts, and prompts see all tokens, in a mask that was made without them.

    Args:
        mask: Boolean (True is seen), additive, or a padding mask `(batch, keys)`; broadcastable to
            `(batch, heads, queries, keys)`; or a flex `BlockMask`.
        queries, keys: Lengths the attention call has before key/value prompts are put in front.
        extras: The prompts.
        value: What an additive mask gets; by default the value it holds where attention is allowed.
    """
    if not isinstance(mask, torch.Tensor):
        return _widen_block_mask(mask, queries, keys, extras)
    additive = extras.mask_open if value is None else value
    opened: Any = additive if mask.is_floating_point() else 1
    position, count = extras.prefix, extras.inserted
    if count:
        if mask.shape[-1] == keys - count:
            mask = insert_columns(mask, -1, position, count, opened)
        if mask.dim() > 2 and mask.shape[-2] == queries - count and mask.shape[-2] > 1:
            mask = insert_columns(mask, -2, position, count, opened)
    if extras.prompts and mask.shape[-1] == keys:
        mask = insert_columns(mask, -1, 0, extras.prompts, opened)
    if extras.queries is not None and mask.dim() > 2 and mask.shape[-2] == queries and queries > 1:
        mask = insert_columns(mask, -2, 0, extras.queries.shape[-2], opened)
    return mask


def _widen_block_mask(mask: Any, queries: int, keys: int, extras: AttentionExtras) -> Any:
    """A flex `BlockMask` with prompts in front of the keys (and among the tokens): rebuilt, it cannot be padded."""
    from torch.nn.attention.flex_attention import create_block_mask

    position, count = extras.prefix, extras.inserted
    prompts, inner = extras.prompts, mask.mask_mod

    def mask_mod(batch, head, query, key):
        token = key - prompts
        is_prompt = (token < 0) | ((token >= position) & (token < position + count))
        is_prompt = is_prompt | ((query >= position) & (query < position + count))
        token = torch.where(token >= position + count, token - count, token).clamp(0, keys - count - 1)
        query = torch.where(query >= position + count, query - count, query).clamp(0, queries - count - 1)
        return is_prompt | inner(batch, head, query, token)

    batch, heads = mask.shape[:2]
    return create_block_mask(mask_mod, batch, heads, queries, keys + prompts, device=mask.kv_num_blocks.device)
