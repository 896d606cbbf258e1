"""`vpt-peft export ADAPTER OUTPUT [--format onnx]`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Export an adapter with its backbone and head, and print the file."""
    parser = ArgumentParser(
        prog="vpt-peft export",
        description="Export an adapter with its backbone and head to one file that runs without vpt_peft.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("output", help="file to write, or a folder for model.onnx or model.pt2")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="ONNX, or torch.export")
    parser.add_argument("--image_size", type=int, nargs="+", help="pixels a side, or height and width")
    parser.add_argument("--opset", type=int, help="ONNX opset; default: the exporter's")
    parser.add_argument("--no_check", action="store_true", help="skip the comparison with PyTorch")
    parser.add_argument("--base_model", help="backbone to use instead of the one it was trained on")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument("--subfolder", help="folder inside the Hub repository")
    parser.add_argument("--cache_dir", help="where Hub downloads are kept")
    own = parser.parse_args(list(argv))

    from ..export import check_target, export_model

    sides = own.image_size
    size = sides[0] if sides is not None and len(sides) == 1 else sides
    check_target(own.output, own.format, size, own.opset, not own.no_check)
    need_training()
    from ..training.inference import load_adapter_model, local_folder, read_record

    folder = local_folder(own.adapter, own.revision, own.subfolder, cache_dir=own.cache_dir)
    model, processor = load_adapter_model(folder, own.base_model, cache_dir=own.cache_dir)
    augmentation = read_record(folder).get("augmentation", "none")
    print(export_model(model, own.output, own.format, size, own.opset, not own.no_check, processor, augmentation))
    return 0
