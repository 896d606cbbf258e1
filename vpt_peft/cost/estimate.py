"""Estimate what training with a method costs: parameters, bytes on disk, FLOPs, memory, the largest batch that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from ..embedded import EMBEDDED_FOLDERS, embedded_path
from ..encoder import EncoderSpec, find_encoder, submodule
from ..encoder.inputs import IMAGE_INPUTS, sample_inputs
from ..encoder.quantized import has_packed_weights
from ..methods import METHODS, PROMPT_METHODS, MethodOptions
from ..tuners.vpt.check import check_skip_unread
from ..tuners.vpt.parameters import find_parameters
from .meta_model import apply_to_meta_model, safetensors_bytes, saved_tensors
from .simulation import StepCost, blank_copy, simulate_step


# Values of optimizer state per trainable parameter
OPTIMIZER_STATES = {"adamw": 2, "sgd": 1, "none": 0}
MAX_BATCH_SIZE = 1 << 20
# For what allocators hold in fragments: resident memory was up to 1.68 times the estimate with glibc's malloc
HEADROOM, HEADROOM_CPU = 0.1, 0.45
# Below this the line through two simulations is not trusted
SMALL_BATCH = 64


@dataclass(frozen=True)
class CostEstimate:
    """The expected cost of training with one method; all sizes in bytes.

    Args:
        method (`str`): its name, or the PEFT type of the configuration.
        batch_size (`int`): images per step.
        dtype (`str`): of the weights.
        trainable_values (`int`): trainable parameters, head included.
        total_values (`int`): all parameters.
        disk_bytes (`int`): size of the saved weights: the adapter with its head, for `full` the model.
        forward_flops, step_flops (`int`): floating-point operations in matrix products and convolutions of the forward
            pass (which is inference), and of a training step; a multiply-add counts as two.
        weight_bytes (`int`): all weights and buffers.
        optimizer_bytes (`int`): the optimizer state.
        image_bytes (`int`): the images of a step.
        step_bytes (`int`): peak of a training step beyond weights, optimizer state and images.
        memory_limit (`int`): what training may use.
        largest_batch_size (`int`): images per step that fit the limit with `headroom`; 0 if not even one does.
    """

    method: str
    batch_size: int
    dtype: str
    trainable_values: int
    total_values: int
    disk_bytes: int
    forward_flops: int
    step_flops: int
    weight_bytes: int
    optimizer_bytes: int
    image_bytes: int
    step_bytes: int
    memory_limit: int
    largest_batch_size: int

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory: weights, optimizer state, images and what a step adds."""
        return self.weight_bytes + self.optimizer_bytes + self.image_bytes + self.step_bytes


def estimate_cost(
    model_or_config: nn.Module | PreTrainedConfig | str, method: str | PeftConfig | None = "vpt", **given: Any
) -> CostEstimate:
    """Estimate what training with one method costs.

    Args:
        model_or_config: as for [`estimate_costs`].
        method (`str` or `PeftConfig`, *optional*): a name of `vpt_peft.methods.METHODS`, a PEFT configuration, or
            `None` for a model that is ready to train.
        given: further arguments of [`estimate_costs`].
    """
    return estimate_costs(model_or_config, [method], **given)[0]


def estimate_costs(
    model_or_config: nn.Module | PreTrainedConfig | str,
    methods: Sequence[str | PeftConfig | None] = tuple(METHODS),
    batch_size: int = 8,
    dtype: torch.dtype | str | None = None,
    autocast: torch.dtype | str | None = None,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    memory_limit: int | None = None,
    headroom: float | None = None,
    device: torch.device | str | None = None,
    num_labels: int | None = None,
    num_virtual_tokens: int | list[int] = 10,
    lora_r: int = 8,
    partial_blocks: int = 1,
    mlp_layers: int = 3,
    adapter_reduction: int = 8,
    **fields: Any,
) -> list[CostEstimate]:
    """Estimate what training costs with each of several methods.

    One training step of the model runs on tensors without data, at the given batch size, so all architectures,
    configurations and batch sizes are covered, and neither the model's memory nor its gradients change. Memory is what
    torch's allocator hands out; the process itself (interpreter, libraries) comes on top, and so does what an
    allocator keeps back in fragments, for which `headroom` leaves room: on CPUs glibc's malloc held up to 1.7
    times as much, unless the environment variable `MALLOC_MMAP_THRESHOLD_=262144` made it give back what is freed.

    Args:
        model_or_config (`PreTrainedModel`, `PreTrainedConfig` or `str`): a model, its configuration, or the Hub id,
            folder or embedded backbone to read the configuration from.
        methods (`Sequence[str | PeftConfig | None]`): see [`estimate_cost`].
        batch_size (`int`): images per step.
        dtype (`torch.dtype` or `str`, *optional*): of the weights; by default the model's, float32 for configurations.
        autocast (`torch.dtype` or `str`, *optional*): compute in this dtype under `torch.autocast`, as `bf16=True` of
            the Trainer does.
        gradient_checkpointing (`bool`): recompute blocks in the backward pass.
        optimizer (`str`): "adamw", "sgd" (with momentum) or "none".
        memory_limit (`int`, *optional*): bytes that training may use; by default what the device has available.
        headroom (`float`, *optional*): share of the limit that the largest batch leaves free; by default 0.1, on CPUs
            0.45.
        device (`torch.device` or `str`, *optional*): whose kernels are assumed; by default the model's device, for
            configurations a GPU if there is one.
        num_labels (`int`, *optional*): labels of the head, for configurations.
        num_virtual_tokens (`int` or `list[int]`): prompts per prompted block.
        lora_r, partial_blocks, mlp_layers, adapter_reduction (`int`): as for `vpt-peft train`.
        fields: further fields of `VPTConfig` or `GatedVPTConfig`.

    Returns:
        One [`CostEstimate`] per method, in the same order.

    Raises:
        ValueError: a value is out of range, a method is unknown or does not fit the model, or weights are quantised.
        OSError: there is no such configuration.
    """
    options = MethodOptions(num_virtual_tokens, lora_r, partial_blocks, mlp_layers, adapter_reduction, fields)
    weights, compute = _as_dtype("dtype", dtype), _as_dtype("autocast", autocast)
    _check(methods, batch_size, optimizer, memory_limit, headroom, num_labels)
    model: Any = model_or_config if isinstance(model_or_config, nn.Module) else _build(model_or_config, num_labels)
    given = model is model_or_config
    if isinstance(model, PeftModel) and any(method is not None for method in methods):
        raise ValueError("the model has an adapter already: pass method=None to estimate it as it is.")
    packed = next((path for path, module in model.named_modules() if has_packed_weights(module)), None)
    if packed is not None:
        raise ValueError(
            f"{packed} has quantised weights, whose kernels are not simulated: pass the model's configuration or its float "
            "weights. `step_bytes` is about the same for both; `weight_bytes` is that of the float model."
        )
    target = _device(model if given else None, device)
    # The model's own memory is no longer available, but is part of what training takes
    is_there = given and next(model.parameters()).device.type == target.type
    limit = memory_limit if memory_limit is not None else _available(target) + is_there * _bytes(model)
    if headroom is None:
        headroom = HEADROOM_CPU if target.type == "cpu" else HEADROOM
    estimates = []
    specs: dict[str | None, EncoderSpec] = {}
    for method in methods:
        backbone = getattr(method, "backbone", None) or fields.get("backbone")
        # Modules that methods add draw random values before they are emptied
        with torch.random.fork_rng(devices=[]):
            if method is not None and backbone not in specs:
                specs[backbone] = find_encoder(model, backbone)
            if getattr(method, "skip_unread", method in PROMPT_METHODS and fields.get("skip_unread")):
                spec = specs[backbone]
                check_skip_unread(_base(model), submodule(model, spec.path), spec)
            meta_model, path = blank_copy(model, "meta", weights), None
            if method is not None:
                path = specs[backbone].path
                meta_model = apply_to_meta_model(meta_model, specs[backbone], method, options)
        if not any(parameter.requires_grad for parameter in meta_model.parameters()):
            raise ValueError(f"method={_name(method)!r} trains nothing of {type(model).__name__}.")
        if gradient_checkpointing:
            _checkpoint(_base(meta_model))
        simulate = _simulator(meta_model, target, compute, path)
        estimates.append(_estimate(meta_model, _name(method), simulate, batch_size, optimizer, limit, headroom))
    return estimates


def _check(
    methods: Sequence[Any],
    batch_size: int,
    optimizer: str,
    memory_limit: int | None,
    headroom: float | None,
    num_labels: int | None,
) -> None:
    for method in methods:
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
        if not isinstance(method, str | PeftConfig | None):
            raise ValueError(f"method={method!r} must be a name or a PEFT configuration.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ValueError(f"batch_size={batch_size!r} must be an integer from 1 to {MAX_BATCH_SIZE:,}.")
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer={optimizer!r} is unknown; choose one of {', '.join(OPTIMIZER_STATES)}.")
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels={num_labels} must be at least 1.")
    if memory_limit is not None and memory_limit < 1:
        raise ValueError(f"memory_limit={memory_limit} must be a positive number of bytes.")
    if headroom is not None and not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom} must be a share of at least 0 and below 1.")


def _as_dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"{name}={value!r} is not a floating-point type; use float32, bfloat16 or float16.")
    return found


def _build(source: PreTrainedConfig | str, num_labels: int | None) -> PreTrainedModel:
    """A model with random weights, which are needed only to look at how its attention works."""
    if isinstance(source, str):
        folder = str(embedded_path(source)) if source in EMBEDDED_FOLDERS else source
        try:
            source = AutoConfig.from_pretrained(folder)
        except OSError as error:
            raise OSError(f"{source!r} is not a folder, and its configuration cannot be fetched: {error}") from error
    config: Any = source
    if config.model_type == "vit_mae":
        # transformers has no classifier for MAE checkpoints; they are read as ViTs
        config = ViTConfig.from_dict({**config.to_dict(), "model_type": "vit"})
    if num_labels is not None:
        config = type(config).from_dict({**config.to_dict(), "num_labels": num_labels})
    is_classifier = type(config) in AutoModelForImageClassification._model_mapping
    with torch.random.fork_rng(devices=[]):
        return (AutoModelForImageClassification if is_classifier else AutoModel).from_config(
            config, dtype=torch.float32
        )


def _device(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={str(device)!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    if model is not None:
        found = next(model.parameters()).device
        return found if found.type != "meta" else torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _available(device: torch.device) -> int:
    """Free memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _name(method: str | PeftConfig | None) -> str:
    if isinstance(method, PeftConfig):
        return str(getattr(method.peft_type, "value", method.peft_type)).lower()
    return "as it is" if method is None else method


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _checkpoint(model: Any) -> None:
    """Let blocks be computed again, by the name transformers has for it."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)()
            return
    raise ValueError(f"gradient_checkpointing=True: {type(model).__name__} does not support it.")


def _simulator(
    meta_model: nn.Module, device: torch.device, autocast: torch.dtype | None, path: str | None
) -> Callable[[int], StepCost]:
    """Return a function that simulates a step of a number of images.

    The whole model runs if images are its main input; otherwise its vision encoder does.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = blank_copy(meta_model, device)
    base = _base(model)
    parameters = find_parameters(model)
    if parameters is not None:
        encoder: Any = parameters.encoder
    else:
        encoder = base if path is None else submodule(base, path)
    runs = model if getattr(base, "main_input_name", None) in IMAGE_INPUTS else encoder

    @cache
    def simulate(images: int) -> StepCost:
        failure: Exception | None = None
        for sample in sample_inputs(encoder):
            with mode:
                inputs = {
                    name: torch.empty((images, *value.shape[1:]), dtype=value.dtype, device=device)
                    if isinstance(value, torch.Tensor)
                    else value
                    for name, value in sample.items()
                }
            try:
                return simulate_step(runs, inputs, mode, autocast)
            except Exception as error:
                failure = failure or error
        raise ValueError(f"{type(base).__name__} cannot be simulated: {failure}") from failure

    return simulate


def _estimate(
    meta_model: nn.Module,
    method: str,
    simulate: Callable[[int], StepCost],
    batch_size: int,
    optimizer: str,
    limit: int,
    headroom: float,
) -> CostEstimate:
    trained = [parameter for parameter in meta_model.parameters() if parameter.requires_grad]
    state_bytes = OPTIMIZER_STATES[optimizer] * sum(parameter.nbytes for parameter in trained)

    def used(images: int) -> int:
        return simulate(images).peak_bytes + simulate(images).input_bytes

    step, weights = simulate(batch_size), _bytes(meta_model)
    room = int(limit * (1 - headroom)) - weights - state_bytes
    return CostEstimate(
        method=method,
        batch_size=batch_size,
        dtype=str(next(p.dtype for p in _base(meta_model).parameters() if p.is_floating_point())).removeprefix(
            "torch."
        ),
        trainable_values=sum(parameter.numel() for parameter in trained),
        total_values=sum(parameter.numel() for parameter in meta_model.parameters()),
        disk_bytes=safetensors_bytes(saved_tensors(meta_model)),
        forward_flops=step.forward_flops,
        step_flops=step.step_flops,
        weight_bytes=weights,
        optimizer_bytes=state_bytes,
        image_bytes=step.input_bytes,
        step_bytes=step.peak_bytes,
        memory_limit=limit,
        largest_batch_size=largest_batch(used, room, (batch_size, used(batch_size))),
    )


def largest_batch(peak: Callable[[int], int], room: int, known: tuple[int, int]) -> int:
    """Return the most images whose step fits into `room` bytes, from one or two further simulations.

    Args:
        peak (`Callable[[int], int]`): bytes that a step of a number of images adds. They grow linearly, except for few
            images, where what does not depend on them (the gradients of all weights) can dominate.
        room (`int`): bytes.
        known (`tuple[int, int]`): a number of images with its bytes.
    """
    size, used = known
    guess = min(max(size * max(room, 0) // used, 1), MAX_BATCH_SIZE)
    needed = peak(guess)
    per_image = (needed - used) / (guess - size) if guess != size else used / size
    found = guess + math.floor((room - needed) / max(per_image, 1.0))
    found = min(max(found, 0), MAX_BATCH_SIZE)
    while 0 < found < SMALL_BATCH and peak(found) > room:
        found -= 1
    return found
