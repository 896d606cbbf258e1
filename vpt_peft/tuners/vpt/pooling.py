"""What the head reads: class token, mean of patches, of prompts, or of both, before or after the final norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vpt_peft.encoder import submodule


if TYPE_CHECKING:
    from .store import VPTPromptStore


def pooled_names(store: VPTPromptStore, before_norm: bool) -> list[str]:
    """Active adapters that say what the head reads, at this side of the norm."""
    names = []
    for name in store.active_names():
        config = store.configs.get(name)
        if config is not None and config.pools and config.pool_before_norm == before_norm:
            names.append(name)
    return names


def pool(store: VPTPromptStore, name: str, tokens: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """What the head reads, `(batch, 1, width)`, of tokens `(batch, tokens, width)` and prompts `(batch, prompts, width)`."""
    config, special = store.configs[name], set(store.spec.special)
    if config.token_type == "class":
        parts = [tokens[:, :1]]
    elif config.pooling == "prompt":
        parts = []
    else:
        patches = [index for index in range(tokens.shape[1]) if index not in special]
        contiguous = not patches or patches == list(range(patches[0], patches[-1] + 1))
        parts = [tokens[:, patches[0] : patches[-1] + 1] if contiguous else tokens[:, patches]]
    if config.reads_prompts:
        if prompts is None:
            raise RuntimeError(f"adapter {name!r}: the last block gave no prompts to pool")
        parts.append(prompts)
    return torch.cat(parts, dim=1).mean(dim=1, keepdim=True)


def hand_to_head(store: VPTPromptStore, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Put the pooled feature where the head looks: in the class token's place, or into the mean over all tokens."""
    if 0 in store.spec.special:
        return torch.cat([pooled, tokens[:, 1:]], dim=1)
    return tokens + (pooled - tokens.mean(dim=1, keepdim=True))


def pooled(store: VPTPromptStore, name: str, tokens: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
    """Tokens with what adapter `name` pools in place; `norm` is applied to the prompts where it was to the tokens."""
    prompts = store.final.get(name)
    if prompts is not None and norm is not None:
        prompts = type(norm).forward(norm, prompts)
    if store.mixed is None:
        return hand_to_head(store, tokens, pool(store, name, tokens, prompts))
    rows = store.mixed.rows(name, tokens.device)
    mine = tokens[rows]
    return tokens.index_copy(0, rows, hand_to_head(store, mine, pool(store, name, mine, prompts)))


def pool_before(norm: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook of the final norm."""
    store: VPTPromptStore = norm.__dict__["_prompt_store"]
    tokens, names = args[0], pooled_names(store, before_norm=True)
    for name in names:
        tokens = pooled(store, name, tokens, None)
    return (tokens, *args[1:]) if names else None


def pool_after(norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook of the final norm; prompts pass the same norm."""
    store: VPTPromptStore = norm.__dict__["_prompt_store"]
    names = pooled_names(store, before_norm=False)
    for name in names:
        output = pooled(store, name, output, norm)
    return output if names else None


def detach_pooling(store: VPTPromptStore) -> None:
    """Forget the store on the final norm."""
    if store.spec.final_norm is not None:
        submodule(store.encoder, store.spec.final_norm).__dict__.pop("_prompt_store", None)


def attach_pooling(store: VPTPromptStore) -> list:
    """Register the hooks on the final norm, if there is one; returns their handles."""
    if store.spec.final_norm is None:
        return []
    norm = submodule(store.encoder, store.spec.final_norm)
    norm.__dict__["_prompt_store"] = store
    return [norm.register_forward_pre_hook(pool_before), norm.register_forward_hook(pool_after)]
