"""What each of two processes does in the tests of sharded and data-parallel training; started by torchrun.

    torchrun --standalone --nproc_per_node 2 sharding_workers.py WAY FOLDER

`WAY` is fsdp1, fsdp2 or ddp. Process 0 writes what was found to `FOLDER/found.pt` and adapters beside it.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from peft_fixtures import CONFIGS, images, randomize, vit
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor


NAMES = ["deep", "shallow", "gated"]
POLICIES = ["peft", "block"]
STEPS, BATCH = 3, 4
Found = dict[str, Any]


def build(name: str) -> PeftModel:
    """A model with trained-looking prompts, the same in every process."""
    return randomize(get_peft_model(vit(), CONFIGS[name]()), 1, trainable_only=True).train()  # type: ignore[return-value]


def loss_of(model: nn.Module, first: int, last: int, step: int) -> torch.Tensor:
    """Mean over images `first` to `last` of a step's batch, so that the mean over processes is that over all."""
    logits = model(pixel_values=images(BATCH, seed=step)[first:last]).logits
    return logits.square().sum(-1).mean()


def fit(model: nn.Module, first: int = 0, last: int = BATCH) -> list[float]:
    """Train on images `first` to `last` of each batch; the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, first, last, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def evaluate(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model.eval()(pixel_values=images(2, seed=9)).logits
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def halves(rank: int) -> tuple[int, int]:
    return BATCH // 2 * rank, BATCH // 2 * (rank + 1)


def describe(model: PeftModel, state: dict[str, torch.Tensor], logits: torch.Tensor, folder: Path) -> Found:
    """Save the adapter from the whole state dict; every process takes part, as PEFT asks wrapped heads for their keys."""
    model.save_pretrained(folder, state_dict=state, is_main_process=dist.get_rank() == 0)
    return {"state": state, "logits": logits, "processes": dist.get_world_size()}


def run_fsdp1(name: str, policy: str, use_orig_params: bool, folder: Path) -> Found:
    model = build(name)
    total = sum(p.numel() for p in model.parameters())
    blocks = set(model.base_model.model.vit.layers)

    def own_unit(module: nn.Module) -> bool:
        # Frozen and trainable parameters cannot share a unit where the original ones are not kept
        own = list(module.parameters(recurse=False))
        return module in blocks or (not use_orig_params and own != [] and all(p.requires_grad for p in own))

    by_block = partial(lambda_auto_wrap_policy, lambda_fn=own_unit)
    chosen = fsdp_auto_wrap_policy(model) if policy == "peft" else by_block
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=chosen, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    units = [module for module in sharded.modules() if isinstance(module, FullyShardedDataParallel)]
    held = sum(p.numel() for p in sharded.parameters())
    found: Found = {
        "units": len(units),
        "held": held,
        "total": total,
        "losses": fit(sharded, *halves(dist.get_rank())),
    }
    logits = evaluate(sharded)
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
        return found | describe(model, sharded.state_dict(), logits, folder)


def run_fsdp2(name: str, folder: Path) -> Found:
    model = build(name)
    total = sum(p.numel() for p in model.parameters())
    for block in model.base_model.model.vit.layers:
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    found: Found = {"held": held, "total": total, "losses": fit(model, *halves(dist.get_rank()))}
    logits = evaluate(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return found | describe(model, state, logits, folder)


def run_ddp(name: str, folder: Path) -> Found:
    model = build(name)
    parallel = nn.parallel.DistributedDataParallel(model)
    found: Found = {"losses": fit(parallel, *halves(dist.get_rank()))}
    return found | describe(model, model.state_dict(), evaluate(model), folder)


def cases(way: str) -> dict[str, partial]:
    """The runs of one way by name."""
    if way == "fsdp1":
        return {
            f"{name}-{policy}-{kept}": partial(run_fsdp1, name, policy, kept)
            for name in NAMES
            for policy in POLICIES
            for kept in (True, False)
        }
    return {name: partial({"fsdp2": run_fsdp2, "ddp": run_ddp}[way], name) for name in NAMES}


def main(way: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Found] = {}
    for case, run in cases(way).items():
        try:
            found[case] = run(folder / case)
        except Exception:
            found[case] = {"error": traceback.format_exc()}
        # The losses of both halves, to compare their mean with the joint batch's
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, found[case].get("losses"))
        found[case]["losses"] = gathered
        if dist.get_rank() == 0:
            # After each case: a process that crashes in a later one takes no results along
            torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
