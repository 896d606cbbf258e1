"""`vpt-peft predict ADAPTER IMAGE_OR_FOLDER ... [--format csv]`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from .options import add_adapter_options, need_training, prepare_output_file


def run(argv: Sequence[str]) -> int:
    """Print (or write) one row per image: the likeliest predictions."""
    parser = ArgumentParser(prog="vpt-peft predict", description="Predict images to a table.", allow_abbrev=False)
    add_adapter_options(parser)
    parser.add_argument("images", nargs="+", help="image files, or folders that are searched for images")
    parser.add_argument(
        "--top_k", type=int, help="predictions per image; 0: all; default: 5 classes, all boxes and masks"
    )
    parser.add_argument("--threshold", type=float, help="lowest score of a prediction; default: as the task says")
    parser.add_argument("--pictures", help="folder for PNGs of the images with the boxes or masks found in them")
    parser.add_argument(
        "--format",
        choices=("csv", "json", "coco"),
        help="default: by the ending of --output_file, else csv; coco is for boxes and masks",
    )
    parser.add_argument("--output_file", help="write the table here instead of the terminal")
    own = parser.parse_args(list(argv))
    need_training()

    from ..data.images import find_images
    from ..files import write_whole
    from ..methods.structure import base_model
    from ..reporting.predictions import as_coco, as_table
    from ..tasks import get_task
    from ..training.evaluation import predict_images
    from ..training.inference import load_adapter_model, local_folder, move_to, read_record

    prepare_output_file(own.output_file)
    paths = find_images(own.images)
    folder = local_folder(own.adapter, own.revision, own.subfolder, cache_dir=own.cache_dir)
    model, processor = load_adapter_model(folder, own.base_model, cache_dir=own.cache_dir)
    record = read_record(folder)
    task = get_task(record.get("task", get_task().pipeline_tag))
    kind = own.format or ("json" if str(own.output_file).endswith(".json") else "csv")
    if kind == "coco" and not task.finds_many:
        raise ValueError(
            f"format='coco' is for boxes and masks, not for task={task.pipeline_tag!r}; choose csv or json."
        )
    top_k = own.top_k if own.top_k is not None or task.finds_many else 5
    rows = predict_images(
        move_to(model, own.device),
        processor,
        paths,
        top_k or None,
        own.batch_size,
        record.get("augmentation", "none"),
        task,
        own.threshold,
        own.pictures,
    )
    if kind == "coco":
        table = as_coco(
            rows, {int(number): name for number, name in (base_model(model).config.id2label or {}).items()}
        )
    else:
        table = as_table(rows, kind, task.finds_many)
    if own.output_file is None:
        sys.stdout.write(table)
    else:
        write_whole(Path(own.output_file), table)
    return 0 if any(row["error"] is None for row in rows) else 2
