"""`vpt-peft evaluate ADAPTER [--split test] [data flags]`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from .options import add_adapter_options, hide_data_bars, need_training, prepare_output_file
from .train_help import HELP, data_help


PROG = "vpt-peft evaluate"
DESCRIPTION = "Evaluate an adapter on the data it was trained on; data flags override the training ones."


def run(argv: Sequence[str]) -> int:
    """Evaluate on the data the adapter was trained on, or on other data; print the metrics as JSON."""
    if HELP & set(argv):
        own_parser = ArgumentParser(prog=PROG, description=DESCRIPTION, add_help=False)
        _add_options(own_parser)
        print(f"{own_parser.format_help()}\n{data_help('data, by default as in training')}", end="")
        return 0
    need_training()
    from ..data.arguments import DataArguments
    from ..files import write_json
    from ..tasks import get_task
    from ..training.arguments import FlagParser, from_record
    from ..training.evaluation import evaluate_model
    from ..training.inference import load_adapter_model, local_folder, move_to, read_record

    parser = FlagParser(DataArguments, prog=PROG, description=DESCRIPTION).without_defaults()
    _add_options(parser)
    own = parser.parse_args(list(argv))

    prepare_output_file(own.output_file)
    folder = local_folder(own.adapter, own.revision, own.subfolder, cache_dir=own.cache_dir)
    record = read_record(folder)
    data = from_record(DataArguments, {**record, **vars(own)})
    hide_data_bars(data.dataset_name)
    task = get_task(record.get("task", get_task().pipeline_tag))
    model, processor = load_adapter_model(folder, own.base_model, cache_dir=own.cache_dir)
    metrics = evaluate_model(move_to(model, own.device), processor, data, own.split, own.batch_size, task=task)
    if own.output_file is not None:
        write_json(Path(own.output_file), metrics)
    json.dump(metrics, sys.stdout, indent=2)
    print()
    return 0


def _add_options(parser: ArgumentParser) -> None:
    add_adapter_options(parser)
    parser.add_argument(
        "--split",
        help="train, validation, test, or any split of the data by its own name; default: test, else validation",
    )
    parser.add_argument("--output_file", help="also write the metrics to this .json file")
