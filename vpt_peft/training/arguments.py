"""The arguments of a training run: model, data, method and transformers' own, from flags or a file."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..data.arguments import DataArguments
from ..files import write_whole
from ..methods.options import out_of_list
from ..tasks import get_task
from ..tasks.base import DEFAULT_TASK
from ..tasks.guess import guess_task
from .flags import MethodArguments, ModelArguments, TrainingFlags
from .recipes import group_rates, resolve, scaled_learning_rate


logger = logging.getLogger(__name__)

# Neither secrets nor where this run writes belong in the record of a run
_NOT_RECORDED = ("token", "hub_token", "output_dir", "resume_from_checkpoint", "overwrite_output_dir")


@dataclass
class VPTTrainingArguments(TrainingFlags, TrainingArguments):  # type: ignore[misc]
    """transformers' training arguments with the defaults of `TrainingFlags` and some more."""

    save_strategy: SaveStrategy | str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    logging_strategy: IntervalStrategy | str = field(default="epoch", metadata={"help": "When to log the loss."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the best is among them."})
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Add up metrics batch by batch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Images are transformed when read."})
    hub_strategy: str = field(default="end", metadata={"help": "With push_to_hub: end pushes the finished adapter."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin host memory; useful on GPUs only."}
    )
    # The trainer itself stops at a loss that is not finite; this filter would hide it.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN losses out of the log."})

    def __post_init__(self) -> None:
        self._check_values()
        if self.gradient_checkpointing and getattr(self, "activation_checkpointing", True) is None:
            # Where transformers knows both names, it deprecates the old one
            self.activation_checkpointing = True
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{error.doc!r} is not valid JSON ({error}); flags such as lr_scheduler_kwargs and accelerator_config "
                'take a mapping, as in {"num_cycles": 2}.'
            ) from error
        missing = set(self.report_to) - set(get_available_reporting_integrations()) if self.report_to else None
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(
                f"report_to={names!r} needs a package that is not installed; pip install it, or use 'none'."
            )

    def __getstate__(self) -> dict[str, Any]:
        # Checkpoints hold the arguments, and may be uploaded
        return {**self.__dict__, "hub_token": None}

    def _check_values(self) -> None:
        """Refuse what transformers would find out after minutes of work, or never."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be above 0; or give max_steps.")
        # `accelerate launch --use_fsdp` says it by the environment
        if self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
            raise ValueError(
                "fsdp: vpt-peft train does not shard, as its checkpoints could not be resumed. Leave out --fsdp (and "
                "accelerate's --use_fsdp): the same command on several processes trains by DDP, with the same weights. "
                "For a backbone that one GPU cannot hold, wrap the PEFT model by torch's FSDP in a loop of yours "
                "(docs/how-to/several-gpus.md)."
            )
        modes = list(torch._inductor.list_mode_options())
        if self.torch_compile_mode is not None and self.torch_compile_mode not in modes:
            raise ValueError(f"torch_compile_mode={self.torch_compile_mode!r} must be one of {', '.join(modes)}.")
        if self.optim_args and not all("=" in part for part in self.optim_args.split(",")):
            raise ValueError(f"optim_args={self.optim_args!r} must look like momentum=0.9,nesterov=true.")


class Arguments(NamedTuple):
    """The parsed arguments of a run, and `given`: the flags of the user and the recipe as plain values."""

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    training: VPTTrainingArguments
    given: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what `parse_args` needs to repeat the run, without tokens and output folder."""
        return {name: value for name, value in self.given.items() if name not in _NOT_RECORDED}

    def resolved(self) -> dict[str, Any]:
        """Return `subject` and `record` with the rates and the metric that were worked out, as plain values."""
        worked_out = {
            "learning_rate": self.training.learning_rate,
            "prompt_learning_rate": self.method.prompt_learning_rate,
            "head_learning_rate": self.method.head_learning_rate,
            "metric_for_best_model": self.training.metric_for_best_model,
        }
        known = {name: value for name, value in worked_out.items() if value is not None}
        return {**self.subject(), **self.record(), **known}

    def subject(self) -> dict[str, Any]:
        """Return what learns what, and how."""
        return {
            "model_name_or_path": self.model.model_name_or_path,
            "task": self.model.task,
            "dataset_name": self.data.dataset_name,
            "method": self.method.method,
            "recipe": self.method.recipe,
        }


class FlagParser(HfArgumentParser):
    """A parser whose errors are a `ValueError` of one line; argparse would print hundreds of lines of usage first."""

    def __init__(self, classes: Any, **kwargs: Any) -> None:
        super().__init__(classes, allow_abbrev=False, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                # A flag without a default is on where it is named, as the others are
                action.nargs, action.const = "?", True

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def without_defaults(self) -> FlagParser:
        """Let parsing give only what is on the command line, so that a recipe or an earlier run can fill the rest."""
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
        return self


def parse_args(argv: Sequence[str] | Mapping[str, Any], find_task: bool = False) -> Arguments:
    """Parse flags, or a .json/.yaml file followed by flags that override it, or a mapping of the same names.

    The recipe and the task fill in what is not given.

    Args:
        argv: the flags.
        find_task: where no task is given, look at the data for it.

    Raises:
        DataError: the data can be for several tasks.
        ValueError: an unknown flag, a value of the wrong type or outside its range, an unreadable file.
    """
    tokens = as_tokens(argv)
    parser = train_parser("vpt-peft train")
    given = vars(parser.without_defaults().parse_args(tokens))
    if find_task:
        given = with_task(given)
    given = resolve(
        given | {name: out_of_list(given[name]) for name in ("num_virtual_tokens", "bias") if name in given}
    )
    try:
        model, data, method, training = parser.parse_dict(given | _task_defaults(given))
    except TypeError as error:
        raise ValueError(f"{error} (see vpt-peft train --help)") from error
    if method.base_learning_rate is not None and "learning_rate" not in given:
        images = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        training.learning_rate = scaled_learning_rate(method.base_learning_rate, images)
        for name, rate in group_rates(given, training.learning_rate).items():
            setattr(method, name, rate)
    return Arguments(model, data, method, training, given)


def with_task(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags with the task that the data is for, where it is not given and not the default.

    Raises:
        DataError: the data can be for several tasks.
    """
    if "task" in given or "dataset_name" not in given:
        return dict(given)
    found = guess_task(from_record(DataArguments, given), given.get("token"), given.get("cache_dir"))
    if found == DEFAULT_TASK:
        return dict(given)
    logger.info("The task is %s, by the data.", found)
    return {**given, "task": found}


def _task_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the task says about targets and metrics.

    Raises:
        ValueError: `metric_for_best_model` is not a metric of the task.
    """
    task = get_task(given.get("task", DEFAULT_TASK))
    directions = {metric.name: metric.higher_is_better for metric in task.metrics} | {"loss": False}
    wanted = given.get("metric_for_best_model", task.best_metric)
    name = str(wanted).removeprefix("eval_")
    if name not in directions:
        raise ValueError(f"metric_for_best_model={wanted!r} is not measured; choose one of {', '.join(directions)}.")
    return {
        "metric_for_best_model": name,
        "greater_is_better": directions[name],
        "label_names": given.get("label_names", list(task.label_names)),
    }


def train_parser(prog: str) -> FlagParser:
    """Return the parser of every flag of a training run."""
    return FlagParser((ModelArguments, DataArguments, MethodArguments, VPTTrainingArguments), prog=prog)


def as_tokens(argv: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return the flags of a command line, of a .json/.yaml file that comes first in it, or of a mapping."""
    if isinstance(argv, Mapping):
        return _as_flags(argv)
    if argv and Path(argv[0]).suffix in (".json", ".yaml", ".yml"):
        return [*_as_flags(_read_file(Path(argv[0]))), *argv[1:]]
    return list(argv)


def from_record(dataclass_type: type, record: Mapping[str, Any]) -> Any:
    """Build one of the argument dataclasses from a run's record, ignoring the other classes' values."""
    names = {item.name for item in fields(dataclass_type)}
    return dataclass_type(**{name: value for name, value in record.items() if name in names})


def write_arguments(arguments: Arguments, path: Path) -> Path:
    """Write the flags of a run, with what the recipe fills in, as a .yaml or .json file that `parse_args` takes.

    Raises:
        ValueError: the file has another ending.
    """
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"write_config={str(path)!r} must end in .yaml or .json.")
    values = {**arguments.subject(), **arguments.record(), "output_dir": arguments.training.output_dir}
    text = json.dumps(values, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:]}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one mapping of flag names to values, not {type(values).__name__}.")
    return values


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return values as flags, so that files get the types and checks of the command line: YAML reads 1e-3 as a string."""
    tokens: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list | tuple):
            tokens += [f"--{name}", *map(str, value)]
        else:
            tokens.append(f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return tokens
