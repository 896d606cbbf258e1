"""The tuner layer of one block: it brings prompts in, takes them out and hands them on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vpt_peft.attention import (
    ALL_TOKENS,
    AttentionExtras,
    PromptedConfig,
    attach_interceptor,
    project_key_values,
    project_queries,
)
from vpt_peft.encoder import BlockSpec, submodule

from .mixed import MixedBatch, additive, spread_heads
from .modes import HOOKS_ARE_CHECKPOINTED
from .plan import Role
from .sequence import (
    insert_tokens,
    join,
    keep_initial_hidden_state,
    replace_tokens,
    split_tokens,
    widen_positions,
)
from .shortcuts import UNREAD, is_seen, reads_special_only


if TYPE_CHECKING:
    from .store import VPTPromptStore

Playing = list[tuple[str, Role]]

# Attribute of a block's output that holds the prompts on their way to the next block
CARRIED = "_vpt_carried"


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

    mixed: MixedBatch | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: called where adapters of other methods on the same model are merged into weights."""

    def unmerge(self) -> None:
        """Nothing, see `merge`."""

    def active_names(self) -> list[str]:
        """Active adapters, in a mixed batch those of its images; none while adapters are disabled."""
        if self.disable_adapters:
            return []
        return list(self.active_adapters) if self.mixed is None else self.mixed.adapters


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
    other_param_names = ("roles", "merged_keys", "merged_values")

    def __init__(self, index: int, spec: BlockSpec, block: nn.Module, store: VPTPromptStore, after: int) -> None:
        super().__init__()
        self.index, self.spec, self.after = index, spec, after
        # In a tuple, so that they are not registered as submodules.
        self._block, self._store = (block,), (store,)
        self.roles: dict[str, Role] = {}
        self.carried: dict[str, torch.Tensor] = {}
        self.entered: dict[str, torch.Tensor] = {}
        self.inserted = 0
        self.arrived = False
        self.hidden: torch.Tensor | None = None
        self.side_outputs: torch.Tensor | None = None
        self.rows = 1
        self.merged_keys = BufferDict({}, persistent=False)
        self.merged_values = BufferDict({}, persistent=False)
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

    def playing(self) -> Playing:
        """The active adapters that have a part in this block, with their roles."""
        active = [(name, self.roles[name]) for name in self.active_names() if name in self.roles]
        active = [(name, role) for name, role in active if not role.idle]
        if self.store.checkpointing:
            # Prompts that flow in are inputs of the checkpoint then: it runs them again as they were, and a re-entrant
            # one sees gradients only through its inputs.
            return [(name, self._as_input(role)) for name, role in active]
        return active

    def _as_input(self, role: Role) -> Role:
        flows_in = role.source is None and role.mode in ("kv", "token")
        lost = HOOKS_ARE_CHECKPOINTED and (flows_in or role.keeps_output)
        if self.store.reentrant and (role.mode == "side" or lost or (flows_in and not self.spec.takes_tokens)):
            raise ValueError(
                "prompts that flow from block to block lose their gradient under re-entrant gradient checkpointing "
                "here; use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        return replace(role, mode="token") if flows_in and self.spec.takes_tokens else role

    def prompts_of(self, name: str, role: Role) -> torch.Tensor:
        """The prompts of one adapter as they come into this block, `(batch or 1, prompts, width)`."""
        if role.source is None:
            return self.store.merge_stage(self.index, self.carried[name])
        return self.store.prompts(name, role.source, self.rows)

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Bring prompts into the block's input; `None` where it stays as it is."""
        unread = kwargs.pop(UNREAD, False) and self.index + 1 == len(self.store.layers)
        playing = self.playing()
        if not playing and self.index > 0 and not unread:
            return None
        argument = self.spec.argument
        hidden = kwargs[argument] if argument else args[0]
        # Run again inside a checkpoint, the block gets the input it had, and with it the prompts of that pass.
        self.carried.update(getattr(hidden, CARRIED, {}))
        original = hidden
        self.rows = hidden.shape[0]
        hidden = self.store.project_patches(self.index, hidden)
        among = []
        for name, role in playing:
            rows = None if self.mixed is None else self.mixed.rows(name, hidden.device)
            if role.mode == "add":
                prompts = self.store.prompts(name, role.source, self.rows).to(hidden.dtype)
                hidden = (
                    hidden + prompts
                    if rows is None
                    else hidden.index_add(0, rows, prompts.expand(len(rows), *hidden.shape[1:]))
                )
            elif role.mode in ("token", "side"):
                prompts = self.prompts_of(name, role).to(hidden.dtype)
                self.entered[name] = prompts.expand(self.rows if rows is None else len(rows), -1, -1)
                if role.mode == "token" and not self.arrived:
                    among.append(self.entered[name])
        if among and self.mixed is not None:
            spread, self.hidden = self.mixed.spread(
                {n: self.entered[n] for n, role in playing if role.mode == "token"}
            )
            among = [spread]
        if among:
            hidden = insert_tokens(hidden, among, self.after)
            if self.index == 0:
                keep_initial_hidden_state(original)
        standing = [self.entered[name] for name, role in playing if role.mode == "token"] if self.arrived else among
        self.inserted = sum(prompts.shape[1] for prompts in standing)
        if self.inserted:
            tokens = hidden.shape[1] - self.inserted
            kwargs = widen_positions(kwargs, tokens, self.after, self.inserted)
            args = (args[0], *widen_positions(args[1:], tokens, self.after, self.inserted)) if args else args
        elif unread and reads_special_only(
            self.store, playing, args[1:], {k: v for k, v in kwargs.items() if k != argument}
        ):
            self.store.note("reads_special")
            kwargs = {**kwargs, ALL_TOKENS: hidden}
            hidden = hidden[:, : self.after]
        if hidden is original and not self.inserted:
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
            before, parts, behind = split_tokens(
                hidden, self.after, lengths if self.mixed is None else [self.inserted]
            )
            if self.mixed is not None:
                rows = [self.mixed.rows(name, hidden.device) for name, _ in among]
                parts = [parts[0][mine, :length] for mine, length in zip(rows, lengths, strict=True)]
            handed = [self.hand_on(name, role, part) for (name, role), part in zip(among, parts, strict=True)]
            if self.prompts_stay(among):
                if any(role.gated for _, role in among):
                    hidden = torch.cat([before, *handed, behind], dim=1)
            else:
                hidden = torch.cat([before, behind], dim=1)
        for name, role in playing:
            if role.mode == "side":
                self.hand_on(name, role, self.finish_side(name))
        self.forget()
        if HOOKS_ARE_CHECKPOINTED and self.store.checkpointing and self.index + 1 < len(self.store.layers):
            setattr(hidden, CARRIED, dict(self.store.layers[self.index + 1].carried))
        return replace_tokens(output, hidden) if among else None

    def forget(self) -> None:
        """Drop the prompts on their way, unless the block will be run again to recompute its activations."""
        self.hidden = None
        self.arrived = False
        if not self.store.checkpointing:
            self.carried.clear()
            self.entered.clear()
            self.side_outputs = None

    def prompts_stay(self, among: Playing) -> bool:
        """Whether the prompt tokens stay in the sequence until the next block, which then need not put them in."""
        following = self.index + 1
        if following == len(self.store.layers):
            return False
        then = self.store.layers[following]
        then.arrived = self.store.joins and self.mixed is None and not is_seen(self.store)
        if then.arrived:
            flowing = [(name, role.mode, role.source) for name, role in then.playing() if role.mode is not None]
            then.arrived = flowing == [(name, "token", None) for name, _ in among]
        if then.arrived:
            self.store.note("joins")
        return then.arrived

    def hand_on(self, name: str, role: Role, prompts: torch.Tensor) -> torch.Tensor:
        """Give the prompts' outputs `(batch, prompts, width)` to the next block, or to the head after the last."""
        if role.gated:
            prompts = self.store.gate(name, self.index, self.entered[name], prompts)
        if role.keeps_output:
            self.store.receive(name, self.index + 1, prompts)
        return prompts

    def attention_extras(self, dtype: torch.dtype | None) -> AttentionExtras | None:
        """What prompts add to this block's attention call; `None` for nothing. Called inside the attention module."""
        playing = self.playing()
        if not playing:
            return None
        extras = AttentionExtras(inserted=(self.after, self.inserted), mask_open=self.spec.attention.mask_open)
        self._add_temperature(extras, playing, dtype)
        if self.mixed is not None:
            self._add_mixed(extras, playing, dtype)
            return extras
        beside = [self.entered[name] for name, role in playing if role.mode == "side"]
        as_keys = [(name, role) for name, role in playing if role.mode == "kv"]
        if beside or as_keys:
            made = [self._project(prompts, dtype) for prompts in beside]
            made += [self.key_values(name, role, dtype) for name, role in as_keys]
            extras.keys, extras.values = join([pair[0] for pair in made]), join([pair[1] for pair in made])
        if beside:
            extras.queries = project_queries(self.block, self.spec.attention, join(beside, dim=1))
        return extras

    def _project(self, prompts: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        return project_key_values(self.block, self.spec.attention, prompts if dtype is None else prompts.to(dtype))

    def key_values(self, name: str, role: Role, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one adapter's prompts, `(batch or 1, heads, prompts, head_dim)`; constants once merged."""
        if name in self.merged_adapters and name in self.merged_keys:
            keys, values = self.merged_keys[name], self.merged_values[name]
            return (keys, values) if dtype is None else (keys.to(dtype), values.to(dtype))
        return self._project(self.prompts_of(name, role), dtype)

    def _add_temperature(self, extras: AttentionExtras, playing: Playing, dtype: torch.dtype | None) -> None:
        warm = [name for name, role in playing if role.temperature]
        for name in warm:
            temperature = self.store.temperature(name, self.index)
            temperature = (temperature if dtype is None else temperature.to(dtype)).view(1, 1, 1, 1)
            if self.mixed is not None:
                rows = self.mixed.rows(name, temperature.device)
                per_image = temperature.new_ones(len(self.mixed.names))
                temperature = per_image.index_copy(0, rows, temperature.view(1).expand(len(rows))).view(-1, 1, 1, 1)
            extras.temperature = temperature if extras.temperature is None else extras.temperature * temperature

    def _add_mixed(self, extras: AttentionExtras, playing: Playing, dtype: torch.dtype | None) -> None:
        """Prompts of a mixed batch: keys and values padded to the longest adapter, the padding masked."""
        mixed, mask_dtype = self.mixed, dtype or self.store.device_and_dtype()[1]
        if mixed is None:
            return
        if any(role.mode == "side" for _, role in playing):
            raise ValueError("adapter_names: prompts that run beside windows cannot share a batch; run them apart.")
        if self.hidden is not None:
            extras.inserted_mask = additive(self.hidden, mask_dtype)
        as_keys = [(name, role) for name, role in playing if role.mode == "kv"]
        if not as_keys:
            return
        made = {name: self.key_values(name, role, dtype) for name, role in as_keys}
        extras.keys, hidden = spread_heads(mixed, {name: pair[0] for name, pair in made.items()})
        extras.values, _ = spread_heads(mixed, {name: pair[1] for name, pair in made.items()})
        extras.mask = None if hidden is None else additive(hidden, mask_dtype)

    def merge_prompts(self, names: list[str]) -> None:
        """Turn this block's own prompts into constant keys and values, so that inference needs no norm or maps."""
        for name in names:
            role = self.roles.get(name)
            if role is None or role.mode != "kv" or role.source is None or name in self.merged_adapters:
                continue
            with torch.no_grad():
                self.rows = 1
                keys, values = self._project(self.prompts_of(name, role), self.store.device_and_dtype()[1])
            self.merged_keys[name], self.merged_values[name] = keys.contiguous(), values.contiguous()
            self.merged_adapters.append(name)

    def unmerge_prompts(self) -> None:
        """Go back from constants to prompts."""
        for name in self.merged_adapters:
            if name in self.merged_keys:
                del self.merged_keys[name], self.merged_values[name]
        self.merged_adapters.clear()

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
