"""The arguments of a training run: model, data, method and transformers' own, from flags or a file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..data.arguments import DataArguments
from ..fields import BIAS_PLACES
from ..methods import METHODS, PROMPT_METHODS
from ..methods.options import out_of_list
from ..tasks import get_task, task_names
from ..tasks.base import DEFAULT_TASK
from .recipes import recipe_defaults, scaled_learning_rate


_SECRETS = ("token", "hub_token")
# Neither secrets nor where this run writes belong in the record of a run
_NOT_RECORDED = ("token", "hub_token", "output_dir", "resume_from_checkpoint", "overwrite_output_dir")


@dataclass
class ModelArguments:
    """The backbone, and what it learns."""

    model_name_or_path: str = field(
        default="embedded",
        metadata={"help": "Hub id or folder of the backbone, or 'embedded' / 'embedded-mae' (in the package)."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where Hub downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data."})
    task: str = field(default=DEFAULT_TASK, metadata={"help": "What the model learns.", "choices": list(task_names())})
    decoder: str | None = field(
        default=None,
        metadata={"help": "semantic-segmentation: an encoder's head: linear, linear_4, setr_pup, upernet, dpt."},
    )

    def __post_init__(self) -> None:
        decoders = get_task(self.task).decoders
        if self.decoder is not None and self.decoder not in decoders:
            fitting = f"choose one of {', '.join(decoders)}" if decoders else "drop it"
            raise ValueError(f"decoder={self.decoder!r} is not for task={self.task!r}; {fitting}.")


@dataclass
class MethodArguments:
    """How the backbone is adapted, and what differs from plain transformers training."""

    method: str = field(
        default="vpt",
        metadata={"help": "Prompts (vpt, vpt_shallow, gated_vpt) or a baseline.", "choices": list(METHODS)},
    )
    recipe: Literal["default", "vpt_paper", "gpt_paper"] = field(
        default="default", metadata={"help": "Preset of optimizer, schedule and rates; flags override it."}
    )

    num_virtual_tokens: list[int] = field(
        default_factory=lambda: [10], metadata={"help": "Prompts per prompted block; several numbers: one for each."}
    )
    prompt_rank: int | None = field(
        default=None, metadata={"help": "Prompts are a product of two matrices of this rank; default: whole."}
    )
    bias: list[str] | None = field(
        default=None,
        metadata={
            "help": "Biases that train with the prompts: all, or some of value, output, mlp, norm.",
            "choices": ["none", "all", *BIAS_PLACES],
        },
    )
    prompt_dropout: float | None = field(default=None, metadata={"help": "Dropout on prompts, drawn per image."})
    projection_dim: int | None = field(default=None, metadata={"help": "Width the prompts live in before projection."})
    pooling: Literal["class", "image", "prompt", "image_prompt"] | None = field(
        default=None, metadata={"help": "What the head reads; default: what it reads without prompts."}
    )
    pool_before_norm: bool | None = field(default=None, metadata={"help": "Mean before the final norm (MAE)."})
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Blocks with prompts of their own, 0-based."}
    )
    prompt_location: Literal["prepend", "add", "add_shared", "prepend_pixel", "pad", "channel"] | None = field(
        default=None, metadata={"help": "Where the prompts go; default: prepend."}
    )
    token_type: Literal["patch", "class"] | None = field(
        default=None, metadata={"help": "Prompts as extra patches or as extra class tokens; default: patch."}
    )
    share_prompts: bool | None = field(default=None, metadata={"help": "One set of prompts serves all blocks."})
    gate: Literal["scalar", "elementwise", "none"] | None = field(
        default=None, metadata={"help": "gated_vpt: the paper's scalar per block, a linear-sigmoid gate, or none."}
    )
    gate_init: float | None = field(default=None, metadata={"help": "gated_vpt: the gate logit starts at minus this."})
    attention_temperature: bool | None = field(
        default=None, metadata={"help": "gated_vpt: learn one attention temperature per block."}
    )
    init_method: (
        Literal["random", "tokens", "class_token_final", "class_token_layerwise", "mean_pool", "kmeans", "vipamin"]
        | None
    ) = field(
        default=None,
        metadata={"help": "Initial prompts: random, or features of training images; default: as the recipe says."},
    )

    partial_blocks: int = field(default=1, metadata={"help": "partial: last blocks that train."})
    mlp_layers: int = field(default=3, metadata={"help": "mlp: linear layers of the head."})
    adapter_reduction: int = field(default=8, metadata={"help": "adapter: hidden size over bottleneck width."})
    lora_r: int = field(default=8, metadata={"help": "lora: rank."})
    solver: Literal["lbfgs", "optimizer"] | None = field(
        default=None,
        metadata={
            "help": "linear: fit the head on cached features to the optimum by L-BFGS, with the L2 penalty that is best on "
            "validation, or take steps of the optimizer; default: lbfgs unless rate, schedule, decay or length are given."
        },
    )

    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate for 256 images a step, scaled to the actual number (VPT)."}
    )
    prompt_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of prompts, gates and LoRA matrices; default: learning_rate."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of the head; default: learning_rate."}
    )
    prompt_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the prompts; default: weight_decay."}
    )
    head_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the head; default: weight_decay."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement."}
    )
    cache_features: bool = field(
        default=True,
        metadata={"help": "Compute features below the first trained block once and reuse them where that is exact."},
    )
    feature_cache_dir: str | None = field(default=None, metadata={"help": "Folder of cached features."})
    feature_cache_limit_gb: float = field(
        default=10.0, metadata={"help": "Most gigabytes (10^9) in that folder; the oldest features go."}
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}.")
        self.num_virtual_tokens, self.bias = (out_of_list(each) for each in (self.num_virtual_tokens, self.bias))
        for name in ("num_virtual_tokens", "partial_blocks", "mlp_layers", "adapter_reduction", "lora_r"):
            given = getattr(self, name)
            if min(given if isinstance(given, list) else [given], default=0) < 1:
                raise ValueError(f"{name}={given} must be at least 1.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience={self.early_stopping_patience} must be at least 1.")
        for name in ("base_learning_rate", "prompt_learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative.")
        if not 0 < self.feature_cache_limit_gb < math.inf:
            raise ValueError(f"feature_cache_limit_gb={self.feature_cache_limit_gb} must be a number above 0.")
        self._refuse_foreign_fields()

    def _refuse_foreign_fields(self) -> None:
        """Refuse fields that the method does not read; ignoring them would hide a mistake."""
        for name, methods in _ONLY_FOR.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with method={self.method!r}; drop it.")


PROMPT_FIELDS = (
    "prompt_rank",
    "bias",
    "prompt_dropout",
    "projection_dim",
    "pooling",
    "pool_before_norm",
    "layers_to_transform",
    "prompt_location",
    "token_type",
    "share_prompts",
    "init_method",
)
GATE_FIELDS = ("gate", "gate_init", "attention_temperature")
_ONLY_FOR = dict.fromkeys(PROMPT_FIELDS, PROMPT_METHODS) | dict.fromkeys(GATE_FIELDS, ("gated_vpt",))
_ONLY_FOR["solver"] = ("linear",)


@dataclass
class VPTTrainingArguments(TrainingArguments):
    """transformers' training arguments with defaults for prompts: evaluated and saved each epoch, the best is kept."""

    output_dir: str | None = field(default="vpt-output", metadata={"help": "Where adapter, results and card go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of an earlier run in output_dir."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per device in evaluation."})
    eval_strategy: IntervalStrategy | str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: SaveStrategy | str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    logging_strategy: IntervalStrategy | str = field(default="epoch", metadata={"help": "When to log the loss."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the best is among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Save the weights of the best evaluation."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "A metric of the task, or loss; default: the task's own choice."}
    )
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Add up metrics batch by batch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Images are transformed when read."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "tensorboard, trackio, wandb, ... or none."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "With push_to_hub: end pushes the finished adapter."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin host memory; useful on GPUs only."}
    )
    # The trainer itself stops at a loss that is not finite; this filter would hide it.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN losses out of the log."})

    def __post_init__(self) -> None:
        self._check_values()
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


class FlagParser(HfArgumentParser):
    """A parser whose errors are a `ValueError` of one line; argparse would print hundreds of lines of usage first."""

    def __init__(self, classes: Any, **kwargs: Any) -> None:
        super().__init__(classes, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def without_defaults(self) -> FlagParser:
        """Let parsing give only what is on the command line, so that a recipe or an earlier run can fill the rest."""
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
        return self


def parse_args(argv: Sequence[str] | Mapping[str, Any]) -> Arguments:
    """Parse flags, or a .json/.yaml file followed by flags that override it, or a mapping of the same names.

    The recipe and the task fill in what is not given.

    Raises:
        ValueError: an unknown flag, a value of the wrong type or outside its range, an unreadable file.
        SystemExit: `--help` was asked for.
    """
    tokens = as_tokens(argv)
    parser = train_parser("vpt-peft train")
    if "-h" in tokens or "--help" in tokens:
        parser.print_help()
        raise SystemExit(0)
    if not isinstance(argv, Mapping):
        refuse_secrets(argv)
    given = vars(parser.without_defaults().parse_args(tokens))
    given |= {name: out_of_list(given[name]) for name in ("num_virtual_tokens", "bias") if name in given}
    given |= recipe_defaults(given)
    if given.get("train_on_validation"):
        # Nothing is left to evaluate on while training
        given = {"eval_strategy": "no", "load_best_model_at_end": False, **given}
        if given["eval_strategy"] != "no" or "early_stopping_patience" in given:
            raise ValueError(
                "train_on_validation=True leaves nothing to evaluate on while training; drop eval_strategy and "
                "early_stopping_patience."
            )
    try:
        model, data, method, training = parser.parse_dict(given | _task_defaults(given))
    except TypeError as error:
        raise ValueError(f"{error} (see vpt-peft train --help)") from error
    if method.base_learning_rate is not None and "learning_rate" not in given:
        images = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        training.learning_rate = scaled_learning_rate(method.base_learning_rate, images)
    return Arguments(model, data, method, training, given)


def refuse_secrets(argv: Sequence[str]) -> None:
    """Refuse tokens on the command line, which every list of processes shows.

    Raises:
        ValueError: there is one; it is not repeated.
    """
    for name in _SECRETS:
        if any(flag == f"--{name}" or flag.startswith(f"--{name}=") for flag in argv):
            raise ValueError(
                f"--{name}: other users of this machine can read a token on the command line; log in once (hf auth "
                "login), or set HF_TOKEN in the environment. Take the token back if it was a real one."
            )


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
