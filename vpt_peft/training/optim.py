"""The optimizer's parameter groups: what the method added, the head, and the rest."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..heads import trained_modules
from ..methods.structure import Classifier, find_head
from ..tuners.vpt.parameters import find_parameters
from .arguments import MethodArguments, VPTTrainingArguments


def split_trainable(model: Classifier) -> dict[str, dict[str, nn.Parameter]]:
    """Sort the trainable parameters into {"prompts", "head", "rest"}, each {name: parameter}.

    "prompts" is what the PEFT method added (prompts, gates, temperatures, projections, LoRA matrices), "head" the task
    head, "rest" everything else (biases, unfrozen blocks, bottleneck adapters, LoRA matrices beside prompts).
    """
    parameters = None
    if isinstance(model, PeftModel):
        heads: list[nn.Module] = list(trained_modules(model))
        prefix = str(model.base_model.prefix)
    else:
        parameters = find_parameters(model)
        heads, prefix = list(find_head(model, None if parameters is None else parameters.spec).values()), None
    of_prompts = set() if parameters is None else {id(parameter) for parameter in parameters.parameters()}
    of_head = {id(parameter) for head in heads for parameter in head.parameters()}
    groups: dict[str, dict[str, nn.Parameter]] = {"prompts": {}, "head": {}, "rest": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in of_head:
            groups["head"][name] = parameter
        elif id(parameter) in of_prompts:
            groups["prompts"][name] = parameter
        elif prefix is not None and any(part.startswith(prefix) for part in name.split(".")):
            groups["prompts"][name] = parameter
        else:
            groups["rest"][name] = parameter
    return groups


def parameter_groups(
    model: Classifier, method: MethodArguments, training: VPTTrainingArguments
) -> list[dict[str, Any]]:
    """Return the optimizer's groups: prompts, head and rest, each with its learning rate and weight decay.

    Parameters of fewer than two dimensions (biases, norms, gates, temperatures) are never decayed.
    """
    rates = {"prompts": method.prompt_learning_rate, "head": method.head_learning_rate, "rest": None}
    decays = {"prompts": method.prompt_weight_decay, "head": method.head_weight_decay, "rest": None}
    groups = []
    for group_name, parameters in split_trainable(model).items():
        rate = training.learning_rate if rates[group_name] is None else rates[group_name]
        decay = training.weight_decay if decays[group_name] is None else decays[group_name]
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        vectors = [p for p in parameters.values() if p.ndim < 2]
        for params, weight_decay in ((matrices, decay), (vectors, 0.0)):
            if params:
                groups.append({"params": params, "lr": rate, "weight_decay": weight_decay, "name": group_name})
    return groups


def make_optimizer(
    model: Classifier, method: MethodArguments, training: VPTTrainingArguments
) -> torch.optim.Optimizer:
    """Return the optimizer that `training.optim` names, over the groups of `parameter_groups`."""
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training, model)  # type: ignore[arg-type]
    return optimizer_class(parameter_groups(model, method, training), **options)
