"""Gates and temperatures: the parts of gated prompts that train beside the prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vpt_peft.tuners.vpt.adapter import PromptAdapter
from vpt_peft.tuners.vpt.forward_pass import Owner


class ScalarGate(nn.Module):
    """Z = g · Ẑ + (1 - g) · Z_in with g = sigmoid(weight), a scalar (Yoo et al., ICML 2023, eq. 4)."""

    def __init__(
        self, width: int, init: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), -init, device=device, dtype=dtype))

    def forward(self, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Mix `entered` and `left`, both `(batch, prompts, width)`."""
        gate = torch.sigmoid(self.weight).to(left.dtype)
        # In this form the gradient needs the difference alone, and not the sequences both are parts of
        return entered + gate * (left - entered)


class ElementwiseGate(nn.Linear):
    """Z = Z_in + sigmoid(W Ẑ + b) ⊙ Ẑ, a gate per element with a residual."""

    def __init__(
        self, width: int, init: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(width, width, device=device, dtype=dtype)
        if not self.weight.is_meta:
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.bias, -init)

    def forward(self, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Mix `entered` and `left`, both `(batch, prompts, width)`."""
        left = left.contiguous()
        return entered + torch.sigmoid(super().forward(left.to(self.weight.dtype))).to(left.dtype) * left


class Temperature(nn.Module):
    """A learnable temperature τ of one block's attention, softmax(QKᵀ / (τ sqrt(d))), kept within two bounds."""

    def __init__(
        self, minimum: float, maximum: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.minimum, self.maximum = minimum, maximum
        self.weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def clamp_stored(self) -> None:
        """Clamp the stored value in place, as the official code does before each forward pass."""
        # Sharded parameters (FSDP1) have no storage between passes
        if self.weight.untyped_storage().size() > 0:
            # Through `data`, so that a forward pass that has not been backpropagated yet stays valid.
            self.weight.data.clamp_(self.minimum, self.maximum)

    def forward(self) -> torch.Tensor:
        return self.weight.clamp(self.minimum, self.maximum)


class GatedPromptAdapter(PromptAdapter):
    """One adapter of gated prompts, as a forward pass uses it."""

    prefix = "gated_prompt_"
    part_names = (*PromptAdapter.part_names, "gates", "temperatures")

    @classmethod
    def make_parts(cls, owner: Owner, config: Any, layout: Any, like: dict[str, Any]) -> dict[str, nn.Module]:
        """The prompts, and a gate and a temperature for each block that has one."""
        parts = super().make_parts(owner, config, layout, like)
        gated = [index for index, block in enumerate(layout[:-1]) if block is not None and block.passes_on]
        gated = gated if config.num_gates is None else gated[: config.num_gates]
        if config.gate != "none" and gated:
            kind = ElementwiseGate if config.gate == "elementwise" else ScalarGate
            widths = {index: owner.spec.blocks[index].width for index in gated}
            parts["gates"] = nn.ModuleDict(
                {str(index): kind(width, config.gate_init, **like) for index, width in widths.items()}
            )
        if config.attention_temperature:
            bounds = config.temperature_min, config.temperature_max
            parts["temperatures"] = nn.ModuleDict(
                {str(index): Temperature(*bounds, **like) for index, block in enumerate(layout) if block is not None}
            )
        return parts

    def begin(self) -> None:
        """Clamp the stored temperatures before a training pass."""
        for temperature in self.parts.get("temperatures", nn.ModuleDict()).values():  # type: ignore[operator]
            temperature.clamp_stored()

    def pass_on(self, index: int, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """A block's prompt outputs `(batch, prompts, width)` after its gate."""
        gate = self._of_block("gates", index)
        return left if gate is None else gate(entered, left)

    def temperature(self, index: int) -> torch.Tensor | None:
        """The attention temperature of one block, a tensor of one element."""
        temperature = self._of_block("temperatures", index)
        return None if temperature is None else temperature()

    def _of_block(self, part: str, index: int) -> nn.Module | None:
        modules = self.parts.get(part)
        return None if modules is None else modules._modules.get(str(index))
