"""`vpt-peft convert CHECKPOINT OUTPUT_DIR [--source auto]`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Convert a checkpoint and print the folder."""
    parser = ArgumentParser(
        prog="vpt-peft convert",
        description="Convert an official ViT checkpoint to a Hugging Face folder; no code in it runs.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help=".pth, .pth.tar, .safetensors or .npz file")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument(
        "--source",
        default="auto",
        help="where the checkpoint comes from: moco_v3, mae, dino, timm or npz; default: found by its names",
    )
    parser.add_argument("--image_size", type=int, help="pixels a side, where the weights do not tell")
    parser.add_argument("--num_heads", type=int, help="attention heads, where the weights do not tell")
    parser.add_argument("--normalization", choices=("auto", "imagenet", "half"), default="auto", help="mean and std")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in output_dir")
    own = parser.parse_args(list(argv))
    from ..conversion import convert_checkpoint

    print(
        convert_checkpoint(
            own.checkpoint,
            own.output_dir,
            source=own.source,
            image_size=own.image_size,
            num_heads=own.num_heads,
            overwrite=own.overwrite,
            normalization=own.normalization,
        )
    )
    return 0
