"""Time and memory of training steps and inference, subjects interleaved and each paired with the floor beside it."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from .subjects import LABELS, Subject


logger = logging.getLogger(__name__)

# Subjects between two runs of the floor: each is paired with the mean of the floor before and after its group
GROUP = 2


@dataclass
class Samples:
    """Seconds of one subject, one entry per round, and of the floor at the same time."""

    seconds: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)


class Runner:
    """A subject with its inputs and optimizer.

    Args:
        subject: The model.
        images: `(batch, channels, height, width)`.
        compiled: Run it through `torch.compile`.
    """

    def __init__(self, subject: Subject, images: torch.Tensor, compiled: bool) -> None:
        self.subject, self.images, self.device = subject, images, images.device
        self.labels = torch.arange(images.shape[0], device=images.device) % LABELS
        self.call: Any = torch.compile(subject.model, dynamic=False) if compiled else subject.model
        # A rate of zero does all of the update's work and leaves the weights, which the subjects share, as they are
        self.optimizer = (
            torch.optim.AdamW(subject.trainable(), lr=0.0, weight_decay=0.0, fused=True) if subject.trains else None
        )

    def logits(self) -> torch.Tensor:
        """Logits `(batch, labels)` in float32."""
        output = self.call(pixel_values=self.images)
        return (output if isinstance(output, torch.Tensor) else output.logits).float()

    def step(self) -> None:
        """Forward and backward pass and AdamW's update."""
        if self.optimizer is None:
            raise ValueError(f"{self.subject.key} does not train.")
        F.cross_entropy(self.logits(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer(self) -> None:
        """One forward pass without gradients."""
        self.logits()

    def state_bytes(self) -> int:
        """Memory of the optimizer state."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        values = (value for state in states for value in state.values())
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def added_memory(runner: Runner) -> int:
    """Most bytes a warm training step has in use at one time beyond weights and images: activations, gradients,
    temporaries and the optimizer state.

    On a GPU the peak of torch's allocator; on a CPU the peak of the running sum over every allocation and release that
    torch's profiler records, which is the same quantity and repeats to the byte.
    """
    runner.subject.model.train()
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
        before = torch.cuda.memory_allocated(runner.device)
        torch.cuda.reset_peak_memory_stats(runner.device)
        runner.step()
        torch.cuda.synchronize(runner.device)
        return torch.cuda.max_memory_allocated(runner.device) - before + runner.state_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        runner.step()
    recorded: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(
        (event for event in recorded if event.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        current += event.nbytes()
        peak = max(peak, current)
    return peak + runner.state_bytes()


def warm_up(runners: Sequence[Runner]) -> tuple[list[Runner], dict[str, int], dict[str, str]]:
    """Run everything once and measure memory.

    Returns:
        The runners that work, the memory a training step adds by key, and the first line of the error of those that
        do not (a method that cannot be compiled, a batch that does not fit).
    """
    working, memory, failed = [], {}, {}
    for runner in runners:
        key = runner.subject.key
        try:
            if runner.subject.trains:
                runner.subject.model.train()
                runner.step()
                memory[key] = added_memory(runner)
            runner.subject.model.eval()
            runner.infer()
        except Exception as error:
            logger.warning("%s is left out: %s", key, error)
            failed[key] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            continue
        working.append(runner)
    return working, memory, failed


def interleave(runners: Sequence[Runner], rounds: int, training: bool) -> dict[str, Samples]:
    """Time every runner once per round, the first of them (the floor) also between every few others.

    The order is reversed from one round to the next, so that drift over time falls on all alike.

    Args:
        training: Time training steps of those that train; otherwise inference.
    """
    floor, others = runners[0], [r for r in runners[1:] if r.subject.trains or not training]
    samples = {runner.subject.key: Samples() for runner in (floor, *others)}
    for runner in (floor, *others):
        runner.subject.model.train(training)

    def run(runner: Runner) -> float:
        return seconds(runner.step if training else runner.infer, runner.device)

    def run_round(order: Sequence[Runner]) -> None:
        before = run(floor)
        for group in _groups(order):
            times = [run(runner) for runner in group]
            after = run(floor)
            for runner, taken in zip(group, times, strict=True):
                samples[runner.subject.key].seconds.append(taken)
                samples[runner.subject.key].floor.append((before + after) / 2)
            samples[floor.subject.key].seconds.append(after)
            samples[floor.subject.key].floor.append(before)
            before = after

    for number in range(rounds):
        gc.collect()
        gc.disable()
        try:
            run_round(others if number % 2 == 0 else others[::-1])
        finally:
            gc.enable()
        logger.info("%s: round %d of %d", "training" if training else "inference", number + 1, rounds)
    return samples


def _groups(runners: Sequence[Runner]) -> Iterator[Sequence[Runner]]:
    for start in range(0, len(runners), GROUP):
        yield runners[start : start + GROUP]
