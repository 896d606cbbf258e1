"""One training step on tensors without data: its FLOPs and the memory it takes, for any model, in about a second."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch counts the attention kernels of GPUs only
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}


@dataclass(frozen=True)
class StepCost:
    """What one training step takes, without the optimizer's update.

    Args:
        forward_flops, step_flops (`int`): floating-point operations of the matrix products of the forward pass, and of
            forward and backward pass; a multiply-add counts as two.
        peak_bytes (`int`): peak memory beyond weights and inputs: activations, gradients, temporaries.
        input_bytes (`int`): the images.
    """

    forward_flops: int
    step_flops: int
    peak_bytes: int
    input_bytes: int


class StepTracker(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all storages alive that were made while it is active.

    torch's own `FlopCounterMode` counts the same FLOPs, but its module hooks keep activations alive.

    Args:
        existing (`Iterable[torch.Tensor]`): tensors whose storages do not count.
    """

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.flops = self.current = self.peak = 0
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {storage._cdata for storage in self._existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def blank_copy(
    model: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A deep copy of `model`, hooks and adapters included, with parameters and buffers that are empty.

    On the meta device, or under a `FakeTensorMode`, it takes no memory.

    Args:
        model (`nn.Module`): stays as it is.
        device (`torch.device` or `str`, *optional*): where the copy is; by default the model's.
        dtype (`torch.dtype`, *optional*): of floating-point parameters and buffers; by default they keep theirs.
    """

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device=device or tensor.device)

    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    memo.update({id(buffer): empty(buffer) for buffer in model.buffers()})
    return copy.deepcopy(model, memo)


def simulate_step(
    model: nn.Module, inputs: Mapping[str, Any], mode: FakeTensorMode, autocast: torch.dtype | None = None
) -> StepCost:
    """Run forward and backward pass of a model made by [`blank_copy`] under `mode`; its gradients are dropped.

    Args:
        model (`nn.Module`): the copy.
        inputs (`Mapping[str, Any]`): keyword arguments of the model, made under `mode`.
        mode (`FakeTensorMode`): gives tensors without data.
        autocast (`torch.dtype`, *optional*): compute in this dtype under `torch.autocast`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device.type
    given = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]
    tracker = StepTracker([*tensors, *given])
    model.train()
    with mode, tracker:
        with torch.autocast(device, autocast) if autocast is not None else contextlib.nullcontext():
            loss = _scalar(model(**inputs))
        forward = tracker.flops
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return StepCost(forward, tracker.flops, tracker.peak, sum(tensor.nbytes for tensor in given))


def _scalar(output: Any) -> torch.Tensor:
    """Return a loss: the output's own, or the mean of its first tensor that has a gradient."""
    if isinstance(output, Mapping) and isinstance(output.get("loss"), torch.Tensor):
        return output["loss"]
    leaves: Iterator[torch.Tensor] = (
        leaf for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    )  # fmt: skip
    return next(leaves).float().mean()
