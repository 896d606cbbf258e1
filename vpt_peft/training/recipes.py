"""Recipe presets: the papers' schedules, and an AdamW default.

Sources: Jia et al. 2022, arXiv 2203.12119 (vpt_paper); Yoo et al. 2023, arXiv 2306.05067 (gpt_paper).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..methods import PROMPT_METHODS


RECIPES = ("default", "vpt_paper", "gpt_paper")

# Peak AdamW learning rates of the default recipe: what a method adds or unfreezes, then its head.
_DEFAULT_RATES = {
    "vpt": (3e-2, 1e-3),
    "vpt_shallow": (3e-2, 5e-3),
    "gated_vpt": (3e-2, 1e-2),
    "linear": (1e-3, 1e-3),
    "mlp": (1e-3, 1e-3),
    "full": (1e-4, 1e-3),
    "partial": (2e-4, 1e-3),
    "bias": (2e-3, 2e-3),
    "adapter": (1e-3, 2e-3),
    "sidetune": (1e-3, 2e-3),
    "lora": (1e-3, 2e-3),
}

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


def recipe_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the recipe named in `given` adds to what the user gave; nothing given is changed.

    A learning rate or weight decay from the user applies to every parameter group, so the recipe then adds none for
    single groups.

    Raises:
        ValueError: `recipe` is unknown.
    """
    method, recipe = given.get("method", "vpt"), given.get("recipe", "default")
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown; choose one of {', '.join(RECIPES)}.")
    values = _paper_recipe(given, method, recipe) if recipe != "default" else _default_recipe(given, method)
    if "learning_rate" in given or "base_learning_rate" in given:
        for name in ("learning_rate", "base_learning_rate", "prompt_learning_rate", "head_learning_rate"):
            values.pop(name, None)
    if "weight_decay" in given:
        values.pop("prompt_weight_decay", None)
        values.pop("head_weight_decay", None)
    return {name: value for name, value in values.items() if name not in given}


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
    if method in PROMPT_METHODS:
        values |= {"prompt_learning_rate": added, "prompt_weight_decay": 0.0}
    if method == "vpt":
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
    if method in PROMPT_METHODS:
        values["prompt_dropout"] = 0.1
    if method == "gated_vpt":
        values["gate_init"] = 5.0
    return values


def scaled_learning_rate(base_learning_rate: float, images: int) -> float:
    """Return the rate by the linear scaling rule of the VPT paper: base rate times images per optimizer step over 256."""
    return base_learning_rate * images / 256
