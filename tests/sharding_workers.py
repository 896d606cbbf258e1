"""What each of two processes does in the tests of sharded and data-parallel training."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from peft_fixtures import CONFIGS, images, randomize, vit
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh


def build(name: str) -> nn.Module:
    """A model with trained-looking prompts, the same in every process."""
    return randomize(get_peft_model(vit(torch.float32), CONFIGS[name]()), 1, trainable_only=True).train()


def loss_of(model: nn.Module, first: int, last: int) -> torch.Tensor:
    """Mean over images `first` to `last` of four, so that the mean over processes is that over all."""
    logits = model(pixel_values=images(4, torch.float32)[first:last]).logits
    return logits.square().sum(-1).mean()


def plain_gradients(name: str) -> dict[str, torch.Tensor]:
    """Gradients of the whole batch in one process."""
    model = build(name)
    loss_of(model, 0, 4).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(rank: int, names: list[str], folder: str) -> None:
    """Per configuration: gradients under FSDP2 (blocks and root) and under DDP, and FSDP2's adapter state dict."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name in names:
        model = build(name)
        for block in model.base_model.model.vit.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            model.zero_grad()
            loss_of(model, 2 * rank, 2 * rank + 2).backward()
        sharded = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        state = {key: whole(value) for key, value in get_peft_model_state_dict(model).items()}
        parallel = nn.parallel.DistributedDataParallel(build(name))
        for _ in range(2):
            parallel.zero_grad()
            loss_of(parallel, 2 * rank, 2 * rank + 2).backward()
        averaged = {n: p.grad for n, p in parallel.module.named_parameters() if p.grad is not None}
        found[name] = {"fsdp": sharded, "ddp": averaged, "state": state}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
