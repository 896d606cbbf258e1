"""The tuner layer of one block: it brings prompts in, takes them out and hands them on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vpt_peft.attention import AttentionExtras, PromptedConfig, attach_interceptor, project_key_values, project_queries
from vpt_peft.encoder import BlockSpec, submodule

from .plan import Role
from .sequence import cut_tokens, insert_tokens, keep_initial_hidden_state, replace_tokens, widen_positions


if TYPE_CHECKING:
    from .store import VPTPromptStore


class PromptTunerLayer(BaseTunerLayer):
    """What both kinds of tuner layers share: they wrap nothing and cannot become weights."""

    def get_base_layer(self) -> nn.Module:
        """The layer itself: prompts stand beside the block, they do not wrap it."""
        return self  # type: ignore[return-value]

    @property
    def weight(self) -> torch.Tensor | None:  # type: ignore[override]
        return None

    @property
    def bias(self) -> None:  # type: ignore[override]
        return None

    def active_names(self) -> list[str]:
        """Active adapters, none while adapters are disabled."""
        return [] if self.disable_adapters else list(self.active_adapters)


class VPTLayer(nn.Module, PromptTunerLayer):
    """The tuner layer of one block, a child of it.

    It owns no parameters: prompts live in the encoder's [`VPTPromptStore`] under block indices, so that a file does
    not depend on module paths.

    Args:
        index: Index of the block.
        spec: The block.
        block: The block this is a child of.
        store: Owner of the prompts.
        after: Number of special tokens in front of the patches.
    """

    adapter_layer_names = ()
    other_param_names = ("roles",)

    def __init__(self, index: int, spec: BlockSpec, block: nn.Module, store: VPTPromptStore, after: int) -> None:
        super().__init__()
        self.index, self.spec, self.after = index, spec, after
        # In a tuple, so that they are not registered as submodules.
        self._block, self._store = (block,), (store,)
        self.roles: dict[str, Role] = {}
        self.carried: dict[str, torch.Tensor] = {}
        self.entered: dict[str, torch.Tensor] = {}
        self.inserted = 0
        self.side_outputs: torch.Tensor | None = None
        self.rows = 1
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._handles: list[Any] = []

    @property
    def block(self) -> nn.Module:
        return self._block[0]

    @property
    def store(self) -> VPTPromptStore:
        return self._store[0]

    def _get_available_adapters(self) -> set[str]:
        return {name for name, role in self.roles.items() if not role.idle}

    def attach(self) -> None:
        """Register the hooks on the block and its attention."""
        self._handles = [
            self.block.register_forward_pre_hook(enter_block, with_kwargs=True),
            # First in line, so that hooks which capture hidden states see them without prompts.
            self.block.register_forward_hook(leave_block, with_kwargs=True, prepend=True),
        ]
        attention = submodule(self.block, self.spec.attention.path)
        if self.spec.attention.uses_interface:
            attention.config = PromptedConfig(attention.config, self)  # type: ignore[assignment, arg-type]
        else:
            self._handles += attach_interceptor(attention, self)

    def detach(self) -> None:
        """Take the hooks off and leave the block as it was."""
        for handle in self._handles:
            handle.remove()
        attention: Any = submodule(self.block, self.spec.attention.path)
        if isinstance(getattr(attention, "config", None), PromptedConfig):
            attention.config = attention.config.wrapped
        for name in ("_prompt_layer", "_interceptor"):
            attention.__dict__.pop(name, None)

    def playing(self) -> list[tuple[str, Role]]:
        """The active adapters that have a part in this block, with their roles."""
        return [
            (name, self.roles[name])
            for name in self.active_names()
            if name in self.roles and not self.roles[name].idle
        ]

    def prompts_of(self, name: str, role: Role) -> torch.Tensor:
        """The prompts of one adapter as they come into this block, `(batch or 1, prompts, width)`."""
        if role.source is None:
            return self.store.merge_stage(self.index, self.carried[name])
        return self.store.prompts(name, role.source, self.rows)

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Bring prompts into the block's input; `None` where it stays as it is."""
        playing = self.playing()
        if not playing:
            return None
        argument = self.spec.argument
        hidden = kwargs[argument] if argument else args[0]
        original = hidden
        self.rows = hidden.shape[0]
        hidden = self.store.project_patches(self.index, hidden)
        among = []
        for name, role in playing:
            if role.mode == "add":
                hidden = hidden + self.store.prompts(name, role.source, 1).to(hidden.dtype)
            elif role.mode in ("token", "side"):
                prompts = self.prompts_of(name, role).to(hidden.dtype)
                self.entered[name] = prompts.expand(self.rows, -1, -1)
                if role.mode == "token":
                    among.append(self.entered[name])
        self.inserted = sum(prompts.shape[1] for prompts in among)
        if among:
            tokens = hidden.shape[1]
            hidden = insert_tokens(hidden, among, self.after)
            kwargs = widen_positions(kwargs, tokens, self.after, hidden.shape[1] - tokens)
            args = (
                (args[0], *widen_positions(args[1:], tokens, self.after, hidden.shape[1] - tokens)) if args else args
            )
            if self.index == 0:
                keep_initial_hidden_state(original)
        if hidden is original:
            return None
        if argument:
            return args, {**kwargs, argument: hidden}
        return (hidden, *args[1:]), kwargs

    def leave(self, output: Any) -> Any:
        """Take prompts out of the block's output, let gates act and hand them on."""
        playing = [(name, role) for name, role in self.playing() if role.mode in ("token", "side")]
        if not playing:
            self.forget()
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        among = [(name, role) for name, role in playing if role.mode == "token"]
        lengths = [self.entered[name].shape[1] for name, _ in among]
        if among:
            hidden, parts = cut_tokens(hidden, self.after, lengths)
            for (name, role), part in zip(among, parts, strict=True):
                self.hand_on(name, role, part)
        for name, role in playing:
            if role.mode == "side":
                self.hand_on(name, role, self.finish_side(name))
        self.forget()
        return replace_tokens(output, hidden) if among else None

    def forget(self) -> None:
        """Drop the prompts on their way, unless the block will be run again to recompute its activations."""
        if not self.store.checkpointing:
            self.carried.clear()
            self.entered.clear()
            self.side_outputs = None

    def hand_on(self, name: str, role: Role, prompts: torch.Tensor) -> None:
        """Give the prompts' outputs `(batch, prompts, width)` to the next block, or to the head after the last."""
        if not role.keeps_output:
            return
        if role.gated:
            prompts = self.store.gate(name, self.index, self.entered[name], prompts)
        self.store.receive(name, self.index + 1, prompts)

    def attention_extras(self, dtype: torch.dtype | None) -> AttentionExtras | None:
        """What prompts add to this block's attention call; `None` for nothing. Called inside the attention module."""
        playing = self.playing()
        if not playing:
            return None
        attention = self.spec.attention
        extras = AttentionExtras(inserted=(self.after, self.inserted), mask_open=attention.mask_open)
        beside, as_keys = [], []
        for name, role in playing:
            if role.temperature:
                temperature = self.store.temperature(name, self.index)
                extras.temperature = temperature if extras.temperature is None else extras.temperature * temperature
            if role.mode == "kv":
                as_keys.append(self.prompts_of(name, role))
            elif role.mode == "side":
                beside.append(self.entered[name])
        if beside or as_keys:
            rows = max(prompts.shape[0] for prompts in (*beside, *as_keys))
            prompts = [part.expand(rows, -1, -1) for part in (*beside, *as_keys)]
            joined = torch.cat(prompts, dim=1) if len(prompts) > 1 else prompts[0]
            joined = joined if dtype is None else joined.to(dtype)
            extras.keys, extras.values = project_key_values(self.block, attention, joined)
            if beside:
                queries = torch.cat(beside, dim=1) if len(beside) > 1 else beside[0]
                extras.queries = project_queries(self.block, attention, queries)
        if dtype is not None and extras.temperature is not None:
            extras.temperature = extras.temperature.to(dtype)
        return extras

    def receive_side_outputs(self, outputs: torch.Tensor) -> None:
        """Attention outputs of prompts beside the windows, `(rows, prompts, heads, head_dim)`: the mean over windows."""
        windows = outputs.unflatten(0, (self.rows, -1)).mean(1)
        self.side_outputs = windows.flatten(-2)

    def finish_side(self, name: str) -> torch.Tensor:
        """The rest of the block for prompts beside the windows: output map, residual, second norm and MLP, residual."""
        if self.side_outputs is None or self.spec.attention.out is None:
            raise RuntimeError("prompts beside windows met no attention call in this block")
        start = 0
        for other, role in self.playing():
            if other == name:
                break
            start += self.entered[other].shape[1] if role.mode == "side" and other in self.entered else 0
        entered = self.entered[name]
        attended = self.side_outputs[:, start : start + entered.shape[1]]
        attention = submodule(self.block, self.spec.attention.path)
        prompts = entered + submodule(attention, self.spec.attention.out)(attended)
        result = prompts
        for path in self.spec.tail:
            result = submodule(self.block, path)(result)
        return prompts + result

    def extra_repr(self) -> str:
        roles = ", ".join(f"{name}: {role.mode}" for name, role in self.roles.items())
        return f"block={self.index}, {roles}"


def enter_block(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a block."""
    return block.prompt_tuner.enter(args, kwargs)  # type: ignore[union-attr, operator]


def leave_block(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a block."""
    return block.prompt_tuner.leave(output)  # type: ignore[union-attr, operator]
