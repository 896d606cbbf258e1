"""Build the model of every method: prompts and LoRA through PEFT, the papers' other baselines by what is unfrozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from ..heads import trained_modules
from .arguments import GATE_FIELDS, PROMPT_FIELDS, MethodArguments, ModelArguments
from .baselines import MLPHead, add_bottleneck_adapters, add_side_network, keep_frozen_in_eval
from .optim import split_trainable
from .recipes import PROMPT_METHODS
from .structure import Classifier, find_blocks, find_final_norm, find_head, find_output_layer


logger = logging.getLogger(__name__)

SPEC_ATTRIBUTE = "baseline_spec"
EMBEDDED = ("embedded", "embedded-mae")
# Names of query and value maps over transformers' encoders, then of fused ones
_QUERY_VALUE = {"query", "value", "q_proj", "v_proj", "q", "v", "to_q", "to_v", "query_proj", "value_proj"}
_FUSED = {"qkv", "query_key_value", "in_proj", "Wqkv"}


@dataclass(frozen=True)
class BaselineSpec:
    """What rebuilds a baseline that is not a PEFT adapter; kept on the model and beside its saved weights."""

    method: str
    base_model_name_or_path: str
    revision: str | None
    partial_blocks: int
    mlp_layers: int
    adapter_reduction: int


def resolve_model_path(name: str) -> str:
    """Turn 'embedded' and 'embedded-mae' into the package's folders; anything else stays as it is."""
    if name not in EMBEDDED:
        return name
    from ..embedded import embedded_path

    return str(embedded_path(name))


def load_image_processor(model_args: ModelArguments) -> Any:
    """The image processor that belongs to the backbone; no torchvision needed.

    Raises:
        OSError: there is no such model, or it comes without an image processor.
    """
    with _named(model_args):
        return AutoImageProcessor.from_pretrained(
            resolve_model_path(model_args.model_name_or_path),
            revision=model_args.model_revision or "main",
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )


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
            f"model_name_or_path={name!r}{where}: no such folder here, and the Hub did not give it ({why}). Check the "
            "id and the revision. If the model is private or gated, HF_TOKEN must hold a token that may read it. "
            "Without a network, use a model that is in the cache already (HF_HUB_OFFLINE=1 stops the retries), a local "
            "folder, or 'embedded'."
        ) from error


def load_backbone(model_args: ModelArguments, id2label: Mapping[int, str]) -> PreTrainedModel:
    """Load an image classifier in float32 with a head for `id2label`; one of another size begins at zero.

    MAE checkpoints, which transformers has no classifier for, are read as ViTs.

    Raises:
        ValueError: weights other than the head's are missing or have another shape than the checkpoint's config says.
        OSError: there is no such model.
    """
    labels = dict(id2label)
    path = resolve_model_path(model_args.model_name_or_path)
    source: dict[str, Any] = {
        "revision": model_args.model_revision or "main",
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
    }
    with _named(model_args):
        config = AutoConfig.from_pretrained(path, **source)
    loader: Any = AutoModelForImageClassification
    if config.model_type == "vit_mae":
        config, loader = ViTConfig.from_dict({**config.to_dict(), "model_type": "vit"}), ViTForImageClassification
    config.id2label, config.label2id = labels, {name: index for index, name in labels.items()}
    with _quiet_loading(), _named(model_args):
        model, info = loader.from_pretrained(
            path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **source
        )
    head = find_head(model)
    drawn = {*info["missing_keys"], *(mismatch[0] for mismatch in info["mismatched_keys"])}
    wrong = sorted(key for key in drawn if not any(key == name or key.startswith(f"{name}.") for name in head))
    if wrong:
        raise ValueError(
            f"model_name_or_path={model_args.model_name_or_path!r} does not hold the backbone's weights "
            f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}; choose a checkpoint that fits its config.json."
        )
    _begin_at_zero(model, drawn)
    return model


def _begin_at_zero(model: PreTrainedModel, drawn: Collection[str]) -> None:
    """Let output layers that the checkpoint did not hold begin at zero.

    All classes are alike then. Random ones send their noise into the prompts for as long as they last, and cost accuracy
    where images are few.
    """
    for path, head in find_head(model).items():
        linears = [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Linear)]
        name, output_layer = linears[-1]
        if ".".join(filter(None, (path, name, "weight"))) in drawn:
            for parameter in output_layer.parameters():
                nn.init.zeros_(parameter)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep back transformers' table of weights that do not fit: a new head is asked for, all else is raised."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def build_model(model_args: ModelArguments, method_args: MethodArguments, id2label: Mapping[int, str]) -> Classifier:
    """Return the backbone made ready for `method_args.method`: only what the method trains has `requires_grad`.

    Prompt methods and LoRA give a `PeftModel`; the others the transformers model itself with a `baseline_spec`.

    Raises:
        ValueError: a field does not fit the model; the message names it.
        OSError: the model cannot be found.
    """
    model = load_backbone(model_args, id2label)
    if method_args.method in PROMPT_METHODS or method_args.method == "lora":
        return _peft_model(model, model_args, method_args)
    spec = BaselineSpec(
        method_args.method,
        model_args.model_name_or_path,
        model_args.model_revision,
        method_args.partial_blocks,
        method_args.mlp_layers,
        method_args.adapter_reduction,
    )
    return build_baseline(model, spec)


def build_baseline(model: PreTrainedModel, spec: BaselineSpec) -> PreTrainedModel:
    """Change `model` in place into the baseline that `spec` describes and return it."""
    if spec.method != "full":
        model.requires_grad_(False)
        trained = _BASELINES[spec.method](model, spec)
        keep_frozen_in_eval(model, trained)
    setattr(model, SPEC_ATTRIBUTE, spec)
    return model


def _train_head(model: PreTrainedModel) -> list[nn.Module]:
    head = list(find_head(model).values())
    for module in head:
        module.requires_grad_(True)
    return head


def _linear(model: PreTrainedModel, spec: BaselineSpec) -> list[nn.Module]:
    return _train_head(model)


def _mlp(model: PreTrainedModel, spec: BaselineSpec) -> list[nn.Module]:
    name, output_layer = find_output_layer(model)
    head = MLPHead(output_layer.in_features, output_layer.out_features, spec.mlp_layers)
    model.set_submodule(name, head.to(output_layer.weight))
    return [head, *_train_head(model)]


def _bias(model: PreTrainedModel, spec: BaselineSpec) -> list[nn.Module]:
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        # Position-bias tables are matrices: weights in all but name
        if parameter.ndim == 1 and (last == "bias" or last.endswith("_bias")):
            parameter.requires_grad_(True)
    return _train_head(model)


def _partial(model: PreTrainedModel, spec: BaselineSpec) -> list[nn.Module]:
    blocks = find_blocks(model)
    if spec.partial_blocks > len(blocks):
        raise ValueError(f"partial_blocks={spec.partial_blocks} but the encoder has {len(blocks)} blocks.")
    last, norm = blocks[-spec.partial_blocks :], find_final_norm(model)
    for module in last if norm is None else (*last, norm):
        module.requires_grad_(True)
    return [*last, *_train_head(model)]


def _adapter(model: PreTrainedModel, spec: BaselineSpec) -> list[nn.Module]:
    return [*add_bottleneck_adapters(find_blocks(model), spec.adapter_reduction), *_train_head(model)]


def _sidetune(model: PreTrainedModel, spec: BaselineSpec) -> list[nn.Module]:
    return [add_side_network(model, find_output_layer(model)[1]), *_train_head(model)]


_BASELINES: dict[str, Callable[[PreTrainedModel, BaselineSpec], list[nn.Module]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "bias": _bias,
    "partial": _partial,
    "adapter": _adapter,
    "sidetune": _sidetune,
}


def prompt_config(method_args: MethodArguments) -> PeftConfig:
    """The VPTConfig or GatedVPTConfig of the arguments; fields that were not given keep the config's defaults.

    Raises:
        ValueError: from the config, for a value outside its range.
    """
    from .. import GatedVPTConfig, VPTConfig

    names = [name for name in (*PROMPT_FIELDS, *GATE_FIELDS) if name != "init_method"]
    given = {name: getattr(method_args, name) for name in names if getattr(method_args, name) is not None}
    if method_args.method == "gated_vpt":
        return GatedVPTConfig(num_virtual_tokens=method_args.num_virtual_tokens, **given)
    deep = method_args.method == "vpt"
    return VPTConfig(num_virtual_tokens=method_args.num_virtual_tokens, deep=deep, **given)


def _lora_config(model: PreTrainedModel, method_args: MethodArguments) -> LoraConfig:
    blocks = find_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    linears = [name for name, m in model.named_modules() if m in inside and isinstance(m, nn.Linear)]
    for names in (_QUERY_VALUE, _FUSED):
        targets = sorted({linear.rsplit(".", 1)[-1] for linear in linears} & names)
        if targets:
            rank = method_args.lora_r
            heads = list(find_head(model))
            return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=heads)
    raise ValueError(
        f"method='lora' finds no query and value maps in {type(blocks[0]).__name__}; its linear layers are "
        f"{', '.join(sorted({linear.rsplit('.', 1)[-1] for linear in linears}))}. Use PEFT's LoraConfig directly."
    )


def _peft_model(model: PreTrainedModel, model_args: ModelArguments, method_args: MethodArguments) -> PeftModel:
    is_lora = method_args.method == "lora"
    config = _lora_config(model, method_args) if is_lora else prompt_config(method_args)
    peft_model = get_peft_model(model, config)
    if is_lora:
        keep_frozen_in_eval(model, list(trained_modules(model)))
    # The package's own backbones lie at another path on every machine
    active = peft_model.peft_config["default"]
    active.base_model_name_or_path, active.revision = model_args.model_name_or_path, model_args.model_revision
    return peft_model


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
    if method in (*PROMPT_METHODS, "lora"):
        if groups["rest"]:
            raise RuntimeError(f"method={method!r} would also train {', '.join(list(groups['rest'])[:5])}.")
        if not prompts:
            raise RuntimeError(f"method={method!r} has no parameters of its own to train.")
    return ParameterCounts(prompts, head, rest, sum(p.numel() for p in model.parameters()))
