"""The model of a run: the backbone with a head for the labels, made ready for the method."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

# From where it is: without torchvision, transformers 5.9 exports a stand-in
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..data.transforms import check_processor
from ..embedded import EMBEDDED_FOLDERS, embedded_path
from ..methods import METHODS, MethodOptions
from ..methods.apply import apply_method
from ..methods.registry import GATE_FIELDS, PROMPT_FIELDS
from ..methods.structure import Classifier
from ..tasks import get_task
from .arguments import MethodArguments, ModelArguments
from .optim import split_trainable


logger = logging.getLogger(__name__)

SPEC_ATTRIBUTE = "baseline_spec"
EMBEDDED = tuple(EMBEDDED_FOLDERS)


@dataclass(frozen=True)
class BaselineSpec:
    """What rebuilds a baseline that is not a PEFT adapter; kept on the model and beside its saved weights."""

    method: str
    base_model_name_or_path: str
    revision: str | None
    partial_blocks: int
    mlp_layers: int
    adapter_reduction: int
    lora_r: int = 8
    num_virtual_tokens: int | list[int] = 10
    fields: dict[str, Any] = field(default_factory=dict)


def resolve_model_path(name: str) -> str:
    """Turn 'embedded' and 'embedded-mae' into the package's folders; anything else stays as it is."""
    return str(embedded_path(name)) if name in EMBEDDED_FOLDERS else name


def load_image_processor(model_args: ModelArguments) -> Any:
    """Return the image processor of the backbone; torchvision is not needed.

    Raises:
        OSError: there is no such model, or it comes without an image processor.
        ValueError: the processor's numbers cannot be used.
    """
    with _named(model_args):
        processor = AutoImageProcessor.from_pretrained(
            resolve_model_path(model_args.model_name_or_path),
            revision=model_args.model_revision or "main",
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    check_processor(processor)
    return processor


@contextmanager
def _named(model_args: ModelArguments) -> Iterator[None]:
    """Say which model cannot be loaded, and what helps."""
    try:
        yield
    except OSError as error:
        name, why = model_args.model_name_or_path, " ".join(str(error).split())
        if Path(name).is_dir():
            raise OSError(f"model_name_or_path={name!r}: the folder cannot be used ({why}).") from error
        where = f" at revision {model_args.model_revision!r}" if model_args.model_revision else ""
        raise OSError(
            f"model_name_or_path={name!r}{where}: no such folder here, and the Hub does not provide it ({why}). Check the "
            "id and the revision. If the model is private or gated, HF_TOKEN must hold a token that may read it. "
            "Without a network, use a model that is in the cache already (HF_HUB_OFFLINE=1 stops the retries), a local "
            "folder, or 'embedded'."
        ) from error


def load_backbone(
    model_args: ModelArguments, id2label: Mapping[int, str], image_processor: Any = None
) -> PreTrainedModel:
    """Load a model for the task of `model_args` in float32 with a head for `id2label`; see `Task.load_model`.

    Raises:
        ValueError: weights other than the head's are missing or have another shape than the checkpoint's config says,
            or the model cannot do the task.
        OSError: there is no such model.
    """
    source: dict[str, Any] = {
        "revision": model_args.model_revision or "main",
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
    }
    with _named(model_args):
        path = resolve_model_path(model_args.model_name_or_path)
        task = get_task(model_args.task)
        return task.load_model(path, id2label, source, image_processor, model_args.decoder)


def build_model(
    model_args: ModelArguments,
    method_args: MethodArguments,
    id2label: Mapping[int, str],
    image_processor: Any = None,
) -> Classifier:
    """Return the backbone made ready for `method_args.method`: only what the method trains has `requires_grad`.

    Prompt methods and LoRA give a `PeftModel`; the others the transformers model itself with a `baseline_spec`.

    Raises:
        ValueError: a field does not fit the model; the message names it.
        OSError: the model cannot be found.
    """
    check_method(model_args.task, method_args.method)
    model = load_backbone(model_args, id2label, image_processor)
    options = method_options(method_args)
    if METHODS[method_args.method].configure:
        adapted: Any = apply_method(model, method_args.method, options)
        # The package's own backbones lie at another path on every machine
        config = adapted.peft_config["default"]
        config.base_model_name_or_path, config.revision = model_args.model_name_or_path, model_args.model_revision
        return adapted
    spec = BaselineSpec(
        method_args.method,
        model_args.model_name_or_path,
        model_args.model_revision,
        options.partial_blocks,
        options.mlp_layers,
        options.adapter_reduction,
        options.lora_r,
        options.num_virtual_tokens,
        dict(options.fields),
    )
    return build_baseline(model, spec)


def check_method(task: str, method: str) -> None:
    """Check that a method makes sense for a task.

    Raises:
        ValueError: it does not; the message names those that do.
    """
    refused = get_task(task).refused_methods
    if method in refused:
        fitting = ", ".join(name for name in METHODS if name not in refused)
        raise ValueError(f"method={method!r} is for classifiers, not for task={task!r}; choose one of {fitting}.")


def build_baseline(model: PreTrainedModel, spec: BaselineSpec) -> PreTrainedModel:
    """Change `model` in place into the baseline that `spec` describes and return it."""
    options = MethodOptions(**{item.name: getattr(spec, item.name) for item in fields(MethodOptions)})
    apply_method(model, spec.method, options)
    setattr(model, SPEC_ATTRIBUTE, spec)
    return model


def method_options(method_args: MethodArguments) -> MethodOptions:
    """The options of the arguments; what was not given keeps the default of options and configuration."""
    given = {name: value for name, value in vars(method_args).items() if value is not None}
    numbers = {item.name: given[item.name] for item in fields(MethodOptions) if item.name in given}
    prompts = {name: given[name] for name in (*PROMPT_FIELDS, *GATE_FIELDS) if name in given and name != "init_method"}
    return MethodOptions(**numbers, fields=prompts)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: trained in prompts, head and the rest, and all the model has."""

    prompts: int
    head: int
    rest: int
    total: int

    @property
    def trainable(self) -> int:
        return self.prompts + self.head + self.rest


def check_trainable(model: Classifier, method: str) -> ParameterCounts:
    """Count what trains, and make sure that with prompts (or LoRA) it is nothing but them and the head.

    Raises:
        RuntimeError: something else would train, the head would not, or a prompt method has no prompts.
    """
    groups = split_trainable(model)
    prompts, head, rest = (sum(p.numel() for p in groups[name].values()) for name in ("prompts", "head", "rest"))
    if not head:
        raise RuntimeError(f"method={method!r}: the task head would not train.")
    if METHODS[method].configure:
        if groups["rest"]:
            raise RuntimeError(f"method={method!r} would also train {', '.join(list(groups['rest'])[:5])}.")
        if not prompts:
            raise RuntimeError(f"method={method!r} has no parameters of its own to train.")
    return ParameterCounts(prompts, head, rest, sum(p.numel() for p in model.parameters()))
