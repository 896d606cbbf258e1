"""The short help of `vpt-peft train`: the flags that matter, with the values that a run would use."""

from __future__ import annotations

import textwrap
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..data.arguments import DataArguments
from ..methods.registry import METHODS
from ..training.flags import MethodArguments, ModelArguments, TrainingFlags
from ..training.recipes import RECIPES, resolve


_CLASSES = (ModelArguments, DataArguments, MethodArguments, TrainingFlags)
# Of the flags that only some methods read, those shown here; the others change what the papers' ablations change
_OF_METHODS = (
    "num_virtual_tokens",
    "init_method",
    "prompt_dropout",
    "bias",
    "prompt_rank",
    "gate",
    "gate_init",
    "attention_temperature",
    "lora_r",
    "partial_blocks",
    "mlp_layers",
    "adapter_reduction",
    "solver",
)
_GROUPS = {
    "Model, data and result": (
        "model_name_or_path",
        "task",
        "decoder",
        "dataset_name",
        "image_column_name",
        "label_column_name",
        "augmentation",
        "max_train_samples",
        "output_dir",
        "overwrite_output_dir",
    ),
    "Method": ("method", "recipe", *_OF_METHODS),
    "Recipe": (
        "learning_rate",
        "base_learning_rate",
        "prompt_learning_rate",
        "head_learning_rate",
        "weight_decay",
        "prompt_weight_decay",
        "num_train_epochs",
        "early_stopping_patience",
        "per_device_train_batch_size",
        "optim",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "seed",
    ),
    "Running": (
        "cache_features",
        "bf16",
        "gradient_checkpointing",
        "gradient_accumulation_steps",
        "dataloader_num_workers",
        "resume_from_checkpoint",
        "disable_tqdm",
        "report_to",
        "push_to_hub",
    ),
}
_WIDTH, _COLUMN = 110, 38
HELP = {"-h", "--help"}


def short_help(prog: str, argv: Sequence[str], own: ArgumentParser | None = None) -> str:
    """Return the help, with the values for the method, task and recipe among the flags.

    Args:
        prog: the command, as in "vpt-peft train".
        argv: what stands beside `--help`.
        own: holds further options of the command, which are shown first.
    """
    given = _chosen(argv)
    values = shown_values(given)
    known = {item.name: (item, hint) for item, hint in _fields()}
    lines = [f"usage: {prog} [FILE.yaml | FILE.json] [--flag value ...]", ""]
    if own is not None:
        own.usage = lines[0].removeprefix("usage: ")
        lines = [own.format_help().rstrip(), ""]
    chosen = " ".join(f"--{name} {values[name]}" for name in ("method", "task", "recipe"))
    lines += textwrap.wrap(
        f"Each flag stands with the value that a run with {chosen} uses; give another method, task or recipe beside "
        "--help for its values. A file holds flags by name"
        + ("" if own else "; --write_config FILE writes one that holds these values and stops")
        + ". --help-all shows all other flags, those of transformers among them.",
        _WIDTH,
    )
    for title, names in _GROUPS.items():
        unused = " (for --solver optimizer)" if title == "Recipe" and values.get("solver") == "lbfgs" else ""
        lines += ["", f"{title}{unused}:"]
        for name in names:
            if name in values:
                lines += _entry(*known[name], values[name])
    return "\n".join(lines) + "\n"


def shown_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the flags that the help shows for a method, task and recipe; None where none is set."""
    resolved = resolve(given)
    flags = METHODS[resolved.get("method", "vpt")].flags
    defaults = {item.name: None if item.default is MISSING else item.default for item, _ in _fields()}
    of_some = {name for method in METHODS.values() for name in method.flags}
    names = [name for group in _GROUPS.values() for name in group if name in flags or name not in of_some]
    values = {name: resolved.get(name, defaults[name]) for name in names}
    if resolved.get("task") != "semantic-segmentation":
        del values["decoder"]
    if values["base_learning_rate"] is None:
        del values["base_learning_rate"]
    elif "learning_rate" not in resolved:
        # In proportion to the images of a step, whose number depends on the machine
        del values["learning_rate"]
    return values


def data_help(title: str) -> str:
    """Return the help of the data flags where they override a training's."""
    lines = [f"{title}:"]
    hints = get_type_hints(DataArguments)
    for item in fields(DataArguments):
        lines += _entry(item, hints[item.name], None)
    return "\n".join(lines) + "\n"


def _fields() -> list[tuple[Field, Any]]:
    return [(item, get_type_hints(cls)[item.name]) for cls in _CLASSES for item in fields(cls)]


def _chosen(argv: Sequence[str]) -> dict[str, Any]:
    """The method, task and recipe that are known among the flags; help does not refuse what a run would."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method", nargs="+")
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--recipe", nargs="+")
    known = {"method": METHODS, "recipe": RECIPES}
    found = {name: values[0] for name, values in vars(parser.parse_known_args(argv)[0]).items() if values}
    for name, choices in known.items():
        if name in found and found[name] not in choices:
            raise ValueError(f"--{name}: {found[name]!r} is unknown; choose one of {', '.join(choices)}.")
    return found


def _entry(item: Field, hint: Any, value: Any) -> list[str]:
    choices = item.metadata.get("choices")
    for option in (hint, *get_args(hint)):
        if get_origin(option) is Literal:
            choices = get_args(option)
    text = item.metadata["help"]
    if choices and not all(str(choice) in text for choice in choices):
        text += f" One of {', '.join(map(str, choices))}."
    flag = f"  --{item.name} {_as_typed(value)}"
    lines = textwrap.wrap(text, _WIDTH - _COLUMN)
    first = [flag] if len(flag) >= _COLUMN else []
    start = "" if first else flag
    return first + [f"{start if not number else '':<{_COLUMN}}{line}" for number, line in enumerate(lines)]


def _as_typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "..." if value is None else str(value)
