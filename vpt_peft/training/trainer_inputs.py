"""What a Trainer gets, for the command and for anybody's own Trainer alike."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..heads import trained_modules
from ..initialization import initialize_prompts
from ..methods.structure import Classifier, base_model, find_head
from ..tasks import Task, get_task
from ..tasks.base import DEFAULT_TASK
from ..tuners import GatedVPTConfig, VPTConfig
from .arguments import MethodArguments, VPTTrainingArguments, parse_args
from .optim import make_optimizer
from .probe import start_as_probe
from .trainer import FiniteValues


# A uniform sample of so many images starts prompts as well as all of a large data set would
_START_IMAGES = 1024
_METHOD_FLAGS = (
    "recipe",
    "init_method",
    "head_init",
    "base_learning_rate",
    "prompt_learning_rate",
    "head_learning_rate",
    "prompt_weight_decay",
    "head_weight_decay",
)


def training_recipe(
    model: PeftModel,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    task: str = DEFAULT_TASK,
    start: bool = True,
    **flags: Any,
) -> dict[str, Any]:
    """Make a model with prompts (or LoRA) ready to train, and return the arguments of a `transformers.Trainer`.

    The recipe is that of `vpt-peft train` for the method: prompts and head have learning rates and weight decays of
    their own, the rate warms up and falls along a cosine, prompts start as tokens of training images, a new head starts
    at zero, and with an `eval_dataset` the best epoch is kept.

        trainer = Trainer(**training_recipe(model, data["train"], data["test"], output_dir="out"))

    The result is a plain dictionary: change or add what you like before you pass it on. FSDP, which shards the
    model before there is an optimizer, is not supported.

    Args:
        model (`PeftModel`): with one active adapter. Its prompts and its head are changed in place.
        train_dataset (`torch.utils.data.Dataset` or `datasets.Dataset`): rows as the model takes them, for images with
            labels `{"pixel_values": (3, height, width), "labels": int}`.
        eval_dataset (*optional*): likewise.
        task (`str`): pipeline tag of what the model does; gives collator and metrics.
        start (`bool`): whether prompts and head are set to the recipe's start; False leaves them as they are, to train
            on. A head whose output bias is zero throughout counts as new.
        flags: fields of `transformers.TrainingArguments`, and `recipe`, `init_method`, `head_init`,
            `base_learning_rate`, `prompt_learning_rate`, `head_learning_rate`, `prompt_weight_decay`, `head_weight_decay` of
            `vpt-peft train`. What is left out is as the recipe says.

    Returns:
        `{"model", "args", "train_dataset", "eval_dataset", "data_collator", "compute_metrics", "callbacks",
        "optimizers"}`.

    Raises:
        TypeError: the model is no `PeftModel`, or a flag is unknown.
        ValueError: several adapters are active or there is no recipe for their method, a flag has a bad value, or
            boxes or masks are to be evaluated in several processes.
    """
    config = _active_config(model)
    known = {item.name for item in fields(VPTTrainingArguments)} | set(_METHOD_FLAGS)
    unknown = sorted(set(flags) - known)
    if unknown:
        raise TypeError(
            f"training_recipe() got {', '.join(unknown)}; it takes fields of TrainingArguments and "
            f"{', '.join(_METHOD_FLAGS)}. What the model is made of stands in its configuration, {type(config).__name__}."
        )
    if len(train_dataset) == 0:
        raise ValueError("train_dataset is empty.")
    given = {"task": task, "method": _method_of(config), **flags}
    if isinstance(config, VPTConfig) and not _starts_from_tokens(config):
        given.setdefault("init_method", "random")
    if eval_dataset is None:
        given = {"eval_strategy": "no", "load_best_model_at_end": False, **given}
    arguments = parse_args(given)
    if eval_dataset is not None and arguments.training.world_size > 1:
        _check_gathered(get_task(task), eval_dataset)
    if start:
        start_prompts(get_task(task), model, train_dataset, arguments.method, arguments.training)
        for wrapper in trained_modules(model):
            _start_at_zero(wrapper.modules_to_save[wrapper.active_adapters[0]])
        start_head(get_task(task), model, train_dataset, arguments.method, arguments.training)
    return {
        **trainer_inputs(get_task(task), model, arguments.training, train_dataset, eval_dataset),
        "callbacks": [FiniteValues()],
        "optimizers": (make_optimizer(model, arguments.method, arguments.training), None),
    }


def trainer_inputs(
    task: Task, model: Classifier, training: VPTTrainingArguments, train_dataset: Any, eval_dataset: Any
) -> dict[str, Any]:
    """Return model, arguments, data, collator and metrics by the names that a Trainer gives them."""
    return {
        "model": model,
        "args": training,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "data_collator": task.collate,
        "compute_metrics": task.compute_metrics(),
        "preprocess_logits_for_metrics": partial(task.measurable, base_model(model)),
    }


def start_prompts(
    task: Task, model: Classifier, rows: Any, method: MethodArguments, training: VPTTrainingArguments
) -> None:
    """Start prompts from features of training images, where the recipe does so.

    Args:
        task: makes batches of `rows`.
        model: its prompts are changed in place; it moves to the device of `training`.
        rows: the training images as model input.
        method: says how they start.
        training: gives batch size, device and seed.
    """
    if method.init_method in (None, "random"):
        return
    model.to(training.device)  # type: ignore[arg-type]
    name = model.active_adapters[0] if isinstance(model, PeftModel) else "default"
    initialize_prompts(
        model,
        _start_batches(task, rows, training),
        method=str(method.init_method),
        adapter_name=name,
        seed=training.seed,
    )


def start_head(
    task: Task, model: Classifier, rows: Any, method: MethodArguments, training: VPTTrainingArguments
) -> None:
    """Start the head as a linear probe, where the recipe does so; takes what `start_prompts` takes.

    Raises:
        ValueError: the model has no linear head for classes of whole images.
    """
    if method.head_init in (None, "zero"):
        return
    linears = _trained_linears(model) if task.pipeline_tag == DEFAULT_TASK else []
    if not linears:
        raise ValueError(
            f"head_init='probe' is for a linear head and task={DEFAULT_TASK!r}, not for task={task.pipeline_tag!r} on "
            f"{type(base_model(model)).__name__}; use 'zero'."
        )
    model.to(training.device)  # type: ignore[arg-type]
    start_as_probe(model, linears[-1], _start_batches(task, rows, training), training.seed)


def _trained_linears(model: Classifier) -> list[nn.Linear]:
    """The linear layers of the head that train, in order; the last one is the output layer."""
    heads = trained_modules(model) if isinstance(model, PeftModel) else find_head(model).values()
    modules = (module for head in heads for module in head.modules())
    return [module for module in modules if isinstance(module, nn.Linear) and module.weight.requires_grad]


def _check_gathered(task: Task, rows: Any) -> None:
    """Check that a plain Trainer can gather targets over several processes.

    Raises:
        ValueError: they are lists, of another shape in each process.
    """
    targets = task.collate([rows[0]]).get(task.label_names[0])
    if targets is not None and not torch.is_tensor(targets):
        raise ValueError(
            f"task={task.pipeline_tag!r}: Trainer cannot gather the boxes or masks of several processes, and would wait "
            "for ever; leave eval_dataset out, or train by `torchrun --nproc_per_node 2 -m vpt_peft train`."
        )


def _start_batches(task: Task, rows: Any, training: VPTTrainingArguments) -> DataLoader:
    """Batches of the training images from which prompts and head start."""
    return DataLoader(
        _sample(rows, training.seed), batch_size=training.per_device_eval_batch_size, collate_fn=task.collate
    )


def _sample(rows: Any, seed: int) -> Dataset:
    if len(rows) <= _START_IMAGES:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return Subset(rows, sorted(order[:_START_IMAGES].tolist()))


def _start_at_zero(head: nn.Module) -> None:
    """Let an output layer that has not learned yet start at zero, so that all classes are alike.

    Random layers send their noise into the prompts, which hurts where images are few. Every model of transformers
    draws a new output layer with a bias of zero; one that has learned has none.
    """
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if linears and linears[-1].bias is not None and not linears[-1].bias.any():
        nn.init.zeros_(linears[-1].weight)


def _active_config(model: PeftModel) -> PeftConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"training_recipe() takes a PeftModel, not {type(model).__name__}; make one by get_peft_model(model, config)."
        )
    if len(model.active_adapters) != 1:
        raise ValueError(f"{model.active_adapters} are active; choose the one to train by model.set_adapter(name).")
    return model.peft_config[model.active_adapters[0]]


def _method_of(config: PeftConfig) -> str:
    if isinstance(config, GatedVPTConfig):
        return "gated_vpt"
    if isinstance(config, VPTConfig):
        return "vpt" if config.deep else "vpt_shallow"
    if isinstance(config, LoraConfig):
        return "lora"
    raise ValueError(f"there is no recipe for {type(config).__name__}, only for VPT, gated prompts and LoRA.")


def _starts_from_tokens(config: VPTConfig) -> bool:
    return config.prompt_location == "prepend" and not config.projection_dim and not config.project_patches
