"""Several processes as one: a step is the mean over its images, however many of them each process has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


Batch = dict[str, Any]


def count_rows(batch: Batch) -> int:
    """Return how many images a batch has."""
    return len(next(iter(batch.values())))


def first_rows(batch: Batch, count: int) -> Batch:
    """Return the first `count` images of a batch."""
    return {name: values[:count] for name, values in batch.items()}


def count_own(accelerator: Accelerator, batch: Batch) -> int:
    """Return how many images of the batch at hand are there for the first time.

    accelerate deals full batches to every process; in the last round it fills them up with images from the start.
    """
    rows, state = count_rows(batch), accelerator.gradient_state
    if accelerator.num_processes == 1 or not accelerator.even_batches:
        return rows
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)


def share_step(accelerator: Accelerator, batches: Sequence[Batch]) -> tuple[list[Batch], list[float]]:
    """Prepare the batches of one optimizer step so that every image of the step counts once and alike.

    A process left without an image keeps one, of no weight, as all have to take part.

    Args:
        accelerator: knows the processes, and whether the data is at its end.
        batches: those of this process.

    Returns:
        The batches without what was filled up, and a weight for the mean loss of each. The mean over processes and
        batches of weight times loss is the mean over the images of the step.
    """
    if not batches:
        return [], []
    processes, last = accelerator.num_processes, batches[-1]
    own, per_process = count_own(accelerator, last), count_rows(batches[0])
    counts = [count_rows(batch) for batch in batches[:-1]] + [own]
    images = sum(counts)
    if processes > 1:
        state = accelerator.gradient_state
        ended = state.end_of_dataloader and state.remainder > 0 and accelerator.even_batches
        images = (len(batches) - 1) * per_process * processes + (
            state.remainder if ended else count_rows(last) * processes
        )
    kept = list(batches)
    if own < count_rows(last):
        kept[-1] = first_rows(last, max(own, 1))
    return kept, [count * processes * len(batches) / images for count in counts]


def mean_over_processes(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a number over all processes; one that is not finite anywhere is finite nowhere."""
    return value if accelerator.num_processes == 1 else accelerator.reduce(value.clone(), "mean")  # type: ignore[return-value]


def pad_over_processes(accelerator: Accelerator, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return tensors that have the same shape in every process: filled up with -1, those of no sign with 0."""
    padded = []
    for tensor in tensors:
        fill = 0 if tensor.dtype == torch.uint8 else -1
        for dim in range(1, tensor.ndim):
            tensor = accelerator.pad_across_processes(tensor, dim=dim, pad_index=fill)  # type: ignore[assignment]
        padded.append(tensor)
    return tuple(padded)


def are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all values are finite numbers, in every process; every process has to ask."""
    # A sharded tensor is looked at where it is
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    found = torch.stack([tensor.detach().isfinite().all() for tensor in local]).all().float()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return bool(found)
