"""Recipe presets: the papers' schedules, and an AdamW default.

Sources: Jia et al. 2022, arXiv 2203.12119 (vpt_paper); Yoo et al. 2023, arXiv 2306.05067 (gpt_paper).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..methods.options import MethodOptions
from ..methods.registry import COMBINED_METHODS, METHODS, PROMPT_METHODS


RECIPES = ("default", "vpt_paper", "gpt_paper")

# Peak AdamW learning rates of the default recipe: what a method adds or unfreezes, then its head.
_DEFAULT_RATES = {
    "vpt": (3e-2, 1e-3),
    "vpt_shallow": (3e-2, 5e-3),
    "vpt+bias": (3e-2, 1e-3),
    "gated_vpt": (3e-2, 1e-2),
    "linear": (1e-3, 1e-3),
    "mlp": (1e-3, 1e-3),
    "full": (1e-4, 1e-3),
    "partial": (2e-4, 1e-3),
    "bias": (2e-3, 2e-3),
    "adapter": (1e-3, 2e-3),
    "sidetune": (1e-3, 2e-3),
    "lora": (1e-3, 2e-3),
    "vpt+lora": (1e-3, 1e-3),
    "vpt+adapter": (1e-3, 1e-3),
}

_RATES = ("learning_rate", "base_learning_rate", "prompt_learning_rate", "head_learning_rate")

# Who gives one of these wants steps of an optimizer
_OF_OPTIMIZER = {
    "learning_rate",
    "base_learning_rate",
    "head_learning_rate",
    "weight_decay",
    "head_weight_decay",
    "num_train_epochs",
    "max_steps",
    "optim",
    "lr_scheduler_type",
    "early_stopping_patience",
}


def resolve(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with what the recipe and the method fill in; what stays out has the default of its flag.

    Raises:
        ValueError: `recipe` is unknown, or values do not go together.
    """
    values = {**recipe_defaults(given), **given}
    if values.get("train_on_validation"):
        # Nothing is left to evaluate on while training
        values = {"eval_strategy": "no", "load_best_model_at_end": False, **values}
        if values["eval_strategy"] != "no" or "early_stopping_patience" in values:
            raise ValueError(
                "train_on_validation=True leaves nothing to evaluate on while training; drop eval_strategy and "
                "early_stopping_patience."
            )
    return values


def recipe_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the recipe named in `given` adds to what the user gave; nothing given is changed.

    A learning rate from the user scales the recipe: see `group_rates`.

    Raises:
        ValueError: `recipe` is unknown.
    """
    values = _recipe(given)
    if "learning_rate" in given or "base_learning_rate" in given:
        values = {name: value for name, value in values.items() if name not in _RATES}
        if "learning_rate" in given:
            values |= group_rates(given, given["learning_rate"])
    return {name: value for name, value in values.items() if name not in given}


def group_rates(given: Mapping[str, Any], learning_rate: float) -> dict[str, float]:
    """Return the rates of single parameter groups that keep the recipe's ratio to `learning_rate`.

    Groups whose rate is in `given` are left out, and so are those for which the recipe has none of their own.
    """
    recipe = _recipe(given)
    return {
        # The recipe's own rate gives the recipe itself; twelve digits cut off what multiplication adds
        name: float(f"{recipe[name] * (learning_rate / recipe['learning_rate']):.12g}")
        for name in ("prompt_learning_rate", "head_learning_rate")
        if name in recipe and name not in given
    }


def _recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    method, recipe = given.get("method", "vpt"), given.get("recipe", "default")
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown; choose one of {', '.join(RECIPES)}.")
    values = _paper_recipe(given, method, recipe) if recipe != "default" else _default_recipe(given, method)
    if method == "linear":
        values.setdefault("solver", "optimizer")
    flags = METHODS[method].flags if method in METHODS else ()
    return {item.name: item.default for item in fields(MethodOptions) if item.name in flags} | values


def _default_recipe(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    added, head = _DEFAULT_RATES.get(method, (1e-3, 1e-3))
    values: dict[str, Any] = {
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "learning_rate": added,
        "head_learning_rate": head,
        "weight_decay": 0.01,
        "num_train_epochs": 20,
        "per_device_train_batch_size": 32,
    }
    if method == "linear" and not _OF_OPTIMIZER & set(given):
        values["solver"] = "lbfgs"
    if method in COMBINED_METHODS:
        values |= {"prompt_learning_rate": _DEFAULT_RATES["vpt"][0], "prompt_weight_decay": 0.0}
    if method in PROMPT_METHODS:
        values |= {"prompt_learning_rate": added, "prompt_weight_decay": 0.0}
    if method in ("vpt", "vpt+bias", *COMBINED_METHODS):
        values["num_train_epochs"] = 10
        # Prompts in all blocks that are random disturb what the backbone knows; tokens of real images hardly do
        if given.get("prompt_location", "prepend") == "prepend" and not given.get("projection_dim"):
            values["init_method"] = "tokens"
    return values


def _paper_recipe(given: Mapping[str, Any], method: str, recipe: str) -> dict[str, Any]:
    given_prompts = given.get("num_virtual_tokens", 10)
    prompts = max(given_prompts) if isinstance(given_prompts, list) else given_prompts
    values: dict[str, Any] = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_grad_norm": 0.0,
        "num_train_epochs": 100,
        "per_device_train_batch_size": 64 if method in PROMPT_METHODS and prompts >= 100 else 128,
    }
    # One mid value of each paper's grid; the papers choose it per data set
    if recipe == "vpt_paper":
        values |= {"base_learning_rate": 1.0, "weight_decay": 1e-3}
    else:
        values |= {"learning_rate": 0.5, "weight_decay": 0.0}
    if method in (*PROMPT_METHODS, *COMBINED_METHODS):
        values["prompt_dropout"] = 0.1
    if method == "gated_vpt":
        values["gate_init"] = 5.0
    return values


def scaled_learning_rate(base_learning_rate: float, images: int) -> float:
    """Return the rate by the linear scaling rule of the VPT paper: base rate times images per optimizer step over 256."""
    return base_learning_rate * images / 256
