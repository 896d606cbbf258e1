"""Window prompts: prompts that run beside the windows of a hierarchical encoder (Swin), as in the official code.

Every window attends to the prompts; the prompts attend to each window, and the mean over windows goes on.
"""

from __future__ import annotations

import torch
from torch import nn

from vpt_peft.encoder import BlockSpec, submodule

from .forward_pass import Adapter, BlockPass, Owner


def merge_stage(owner: Owner, index: int, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts `(batch, prompts, width)` that flow into block `index`; at a new stage each stands for the four patches
    that the encoder merges there."""
    for next_block, paths in owner.spec.merges:
        if next_block == index:
            prompts = torch.cat([prompts] * 4, dim=-1)
            for path in paths:
                prompts = submodule(owner.encoder, path)(prompts)
    return prompts


def finish(block: nn.Module, spec: BlockSpec, here: BlockPass, adapter: Adapter) -> torch.Tensor:
    """The rest of the block for one adapter's prompts: output projection, residual, second norm and MLP, residual."""
    if here.window_outputs is None or spec.attention.out is None:
        raise RuntimeError("window prompts met no attention call in this block")
    start = 0
    for other, layout in here.prompts:
        if other is adapter:
            break
        start += here.states[other.name].shape[1] if layout.mode == "window" else 0
    entered = here.states[adapter.name]
    attended = here.window_outputs[:, start : start + entered.shape[1]]
    attention = submodule(block, spec.attention.path)
    prompts = entered + submodule(attention, spec.attention.out)(attended)
    result = prompts
    for path in spec.tail:
        result = submodule(block, path)(result)
    return prompts + result
