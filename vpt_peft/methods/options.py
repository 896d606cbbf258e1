"""The numbers and fields that methods take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..fields import BIAS_PLACES


def out_of_list(given: Any) -> Any:
    """A single number of prompts, or a single word for all biases, without the list that a flag gives."""
    is_single = isinstance(given, list) and len(given) == 1 and given[0] not in BIAS_PLACES
    return given[0] if is_single else given


@dataclass(frozen=True)
class MethodOptions:
    """What the methods leave open, with the defaults of `vpt-peft train`.

    Args:
        num_virtual_tokens (`int` or `list[int]`): prompts per prompted block, a list gives each its own number.
        lora_r (`int`): rank of LoRA.
        partial_blocks (`int`): last blocks that `partial` trains.
        mlp_layers (`int`): linear layers of the head of `mlp`.
        adapter_reduction (`int`): hidden size over the width of a bottleneck adapter.
        fields (`Mapping[str, Any]`): further fields of `VPTConfig` or `GatedVPTConfig`.

    Raises:
        ValueError: a number is not an integer of at least 1.
    """

    num_virtual_tokens: int | list[int] = 10
    lora_r: int = 8
    partial_blocks: int = 1
    mlp_layers: int = 3
    adapter_reduction: int = 8
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "lora_r", "partial_blocks", "mlp_layers", "adapter_reduction"):
            value = getattr(self, name)
            # The configuration checks the numbers of a list
            is_list = name == "num_virtual_tokens" and isinstance(value, list)
            if not is_list and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
