"""What a run will cost, measured on a few images before it starts: parameters, memory, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer

from .model import ParameterCounts


_TURNS = 3
# With fewer, the rate is back at zero before the model has learned
_FEW_STEPS = 100


@dataclass(frozen=True)
class StepCost:
    """One measured training step of `images` images.

    Args:
        images (`int`): batch size it was measured with.
        load_seconds (`float`): reading and transforming the images.
        step_seconds (`float`): forward and backward pass.
        activation_bytes (`int`): tensors kept for the backward pass.
    """

    images: int
    load_seconds: float
    step_seconds: float
    activation_bytes: int


def measure_step(trainer: Trainer, images: int = 8) -> StepCost:
    """Time reading a few training images and a forward and backward pass of them; the fastest of some turns counts.

    The first turn opens files and picks kernels and is left out; the fastest of the others is nearest to a long run.
    Gradients, buffers and random states are restored, so that training is not changed.

    Args:
        trainer (`Trainer`): ready to train.
        images (`int`): at most the batch size.
    """
    model: Any = trainer.model
    dataset: Any = trainer.train_dataset
    images = min(images, trainer.args.per_device_train_batch_size, len(dataset))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    load_times, step_times = [], []
    with torch.random.fork_rng():
        model.train()
        for _ in range(_TURNS):
            start = time.perf_counter()
            batch = trainer.data_collator([dataset[index] for index in range(images)])
            load_times.append(time.perf_counter() - start)
            _synchronize(trainer.args.device)
            start = time.perf_counter()
            inputs = send_to_device(batch, trainer.args.device)
            with SavedBytes(model.parameters()) as saved, trainer.compute_loss_context_manager():
                loss = model(**inputs).loss
            loss.backward()
            _synchronize(trainer.args.device)
            step_times.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    model.train(was_training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return StepCost(images, min(load_times[1:]), min(step_times[1:]), saved.total)


class SavedBytes:
    """Count the bytes of distinct storages that autograd keeps for the backward pass, without parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.total = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def expected_bytes(trainer: Trainer, counts: ParameterCounts, cost: StepCost) -> float:
    """Return the bytes of weights, gradients, optimizer state and the activations of a batch, extrapolated from `cost`."""
    args = trainer.args
    model: Any = trainer.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = 4 if "sgd" in str(args.optim) else 8
    activations = cost.activation_bytes * args.per_device_train_batch_size / cost.images
    return weights + counts.trainable * (4 + states) + activations


def describe_run(trainer: Trainer, counts: ParameterCounts, cost: StepCost) -> str:
    """Return the lines shown before training: what trains, and expected memory and time, extrapolated from `cost`."""
    args = trainer.args
    dataset: Any = trainer.train_dataset
    share = 100 * counts.trainable / counts.total
    batch, images = args.per_device_train_batch_size, len(dataset)
    total = expected_bytes(trainer, counts, cost)
    seconds = images / args.world_size * (cost.load_seconds + cost.step_seconds) / cost.images
    parts = {"of the method": counts.prompts, "of the head": counts.head, "others": counts.rest}
    listed = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = args.num_train_epochs
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(images / per_step) * epochs)
    hint = ""
    if steps < _FEW_STEPS:
        hint = (
            f"\n  Its {steps} steps may be too few; --num_train_epochs and --per_device_train_batch_size change that."
        )
    return (
        f"Trains {counts.trainable:,} of {counts.total:,} parameters ({share:.2f} %): {listed}.\n"
        f"Expects about {total / 1e6:,.0f} MB for weights, gradients, optimizer state and activations of {batch} images,\n"
        f"  and {seconds:,.0f} s per epoch of {images:,}, without evaluation (extrapolated from {cost.images} images)."
        + hint
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
