"""What the head reads: class token, mean of patches, of prompts, or of both, before or after the final norm."""

from __future__ import annotations

import torch
from torch import nn

from vpt_peft.encoder import EncoderSpec

from .config import VPTConfig
from .forward_pass import ForwardPass, current_pass, owner_of


def pool(config: VPTConfig, spec: EncoderSpec, tokens: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """What the head reads, `(batch, 1, width)`, of tokens `(batch, tokens, width)` and prompts `(batch, prompts, width)`."""
    special = set(spec.special)
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
            raise RuntimeError("the last block gave no prompts to pool")
        parts.append(prompts)
    return torch.cat(parts, dim=1).mean(dim=1, keepdim=True)


def hand_to_head(spec: EncoderSpec, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Put the pooled feature where the head looks: in the class token's place, or into the mean over all tokens."""
    if 0 in spec.special:
        return torch.cat([pooled, tokens[:, 1:]], dim=1)
    return tokens + (pooled - tokens.mean(dim=1, keepdim=True))


def pool_adapters(running: ForwardPass, tokens: torch.Tensor, norm: nn.Module | None) -> torch.Tensor | None:
    """Tokens `(batch, tokens, width)` with what the active adapters pool in place; `None` where none does.

    Args:
        running: The forward pass.
        tokens: All tokens, before or after the final norm.
        norm: The norm that the tokens have passed and the prompts still have to, `None` before it.
    """
    spec, changed = running.owner.spec, False
    for adapter in running.adapters:
        config = adapter.config
        if not config.pools or config.pool_before_norm == (norm is not None):
            continue
        changed, prompts = True, running.final.get(adapter.name)
        if prompts is not None and norm is not None:
            # Without its torch hooks, but with what offloading has put around it
            prompts = norm.forward(prompts)
        if running.mixed is None:
            tokens = hand_to_head(spec, tokens, pool(config, spec, tokens, prompts))
        else:
            rows = running.mixed.rows(adapter.name, tokens.device)
            mine = tokens[rows]
            tokens = tokens.index_copy(0, rows, hand_to_head(spec, mine, pool(config, spec, mine, prompts)))
    return tokens if changed else None


def pool_before(norm: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook of the final norm."""
    running = current_pass(owner_of(norm))
    tokens = None if running is None else pool_adapters(running, args[0], None)
    return None if tokens is None else (tokens, *args[1:])


def pool_after(norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook of the final norm; prompts pass the same norm."""
    running = current_pass(owner_of(norm))
    return None if running is None else pool_adapters(running, output, norm)
