"""What each of two processes does in the tests of training in several; started by torchrun.

    torchrun --standalone --nproc_per_node 2 training_workers.py CASES FOUND

`CASES` is a JSON file of flags by name of the run. Process 0 writes what was found to `FOUND`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from vpt_peft.training.arguments import parse_args
from vpt_peft.training.train import train
from vpt_peft.training.trainer import VPTTrainer


HERE = Path(__file__).parent


def watch_steps() -> dict[str, Any]:
    """Return a dictionary that holds, once a step was made, how the model was wrapped."""
    seen: dict[str, Any] = {}
    step = VPTTrainer.training_step

    def watched(self: VPTTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen["wrapper"] = type(model).__name__
        return step(self, model, *args, **kwargs)

    VPTTrainer.training_step = watched  # type: ignore[method-assign]
    return seen


def main(cases: str, found_at: str) -> None:
    torch.set_num_threads(1)
    seen, found = watch_steps(), {}
    for name, given in json.loads(Path(cases).read_text()).items():
        seen.clear()
        try:
            found[name] = {
                "metrics": train(parse_args({**given, "use_cpu": True})),
                **seen,
                "processes": dist.get_world_size(),
            }
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        AcceleratorState._reset_state()
        if dist.get_rank() == 0:
            Path(found_at).write_text(json.dumps(found))


def launch(cases: dict[str, Any], folder: Path, seconds: int = 500) -> dict[str, Any]:
    """Train `cases` in two processes; what process 0 found by case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [__file__, str(folder / "cases.json"), str(folder / "found.json")]
    done = subprocess.run([*torchrun, *worker], capture_output=True, text=True, env=environment, timeout=seconds)
    assert (folder / "found.json").is_file(), done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
