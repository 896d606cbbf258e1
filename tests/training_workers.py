"""What each of two processes does in the tests of training in several; started by torchrun.

    torchrun --standalone --nproc_per_node 2 training_workers.py WAY CASES FOUND

`WAY` is ddp, fsdp1 or fsdp2; `CASES` a JSON file of flags by name of the run. Process 0 writes what was found to `FOUND`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from vpt_peft.training.arguments import parse_args
from vpt_peft.training.train import train
from vpt_peft.training.trainer import VPTTrainer


FSDP = {
    "fsdp": "full_shard",
    # Weights are alike in all processes anyway; handing them out needs GPUs
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["ViTLayer"], "sync_module_states": False},
}


def allow_fsdp_on_cpu() -> None:
    """accelerate knows FSDP on accelerators only; torch has it on CPUs too."""
    begin = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        # FSDP1 compares "cpu" with accelerate's "cpu:0"
        PartialState(cpu=True).device = torch.device("cpu")
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]


def watch_shards() -> dict[str, Any]:
    """Return a dictionary that holds, once a step was made, how the model was wrapped and how much is held here."""
    seen: dict[str, Any] = {}
    step = VPTTrainer.training_step

    def watched(self: VPTTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        seen["held"] = sum(p.numel() for p in local)
        seen["units"] = sum(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        seen["wrapper"] = type(model).__name__
        seen["rates"] = {group["name"]: group["lr"] for group in self.optimizer.param_groups if "name" in group}
        return step(self, model, *args, **kwargs)

    VPTTrainer.training_step = watched  # type: ignore[method-assign]
    return seen


def main(way: str, cases: str, found_at: str) -> None:
    torch.set_num_threads(1)
    flags = {"use_cpu": True}
    if way != "ddp":
        allow_fsdp_on_cpu()
        flags |= {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], "version": int(way[-1])}}
    seen, found = watch_shards(), {}
    for name, given in json.loads(Path(cases).read_text()).items():
        seen.clear()
        try:
            found[name] = {
                "metrics": train(parse_args({**given, **flags})),
                **seen,
                "processes": dist.get_world_size(),
            }
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        AcceleratorState._reset_state()
        if dist.get_rank() == 0:
            Path(found_at).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
