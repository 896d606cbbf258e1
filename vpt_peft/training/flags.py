"""The flags of a training run as dataclasses, readable without torch and transformers, so that help is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..fields import BIAS_PLACES
from ..methods.options import out_of_list
from ..methods.registry import METHOD_FLAGS, METHODS
from ..tasks import get_task, task_names
from ..tasks.base import DEFAULT_TASK


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
    task: str = field(
        default=DEFAULT_TASK,
        metadata={"help": "What the model learns; default: what the data is for.", "choices": list(task_names())},
    )
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
        metadata={
            "help": "Prompts (vpt, vpt_shallow, gated_vpt), or what they are compared with.",
            "choices": list(METHODS),
        },
    )
    recipe: Literal["default", "vpt_paper", "gpt_paper"] = field(
        default="default", metadata={"help": "Preset of optimizer, schedule and rates; flags override it."}
    )

    num_virtual_tokens: list[int] | None = field(
        default=None, metadata={"help": "Prompts per prompted block; several numbers: one for each."}
    )
    prompt_rank: int | None = field(
        default=None, metadata={"help": "Prompts are a product of two matrices of this rank; default: whole."}
    )
    bias: list[str] | None = field(
        default=None,
        metadata={
            "help": "Biases that train with the prompts: all, or some of value, output, mlp, norm; default: none.",
            "choices": ["none", "all", *BIAS_PLACES],
        },
    )
    prompt_dropout: float | None = field(
        default=None, metadata={"help": "Dropout on prompts, drawn per image; default: 0.0."}
    )
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
        default=None,
        metadata={"help": "gated_vpt: the paper's scalar per block, a linear-sigmoid gate, or none; default: scalar."},
    )
    gate_init: float | None = field(
        default=None, metadata={"help": "gated_vpt: the gate logit starts at minus this; default: 5.0."}
    )
    attention_temperature: bool | None = field(
        default=None, metadata={"help": "gated_vpt: learn one attention temperature per block; default: true."}
    )
    init_method: (
        Literal["random", "tokens", "class_token_final", "class_token_layerwise", "mean_pool", "kmeans", "vipamin"]
        | None
    ) = field(
        default=None,
        metadata={"help": "Initial prompts: random, or features of training images; default: random."},
    )

    head_init: Literal["zero", "probe"] | None = field(
        default=None,
        metadata={
            "help": "Initial head where none was trained: zero, or the linear probe of the model as it starts; default: zero."
        },
    )

    partial_blocks: int | None = field(default=None, metadata={"help": "partial: last blocks that train."})
    mlp_layers: int | None = field(default=None, metadata={"help": "mlp: linear layers of the head."})
    adapter_reduction: int | None = field(
        default=None, metadata={"help": "adapter: hidden size over bottleneck width."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "lora: rank."})
    solver: Literal["lbfgs", "optimizer"] | None = field(
        default=None,
        metadata={
            "help": "linear: fit the head on cached features to the optimum by L-BFGS, with the L2 penalty that is best on "
            "validation, or take steps of the optimizer; default: lbfgs unless rate, schedule, decay or length are given."
        },
    )

    base_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate for 256 images a step (VPT): learning_rate is then in proportion to the actual number."
        },
    )
    prompt_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of prompts, gates and LoRA matrices."}
    )
    head_learning_rate: float | None = field(default=None, metadata={"help": "Rate of the head."})
    prompt_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of prompts and LoRA matrices; default: weight_decay."}
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
            if given is not None and min(given if isinstance(given, list) else [given], default=0) < 1:
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
        for name in METHOD_FLAGS - set(METHODS[self.method].flags):
            if getattr(self, name) is not None:
                readers = ", ".join(each for each, method in METHODS.items() if name in method.flags)
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with method={self.method!r}, only with {readers}; "
                    "drop it."
                )


@dataclass
class TrainingFlags:
    """The training arguments of transformers that matter most, with defaults for prompts.

    They are evaluated and saved each epoch, and the best is kept. What the recipe sets has transformers' default here.
    """

    output_dir: str | None = field(default="vpt-output", metadata={"help": "Where adapter, results and card go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of an earlier run in output_dir."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Go on from a checkpoint: its folder, or 'last' for the last in output_dir."}
    )

    learning_rate: float = field(
        default=5e-5,
        metadata={
            "help": "Peak rate of what the method trains; the head's changes with it, in the recipe's ratio, unless "
            "head_learning_rate is given."
        },
    )
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "Weight decay of the head, and of backbone matrices that train; prompts have their own."},
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs to train."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Images per step and device."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches whose gradients add up to one step."}
    )
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, by transformers' name."})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "Schedule of the rates: cosine, linear, constant_with_warmup, ..."}
    )
    warmup_steps: float = field(
        default=0.0, metadata={"help": "Steps in which the rates rise; below 1: share of all steps."}
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are clipped to this norm; 0: they are not."}
    )
    seed: int = field(default=42, metadata={"help": "Of initial values, order of images and augmentation."})

    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per device in evaluation."})
    eval_strategy: Literal["no", "steps", "epoch"] = field(default="epoch", metadata={"help": "When to evaluate."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Save the weights of the best evaluation."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "A metric of the task, or loss; default: the task's own choice."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "tensorboard, trackio, wandb, ... or none."}
    )

    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 (autocast); weights stay as they are."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "No progress bars; default: where nobody watches (output to a file)."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the finished adapter."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Where to, as user/name; default: the name of output_dir."}
    )
