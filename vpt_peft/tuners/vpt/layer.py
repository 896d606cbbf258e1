"""The tuner layer of one block: it brings prompts into the block's input and takes them out of its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vpt_peft.attention import AttentionExtras, PromptedConfig, attach_interceptor, project
from vpt_peft.encoder import BlockSpec, submodule

from . import tokens, windows
from .config import VPTConfig
from .forward_pass import Adapter, BlockPass, ForwardPass, Owner, begin_pass, current_pass, end_pass, recorded_maps
from .layout import BlockLayout
from .mixed import additive, for_images_of, per_image, spread_heads
from .modes import HOOKS_ARE_CHECKPOINTED


Pair = Sequence[torch.Tensor]


class PromptTunerLayer(BaseTunerLayer):
    """What the layers of blocks and the parameters share: they wrap nothing and cannot become weights."""

    def get_base_layer(self) -> nn.Module:
        """The layer itself: prompts stand beside the block, they do not wrap it."""
        return self  # type: ignore[return-value]

    @property
    def weight(self) -> torch.Tensor | None:  # type: ignore[override]
        return None

    @property
    def bias(self) -> None:  # type: ignore[override]
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: called where adapters of other methods on the same model are merged into weights."""

    def unmerge(self) -> None:
        """Nothing, see `merge`."""


class VPTLayer(nn.Module, PromptTunerLayer):
    """The tuner layer of one block, a child of it. It keeps nothing of a forward pass and owns no parameters.

    Args:
        index: Index of the block.
        spec: The block.
        block: The block this is a child of.
        owner: The prompts of the encoder.
    """

    adapter_layer_names = ()
    other_param_names = ("layouts", "merged_keys", "merged_values", "_merged_from")
    block: nn.Module
    owner: Owner

    def __init__(self, index: int, spec: BlockSpec, block: nn.Module, owner: Owner) -> None:
        super().__init__()
        self.index, self.spec = index, spec
        # Not by setattr, which would register them as submodules
        self.__dict__.update(block=block, owner=owner)
        self.layouts: dict[str, BlockLayout | None] = {}
        self.merged_keys = BufferDict({}, persistent=False)
        self.merged_values = BufferDict({}, persistent=False)
        # The parameters that merged keys and values were made of, as they were
        self._merged_from: dict[str, list[tuple[torch.Tensor, int]]] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._handles: list[Any] = []
        self._is_hooked = False

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Adapters whose keys and values are constants here."""
        return list(self._merged_from)

    def _get_available_adapters(self) -> set[str]:
        return {name for name, layout in self.layouts.items() if layout is not None}

    def attach(self) -> None:
        """Connect the block's attention; its input and output get hooks when an adapter needs them."""
        attention = submodule(self.block, self.spec.attention.path)
        if self.spec.attention.uses_interface:
            attention.config = PromptedConfig(attention.config, self)  # type: ignore[assignment, arg-type]
        else:
            self._handles += attach_interceptor(attention, self)

    def add(self, name: str, layout: BlockLayout | None, config: VPTConfig) -> None:
        """Take part in an adapter."""
        self.layouts[name] = layout
        at_input = self.index == 0 and config.project_patches
        skips = self.index + 1 == len(self.owner.spec.blocks) and config.skip_unread
        in_block = layout is not None and (layout.needs_hooks or config.prompt_dropout > 0.0)
        if not self._is_hooked and (at_input or skips or in_block):
            self._is_hooked = True
            self._handles += [
                self.block.register_forward_pre_hook(enter_block, with_kwargs=True),
                # First in line, so that hooks which capture hidden states see them without prompts.
                self.block.register_forward_hook(leave_block, prepend=True, always_call=True),
            ]

    def detach(self) -> None:
        """Take the hooks off and leave the block as it was."""
        for handle in self._handles:
            handle.remove()
        attention: Any = submodule(self.block, self.spec.attention.path)
        if isinstance(getattr(attention, "config", None), PromptedConfig):
            attention.config = attention.config.wrapped
        attention.__dict__.pop("_prompted_block", None)

    def _running(self) -> ForwardPass:
        """The forward pass that runs; a block that runs by itself gets the active adapters."""
        return current_pass(self.owner) or self.owner.begin_pass()

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Bring prompts into the block's input; `None` where it stays as it is."""
        running = current_pass(self.owner)
        if running is None:
            running = self.owner.begin_pass()
            running.is_of_block = True
            begin_pass(running)
        here, mixed, argument = running.block_pass(self.index), running.mixed, self.spec.argument
        hidden = original = kwargs[argument] if argument else args[0]
        here.batch = 1 if self.owner.spec.packed else hidden.shape[0]
        if running.checkpointing:
            here.prompts = [(a, self._as_input(layout, running)) for a, layout in here.prompts]
        if self.index == 0:
            hidden = self.project_patches(running, hidden)
        position = self.owner.spec.num_prefix_tokens
        among: dict[str, torch.Tensor] = {}
        for adapter, layout in here.prompts:
            if layout.mode == "kv":
                continue
            prompts = self.prompts_of(here, adapter, layout).to(hidden)
            if layout.mode == "add":
                hidden = for_images_of(mixed, adapter.name, hidden, hidden + prompts)
                continue
            images = here.batch if mixed is None else len(mixed.rows(adapter.name, hidden.device))
            prompts = prompts if prompts.shape[0] == images else prompts.expand(images, -1, -1)
            here.states[adapter.name] = prompts
            if layout.mode == "token":
                among[adapter.name] = prompts
        if among:
            parts = list(among.values())
            if mixed is not None:
                spread, here.padding = mixed.spread(among)
                parts = [spread]
            count = hidden.shape[1]
            hidden = tokens.insert_tokens(hidden, parts, position)
            if self.index == 0:
                tokens.keep_initial_hidden_state(original)
            here.inserted = hidden.shape[1] - count
            args, kwargs = tokens.widen_positions(args, kwargs, count, position, here.inserted)
        elif self.skips_unread(running, here, args[0 if argument else 1 :], kwargs):
            here.all_tokens = hidden
            hidden = hidden[:, :position]
        if hidden is original:
            return None
        if argument:
            return args, {**kwargs, argument: hidden}
        return (hidden, *args[1:]), kwargs

    def _as_input(self, layout: BlockLayout, running: ForwardPass) -> BlockLayout:
        """Prompts that flow into a checkpoint become tokens: a re-entrant one sees gradients only through its inputs."""
        flows_in = layout.source is None and layout.mode in ("kv", "token")
        lost = HOOKS_ARE_CHECKPOINTED and (flows_in or layout.passes_on)
        if running.reentrant and (layout.mode == "window" or lost or (flows_in and not self.spec.takes_tokens)):
            raise ValueError(
                "prompts that flow from block to block lose their gradient under re-entrant gradient checkpointing "
                "here; use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        return replace(layout, mode="token") if flows_in and self.spec.takes_tokens else layout

    def prompts_of(self, here: BlockPass, adapter: Adapter, layout: BlockLayout) -> torch.Tensor:
        """The prompts of one adapter as they come into this block, `(batch or 1, prompts, width)`."""
        if layout.source is not None:
            return adapter.prompts(layout.source, here.batch)
        return windows.merge_stage(self.owner, self.index, here.states[adapter.name])

    def project_patches(self, running: ForwardPass, hidden: torch.Tensor) -> torch.Tensor:
        """The second reading of the paper's projection: patch tokens pass it too, at the input of the first block."""
        for adapter in running.adapters:
            if adapter.config.project_patches:
                projection: Any = adapter.parts["projection"]
                is_special = torch.zeros(hidden.shape[1], 1, dtype=torch.bool, device=hidden.device)
                is_special[list(self.owner.spec.special)] = True
                projected = projection(hidden.to(projection.weight.dtype)).to(hidden.dtype)
                chosen = torch.where(is_special, hidden, projected)
                hidden = for_images_of(running.mixed, adapter.name, hidden, chosen)
        return hidden

    def skips_unread(self, running: ForwardPass, here: BlockPass, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether this is the last block and is to make its prefix tokens alone (`skip_unread`)."""
        wanted = running.adapters and all(a.config.skip_unread and not a.config.pools for a in running.adapters)
        if not wanted or self.index + 1 < len(self.owner.spec.blocks) or running.checkpointing:
            return False
        if any(layout.mode != "add" and layout.mode != "kv" for _, layout in here.prompts):
            return False
        # Masks, biases and rotary tables are made for all tokens
        others = [*args, *(value for name, value in kwargs.items() if name != self.spec.argument)]
        return not any(isinstance(value, (torch.Tensor, tuple)) for value in others)

    def leave(self, output: Any) -> Any:
        """Take prompts out of the block's output, and pass on those that the next block or the head needs."""
        running = current_pass(self.owner)
        if running is None or running.block is None or running.block.index != self.index:
            return None
        here, running.block = running.block, None
        if running.is_of_block:
            end_pass(self.owner)
        if output is None:
            return None
        among = [(a, layout) for a, layout in here.prompts if layout.mode == "token"]
        hidden = output[0] if isinstance(output, tuple) else output
        if among:
            lengths = [here.states[a.name].shape[1] for a, _ in among]
            cut = lengths if here.mixed is None else [here.inserted]
            before, parts, behind = tokens.split_tokens(hidden, self.owner.spec.num_prefix_tokens, cut)
            if here.mixed is not None:
                rows = [here.mixed.rows(a.name, hidden.device) for a, _ in among]
                parts = [parts[0][mine, :length] for mine, length in zip(rows, lengths, strict=True)]
            for (adapter, layout), part in zip(among, parts, strict=True):
                self.pass_on(running, here, adapter, layout, part)
            hidden = torch.cat([before, behind], dim=1)
        for adapter, layout in here.prompts:
            if layout.mode == "window":
                self.pass_on(running, here, adapter, layout, windows.finish(self.block, self.spec, here, adapter))
        if not among:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def pass_on(
        self, running: ForwardPass, here: BlockPass, adapter: Adapter, layout: BlockLayout, prompts: torch.Tensor
    ) -> None:
        """Give the prompts' outputs `(batch, prompts, width)` to the next block, or to the head after the last."""
        if not layout.passes_on:
            return
        is_last = self.index + 1 == len(self.owner.spec.blocks)
        states = running.final if is_last else running.states
        states[adapter.name] = adapter.pass_on(self.index, here.states[adapter.name], prompts)

    def extras(self, like: torch.Tensor) -> AttentionExtras | None:
        """What prompts add to this block's attention call; `None` for nothing.

        Args:
            like: Prompts come on the device and in the dtype of this tensor.
        """
        running, maps = self._running(), recorded_maps()
        here, spec = running.block_pass(self.index), self.spec.attention
        if not here.prompts and here.all_tokens is None and maps is None:
            return None
        extras = AttentionExtras(mask_open=spec.mask_open, maps=maps, inserted=here.inserted)
        extras.prefix, extras.all_tokens = self.owner.spec.num_prefix_tokens, here.all_tokens
        pairs: dict[str, Pair] = {}
        beside: list[torch.Tensor] = []
        for adapter, layout in here.prompts:
            temperature = adapter.temperature(self.index)
            if temperature is not None:
                temperature = per_image(here.mixed, adapter.name, temperature)
                extras.temperature = temperature if extras.temperature is None else extras.temperature * temperature
            if layout.mode == "window":
                beside.append(here.states[adapter.name])
                pairs[adapter.name] = self._project(beside[-1], like)
            elif layout.mode == "kv":
                running.projecting = adapter
                pairs[adapter.name] = self.key_values(here, adapter, layout, like)
                running.projecting = None
        if beside:
            if here.mixed is not None:
                raise ValueError(
                    "adapter_names: prompts that run beside windows cannot share a batch; run them apart."
                )
            extras.queries = project(self.block, spec, tokens.join(beside, dim=1), "query")[0]
        if here.padding is not None:
            extras.inserted_mask = additive(here.padding, like.dtype)
        if len(pairs) == 1 and here.mixed is None:
            ((extras.keys, extras.values),) = pairs.values()
        elif pairs and here.mixed is None:
            extras.keys, extras.values = (tokens.join(parts) for parts in zip(*pairs.values(), strict=True))
        elif pairs and here.mixed is not None:
            extras.keys, padding = spread_heads(here.mixed, {name: pair[0] for name, pair in pairs.items()})
            extras.values, _ = spread_heads(here.mixed, {name: pair[1] for name, pair in pairs.items()})
            extras.mask = None if padding is None else additive(padding, like.dtype)
        return extras

    def _project(self, prompts: torch.Tensor, like: torch.Tensor) -> Pair:
        return project(self.block, self.spec.attention, prompts.to(like), "key", "value")

    def key_values(self, here: BlockPass, adapter: Adapter, layout: BlockLayout, like: torch.Tensor) -> Pair:
        """Keys and values of one adapter's prompts, `(batch or 1, heads, prompts, head_dim)`; constants once merged."""
        if self.is_merged(adapter):
            name = adapter.name
            return self.merged_keys[name].to(like), self.merged_values[name].to(like)
        return self._project(self.prompts_of(here, adapter, layout), like)

    def is_merged(self, adapter: Adapter) -> bool:
        """Whether merged keys and values are those of the adapter's present values, which do not train in this pass."""
        if adapter.name not in self._merged_from:
            return False
        made_of, sources = self._merged_from[adapter.name], adapter.sources()
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return False
        if torch.compiler.is_compiling():
            # Parameters have stand-ins in a graph, which have no versions
            return True
        return len(made_of) == len(sources) and all(
            old is source and version == source._version
            for (old, version), source in zip(made_of, sources, strict=True)
        )

    def receive_outputs(self, outputs: torch.Tensor) -> None:
        """Attention outputs of prompts beside windows, `(batch · windows, prompts, heads, head_dim)`."""
        here = self._running().block_pass(self.index)
        here.window_outputs = outputs.unflatten(0, (here.batch, -1)).mean(1).flatten(-2)

    def merge_prompts(self, adapter: Adapter) -> None:
        """Turn this block's own prompts into constant keys and values, so that inference needs no norm or projection."""
        name, layout = adapter.name, self.layouts.get(adapter.name)
        if layout is None or layout.mode != "kv" or layout.source is None:
            return
        device, dtype = self.owner.device_and_dtype()
        begin_pass(ForwardPass(self.owner, [adapter]))
        try:
            with torch.no_grad():
                like = torch.empty(0, device=device, dtype=dtype)
                keys, values = self._project(adapter.prompts(layout.source, 1), like)
        finally:
            end_pass(self.owner)
        self.merged_keys[name], self.merged_values[name] = keys.contiguous(), values.contiguous()
        self._merged_from[name] = [(source, source._version) for source in adapter.sources()]

    def unmerge_prompts(self) -> None:
        """Go back from constants to prompts."""
        for constants in (self.merged_keys, self.merged_values, self._merged_from):
            constants.clear()

    def extra_repr(self) -> str:
        modes = {name: None if layout is None else layout.mode for name, layout in self.layouts.items()}
        return f"block={self.index}, " + ", ".join(f"{name}: {mode}" for name, mode in modes.items())


def enter_block(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a block."""
    return block.prompt_tuner.enter(args, kwargs)  # type: ignore[union-attr, operator]


def leave_block(block: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a block; it also runs where the block failed."""
    return block.prompt_tuner.leave(output)  # type: ignore[union-attr, operator]
