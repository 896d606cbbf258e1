"""What both pre-training recipes share: flags, the encoder's size, the optimizer's groups and schedule, and saving."""

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel, set_seed


@dataclass
class RecipeArguments:
    """The flags that recipes share; their defaults made the shipped weights."""

    output_dir: str = field(metadata={"help": "Folder for config.json, model.safetensors, preprocessor_config.json."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's, on matrices only."})
    held_out_font: str = field(default="DejaVuSerif-BoldItalic.ttf", metadata={"help": "Never trained on; scored."})
    seed: int = field(default=0, metadata={"help": "Of the weights, the masks and the glyph stream."})
    max_classes: int | None = field(default=None, metadata={"help": "At most this many classes, for a quick try."})


def encoder_config(**fields: Any) -> ViTConfig:
    """A ViT of 1.2 million parameters for 32-pixel images: 64 patches of 4 pixels, 6 blocks, 4 heads, width 128."""
    return ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        **fields,
    )


def sincos_positions(hidden_size: int, side: int) -> torch.Tensor:
    """Fixed two-dimensional sine-cosine positions, (1, 1 + side * side, hidden_size), zero for the class token.

    Half of the channels tell the column, half the row; arXiv:2111.06377, section 4 (A).
    """
    frequencies = 10000.0 ** -(torch.arange(hidden_size // 4) / (hidden_size // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    patches = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros(1, hidden_size), patches]).unsqueeze(0)


class Clock:
    """Seconds since it was made, by the wall and summed over the processor cores."""

    def __init__(self) -> None:
        self.wall, self.cores = time.perf_counter(), time.process_time()

    def __str__(self) -> str:
        wall, cores = time.perf_counter() - self.wall, time.process_time() - self.cores
        return f"{wall:.0f} s ({cores:.0f} core seconds)"


def begin(seed: int) -> Clock:
    """Set up logging, numerics and seed; return a running clock."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # Denormal numbers slow a CPU down tenfold
    torch.set_flush_denormal(True)
    set_seed(seed)
    return Clock()


def update(
    model: torch.nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One step of the optimizer down the clipped gradient of `loss`."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices with weight decay; biases, norms, tokens and positions without."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim >= 2 and "token" not in name and "position" not in name]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in matrix_ids]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def cosine_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then half a cosine down to zero at `steps`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def save_backbone(state_dict: dict[str, torch.Tensor], folder: Path, pretraining: str) -> None:
    """Save an encoder's weights as a bare float16 `ViTModel` folder with its image processor.

    `config.json` says float32, so that the weights are widened when they are loaded: float16 is for the disk only.
    Raises RuntimeError when the weights do not fit the encoder of `encoder_config`.
    """
    model = ViTModel(encoder_config(pretraining=pretraining), add_pooling_layer=False)
    model.load_state_dict(state_dict)
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32},
        resample=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    processor.save_pretrained(folder)
