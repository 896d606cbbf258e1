"""Trains at the highest rates of the papers' grids in several precisions: `python -m benchmarks.precision --help`.

Each run is a whole schedule on the embedded ViT and the digits. It has to end with finite weights, or to be stopped with
the reason, and then the last checkpoint has finite weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import HfArgumentParser, ViTForImageClassification, set_seed

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.embedded import embedded_path
from vpt_peft.reporting import markdown_table
from vpt_peft.tasks import get_task
from vpt_peft.training.arguments import parse_args
from vpt_peft.training.model import load_image_processor
from vpt_peft.training.resume import last_checkpoint
from vpt_peft.training.trainer import TrainingDiverged, VPTTrainer
from vpt_peft.training.trainer_inputs import start_prompts, trainer_inputs


# The highest of each grid: base rate 50 by batch / 256; 5 as it is
RATES: dict[str, dict[str, Any]] = {
    "vpt": {"recipe": "vpt_paper", "base_learning_rate": 50},
    "vpt_shallow": {"recipe": "vpt_paper", "base_learning_rate": 50},
    "gated_vpt": {"recipe": "gpt_paper", "learning_rate": 5},
}
CONFIGS = {
    "vpt": lambda: VPTConfig(num_virtual_tokens=10),
    "vpt_shallow": lambda: VPTConfig(num_virtual_tokens=10, deep=False),
    "gated_vpt": lambda: GatedVPTConfig(num_virtual_tokens=10),
}
# By name: what the frozen weights are in, and what is computed in
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "float16 autocast": (torch.float32, torch.float16),
    "bfloat16 weights, float32 prompts": (torch.bfloat16, None),
}


@dataclass
class PrecisionArguments:
    """How long the runs are, and where the results go."""

    epochs: int = field(default=10, metadata={"help": "Epochs of the whole schedule, warm-up and cosine."})
    images: int = field(default=256, metadata={"help": "Training images."})
    methods: list[str] = field(default_factory=lambda: list(RATES), metadata={"help": "Methods to train."})
    rate_factor: float = field(default=1.0, metadata={"help": "Times the highest rates, to see runs diverge."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the results."})


class AutocastTrainer(VPTTrainer):
    """Computes in `autocast`; the Trainer itself knows float16 on GPUs only."""

    autocast: torch.dtype | None = None

    def compute_loss_context_manager(self) -> Any:
        return torch.autocast("cpu", self.autocast) if self.autocast else contextlib.nullcontext()


def train(name: str, precision: str, given: PrecisionArguments, folder: Path) -> dict[str, str]:
    """Make one run; a row of the table."""
    weights, autocast = PRECISIONS[precision]
    rates = {key: value * given.rate_factor for key, value in RATES[name].items() if key != "recipe"}
    arguments = parse_args(
        {
            "method": name,
            **RATES[name],
            **rates,
            "per_device_train_batch_size": 64,
            "num_train_epochs": given.epochs,
            "max_train_samples": given.images,
            "max_eval_samples": 200,
            "init_method": "random",
            "save_total_limit": 1,
            "load_best_model_at_end": False,
            "output_dir": str(folder),
            "disable_tqdm": True,
            "use_cpu": True,
        }
    )
    task = get_task()
    splits = task.read(arguments.data)
    processor = task.prepare_processor(load_image_processor(arguments.model), arguments.data)
    rows = {key: task.rows(splits[key], processor, "none", train=False, seed=0) for key in ("train", "validation")}
    labels = task.id2label(splits["train"])
    set_seed(42)
    base = ViTForImageClassification.from_pretrained(
        embedded_path("embedded"), dtype=weights, num_labels=len(labels), ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, CONFIGS[name]())
    start_prompts(task, model, rows["train"], arguments.method, arguments.training)
    trainer = AutocastTrainer(
        method=arguments.method,
        processing_class=processor,
        **trainer_inputs(task, model, arguments.training, rows["train"], rows["validation"]),
    )
    trainer.autocast = autocast
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    row = {"method": name, "precision": precision, "rate": f"{arguments.training.learning_rate:g}"}
    row["trained in"] = ", ".join(dtypes)
    try:
        trainer.train()
        found = trainer.evaluate()
        kept = {key: p for key, p in model.named_parameters() if p.requires_grad}
        row["outcome"] = f"ended; loss {found['eval_loss']:.3g}, accuracy {found['eval_accuracy']:.3f}"
    except TrainingDiverged as error:
        checkpoint = last_checkpoint(folder)
        kept = load_file(checkpoint / "adapter_model.safetensors") if checkpoint else {}
        row["outcome"] = f"stopped: {error}; {checkpoint.name if checkpoint else 'nothing'} is kept"
    row["finite"] = str(all(bool(tensor.isfinite().all()) for tensor in kept.values()))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Make all runs; 1 where one ended or left a checkpoint with weights that are not finite."""
    (given,) = HfArgumentParser(PrecisionArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for name in given.methods:
        for precision in PRECISIONS:
            with TemporaryDirectory() as folder:
                rows.append(train(name, precision, given, Path(folder, "out")))
            print(rows[-1], file=sys.stderr, flush=True)
    if given.output:
        Path(given.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(markdown_table(rows, ["method", "precision", "trained in", "outcome", "finite"]))
    return int(any(row["finite"] != "True" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
