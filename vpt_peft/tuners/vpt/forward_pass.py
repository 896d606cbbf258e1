"""Forward pass: what travels through one call of the encoder, made when it is entered and gone when it is left."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from vpt_peft.encoder import EncoderSpec

from .config import VPTConfig
from .layout import BlockLayout, Layout
from .mixed import MixedBatch


class Adapter(Protocol):
    """What a forward pass needs of an adapter, see `parameters.PromptAdapter`."""

    name: str
    config: VPTConfig
    layout: Layout
    parts: dict[str, nn.Module]

    def prompts(self, key: str | None, batch: int) -> torch.Tensor: ...
    def pass_on(self, index: int, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor: ...
    def temperature(self, index: int) -> torch.Tensor | None: ...
    def sources(self) -> list[torch.Tensor]: ...


class Owner(Protocol):
    """The prompts of one encoder, see `parameters.VPTParameters`."""

    spec: EncoderSpec
    encoder: nn.Module
    root: nn.Module
    training: bool

    def active_names(self) -> list[str]: ...
    def adapter(self, name: str) -> Adapter: ...
    def begin_pass(self) -> ForwardPass: ...
    def head_modules(self) -> Iterable[nn.Module]: ...
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]: ...


class OwnerRef:
    """Where a module with hooks finds its owner. A copy of that module alone (of a norm that trains) has the same one."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnerRef:
        with_model = any(id(each) in memo for each in (self.owner, self.owner.root, self.owner.encoder))
        return OwnerRef(copy.deepcopy(self.owner, memo)) if with_model else self


def owner_of(module: nn.Module) -> Owner:
    """The prompts that a module with hooks belongs to."""
    return module.__dict__["_prompt_owner"].owner


BlockPrompts = list[tuple[Adapter, BlockLayout]]


@dataclass(slots=True, eq=False)
class BlockPass:
    """What travels through one block in one forward pass.

    Args:
        index: The block.
        prompts: The active adapters that have a part in the block, with what it does for them.
        mixed: The mixed batch, if it is one.
        states: Prompts that flow in, `(batch, prompts, width)`, by adapter; then what entered the block.
        batch: Number of images, where it is known.
        inserted: Number of prompt tokens in the sequence.
        padding: Where they pad a mixed batch.
        window_outputs: What attention gave for window prompts, `(batch, prompts, width)`.
        all_tokens: Of a last block that makes its prefix tokens alone, `(batch, tokens, width)`.
    """

    index: int
    prompts: BlockPrompts
    mixed: MixedBatch | None
    states: dict[str, torch.Tensor]
    batch: int = 1
    inserted: int = 0
    padding: torch.Tensor | None = None
    window_outputs: torch.Tensor | None = None
    all_tokens: torch.Tensor | None = None


@dataclass(eq=False)
class ForwardPass:
    """One call of an encoder: the adapters it started with and their prompts on the way through the blocks.

    Args:
        owner: The prompts of the encoder.
        adapters: The active adapters.
        mixed: The mixed batch, if it is one.
        checkpointing: Blocks may run again in the backward pass.
        reentrant: By re-entrant checkpointing.
        states: Prompts on their way to the next block, `(batch, prompts, width)` by adapter.
        final: Those that the head reads.
        block: The part of this pass in the block that runs.
        projecting: The adapter whose prompts are being projected, where each image has its own.
        is_of_block: A block runs by itself, without its encoder.
        before: The pass of another encoder that this one stands in.
    """

    owner: Owner
    adapters: list[Adapter]
    mixed: MixedBatch | None = None
    checkpointing: bool = False
    reentrant: bool = False
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    final: dict[str, torch.Tensor] = field(default_factory=dict)
    block: BlockPass | None = None
    projecting: Adapter | None = None
    is_of_block: bool = False
    before: ForwardPass | None = None

    def block_pass(self, index: int) -> BlockPass:
        """The part of this pass in block `index`, begun where it has not been."""
        if self.block is None or self.block.index != index:
            # A loop: compilers do not look through a comprehension that binds a name
            prompts: BlockPrompts = []
            for adapter in self.adapters:
                layout = adapter.layout[index]
                if layout is not None:
                    prompts.append((adapter, layout))
            self.block, self.states = BlockPass(index, prompts, self.mixed, self.states), {}
        return self.block

    def for_another_run(self) -> ForwardPass:
        """What the running block needs to run again; nothing that comes behind it, which would keep itself alive."""
        block = None if self.block is None else replace(self.block, window_outputs=None, all_tokens=None)
        return replace(self, states=dict(self.states), final={}, block=block, before=None)


class _Local(threading.local):
    forward_pass: ForwardPass | None = None
    maps: list | None = None


_local = _Local()


def current_pass(owner: Owner) -> ForwardPass | None:
    """The forward pass of an encoder that runs in this thread."""
    running = _local.forward_pass
    return running if running is not None and running.owner is owner else None


def begin_pass(running: ForwardPass) -> None:
    """A forward pass begins in this thread; one of another encoder that it stands in goes on afterwards."""
    before = _local.forward_pass
    running.before = before if before is not None and before.owner is not running.owner else None
    _local.forward_pass = running


def end_pass(owner: Owner) -> None:
    """The forward pass of an encoder in this thread has ended."""
    running = current_pass(owner)
    if running is not None:
        _local.forward_pass = running.before


def recorded_maps() -> list | None:
    """The list that full attention maps are recorded in, `None` outside of [`recording_maps`]."""
    return _local.maps


@contextmanager
def recording_maps(maps: list) -> Iterator[None]:
    """Record the full attention maps of the calls of this thread."""
    before, _local.maps = _local.maps, maps
    try:
        yield
    finally:
        _local.maps = before


class CheckpointedFunction:
    """Stands in for a block's checkpointing function: a block that runs again finds the pass it belonged to.

    The backward pass may run in another thread, after other passes, and with other adapters active.

    Args:
        wrapped: transformers' checkpointing function.
    """

    def __init__(self, wrapped: Callable) -> None:
        self.wrapped = wrapped

    @property
    def keywords(self) -> dict[str, Any]:
        """Of the wrapped function, a `functools.partial`."""
        return getattr(self.wrapped, "keywords", {})

    def __call__(self, function: Callable, *args: Any) -> Any:
        running = _local.forward_pass
        if running is None or torch.compiler.is_compiling():
            return self.wrapped(function, *args)
        kept = running.for_another_run()

        def run(*inputs: Any) -> Any:
            if _local.forward_pass is not None:
                return function(*inputs)
            begin_pass(kept.for_another_run())
            try:
                return function(*inputs)
            finally:
                end_pass(kept.owner)

        return self.wrapped(run, *args)
