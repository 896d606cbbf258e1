"""Run an encoder once on a small random input and record which modules and attention calls take part."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_utils import AttentionInterface

from .quantized import allow_packing, forbid_packing


MATRIX_PRODUCTS = frozenset({torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__})
SOFTMAXES = frozenset({torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax})
SDPA = torch.nn.functional.scaled_dot_product_attention
# A trace replaces the look-up of attention functions, which all models share
_one_trace = threading.Lock()


@dataclass
class Call:
    """One call of a module: its path, first tensor argument (with its name, if passed by keyword) and first output.

    `bias` holds dotted paths of parameters outside the module whose concatenation was added to its output.
    """

    path: str
    module: nn.Module
    input: torch.Tensor | None
    argument: str | None = None
    output: torch.Tensor | None = None
    order: int = -1
    bias: tuple[str, ...] = ()


@dataclass
class AttentionCall:
    """One softmax attention inside a module, with `query`, `key` and `value` as they enter the product."""

    path: str
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    mask: torch.Tensor | None = None
    uses_interface: bool = False
    eager: Callable | None = None
    order: int = -1


@dataclass
class Trace:
    """All calls of one forward pass; `order` counts modules and attention calls as they finish."""

    calls: list[Call] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    failure: Exception | None = None


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor in nested tuples, lists and dicts (hidden states come first in every block)."""
    if isinstance(value, torch.Tensor):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


class Recorder(TorchFunctionMode):
    """Records module calls, `AttentionInterface` look-ups and softmax attention while active."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in encoder.named_modules()}
        self.stack: list[Call] = []
        self.trace = Trace()
        self.products: list[tuple[Call, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        owned = ((module, module._parameters.get("weight")) for module in self.paths)
        self.owners = {id(weight): module for module, weight in owned if weight is not None}
        self.joined: dict[int, tuple[torch.Tensor, tuple[str, ...]]] = {}
        self.inside_interface = False
        self.thread = threading.get_ident()
        self.count = 0

    def is_elsewhere(self) -> bool:
        """Whether the code that asks runs in another thread, and so belongs to another forward pass."""
        return threading.get_ident() != self.thread

    def enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_elsewhere():
            return
        tokens, argument = first_tensor(args), None
        if tokens is None:
            argument = next((name for name, value in kwargs.items() if isinstance(value, torch.Tensor)), None)
            argument = "hidden_states" if "hidden_states" in kwargs else argument
            tokens = kwargs[argument] if argument is not None else None
        self.stack.append(Call(self.paths[module], module, tokens, argument))

    def leave_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.is_elsewhere():
            return
        call = self.stack.pop()
        call.output, call.order = first_tensor(output), self.tick()
        self.trace.calls.append(call)

    def tick(self) -> int:
        self.count += 1
        return self.count

    def get_interface(self, name: str, default: Callable) -> Callable:
        def traced(module, query, key, value, attention_mask=None, *args, **kwargs):
            mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
            path = self.paths.get(module, "")
            call = AttentionCall(path, module, query, key, value, mask, True, default, self.tick())
            self.trace.attention.append(call)
            self.inside_interface = True
            try:
                return default(module, query, key, value, mask, *args, **kwargs)
            finally:
                self.inside_interface = False

        return traced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.stack and not self.inside_interface:
            if func in MATRIX_PRODUCTS:
                self.see_product(args[0], args[1], result)
            elif func in SOFTMAXES:
                self.see_softmax(args[0] if args else kwargs["input"])
            elif func is torch.nn.functional.linear:
                names = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
                self.see_linear(names["input"], names["weight"], names.get("bias"), result)
            elif func is torch.cat:
                self.see_joined(args[0] if args else kwargs["tensors"], result)
            elif func is SDPA:
                names = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
                top = self.stack[-1]
                self.trace.attention.append(
                    AttentionCall(
                        top.path, top.module, names["query"], names["key"], names["value"], names.get("attn_mask"),
                        order=self.tick(),
                    )
                )  # fmt: skip
        return result

    def see_product(self, left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> None:
        waiting = self.trace.attention[-1] if self.trace.attention else None
        if waiting is not None and waiting.value is None and waiting.module is self.stack[-1].module:
            if left.shape[-1] == waiting.key.shape[-2] == right.shape[-2]:
                waiting.value = right
                return
        self.products.append((self.stack[-1], left, right, result))

    def see_softmax(self, scores: torch.Tensor) -> None:
        for call, left, right, result in reversed(self.products):
            # The softmax may be a module inside the one that takes the product
            if any(call is each for each in self.stack[-2:]) and result.shape[-2:] == scores.shape[-2:]:
                key = right.transpose(-1, -2)
                self.trace.attention.append(AttentionCall(call.path, call.module, left, key, None, order=self.tick()))
                return

    def see_joined(self, parts: Any, result: torch.Tensor) -> None:
        """Remember a bias made of several parameters or buffers of the module that runs."""
        names = [self.name_of(part) for part in parts] if result.dim() == 1 else [None]
        if all(names):
            self.joined[id(result)] = result, tuple(name for name in names if name)

    def see_linear(
        self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, result: torch.Tensor
    ) -> None:
        """Record a linear layer whose weight is used without calling the layer, with a bias from elsewhere."""
        owner = self.owners.get(id(weight))
        if owner is None or owner is self.stack[-1].module:
            return
        names: tuple[str, ...] = ()
        own = owner._parameters.get("bias")
        if own is not bias:
            if own is not None or bias is None:
                return
            name = self.name_of(bias)
            names = (name,) if name else self.joined.get(id(bias), (bias, ()))[1]
            if not names and bias.any():
                return
        self.trace.calls.append(Call(self.paths[owner], owner, tokens, None, result, self.tick(), names))

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Dotted path of a parameter or buffer of the module that runs."""
        top = self.stack[-1]
        own = {**top.module._parameters, **top.module._buffers}
        found = next((name for name, value in own.items() if value is tensor), None)
        return f"{top.path}.{found}".lstrip(".") if found else None


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode and restore the mode of every submodule afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    unpacked = forbid_packing(module)
    try:
        yield
    finally:
        allow_packing(unpacked)
        for child, mode in modes:
            child.training = mode


@contextmanager
def random_state_kept(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Give the generators of the CPU and of the model's GPUs their state back afterwards.

    Args:
        model: What is going to run.
        seed: Seed of these generators for the time being, `None` to go on from their state.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            # `torch.manual_seed` would also seed GPUs that are not the model's
            for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
                generator.manual_seed(seed)
        yield


def trace_encoder(encoder: nn.Module, inputs: dict[str, Any]) -> Trace:
    """Run `encoder` once under a recorder, in eval mode, without gradients, leaving the random state as it was.

    If the pass fails, `Trace.failure` holds the exception and the trace what was recorded until then.
    """
    with _one_trace:
        recorder = Recorder(encoder)
        find_function = AttentionInterface.get_interface

        def get_interface(interface: AttentionInterface, name: str, default: Callable) -> Callable:
            if recorder.is_elsewhere():
                return find_function(interface, name, default)
            return recorder.get_interface(name, default)

        removers = []
        for module in recorder.paths:
            removers.append(module.register_forward_pre_hook(recorder.enter_module, with_kwargs=True))
            removers.append(module.register_forward_hook(recorder.leave_module, with_kwargs=True))
        try:
            with (
                in_eval(encoder),
                torch.no_grad(),
                random_state_kept(encoder),
                patch.object(AttentionInterface, "get_interface", get_interface),
                recorder,
            ):
                encoder(**inputs)
        except Exception as failure:
            recorder.trace.failure = failure
        finally:
            for remover in removers:
                remover.remove()
        return recorder.trace


def perturbed(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Named parameters plus noise, for `torch.func.functional_call`; quantised ones are left out.

    Zero weights, as in a new head, would hide what an output depends on.
    """
    generator = torch.Generator().manual_seed(0)
    return {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, parameter in parameters
        if parameter.is_floating_point()
        and parameter.element_size() > 1
        and not is_traceable_wrapper_subclass(parameter)
    }


class _Reached(Exception):
    """Ends a forward pass at the block whose arguments are asked for."""


def block_arguments(encoder: nn.Module, block: nn.Module, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The positional and keyword arguments `block` receives when `encoder` runs on `inputs`; it stops there."""
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def stop(module, args, kwargs):
        seen.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with in_eval(encoder), torch.no_grad(), random_state_kept(encoder, seed=0):
            encoder(**inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
