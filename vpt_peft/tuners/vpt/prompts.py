"""The modules that own trainable values: each is a leaf, read only by calling it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class PromptSet(nn.Module):
    """All prompts of one adapter, a parameter for each block named by its index.

    One module for all of them, since PEFT walks every module of the model to switch or load an adapter. Calling it
    returns a copy, not a view: sharding frameworks free the parameter's storage behind a view.

    Args:
        shapes: For each name the shape: tokens `(prompts, width)` or pixels `(channels, height, width)`.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def __getitem__(self, key: str) -> nn.Parameter:
        return self.get_parameter(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    @property
    def weight(self) -> nn.Parameter:
        """The first parameter: PEFT's wrapping policy for sharding knows trained leaves by their `weight`."""
        return self[next(iter(self))]

    def reset_parameters(self, method: str, bounds: Mapping[str, float]) -> None:
        """Draw the values: "xavier_uniform" in ±bound, "normal" with deviation bound / sqrt(3), "zeros", "unit"."""
        for key, bound in bounds.items():
            if method == "zeros":
                nn.init.zeros_(self[key])
            elif method == "normal":
                nn.init.normal_(self[key], std=bound / math.sqrt(3.0))
            elif method == "unit_interval":
                nn.init.uniform_(self[key], 0.0, 1.0)
            elif method == "unit_normal":
                nn.init.normal_(self[key])
            else:
                nn.init.uniform_(self[key], -bound, bound)

    def forward(self, key: str) -> torch.Tensor:
        return self[key].clone()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        if state_dict:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        else:
            # Another adapter's file is loaded: there is no need to look at each parameter of this one.
            missing_keys.extend([prefix + key for key in self._parameters])

    def train(self, mode: bool = True) -> PromptSet:
        """Set the mode; one that stands already is not set again for each of many adapters."""
        if self.training != mode:
            self.training = mode
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{key}: {'x'.join(map(str, self[key].shape))}" for key in self)


class ScalarGate(nn.Module):
    """Z = g · Ẑ + (1 - g) · Z_in with g = sigmoid(weight), a scalar (Yoo et al., ICML 2023, eq. 4)."""

    def __init__(self, init: float, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
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
        self, least: float, most: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.least, self.most = least, most
        self.weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def clamp_stored(self) -> None:
        """Clamp the stored value in place, as the official code does before each forward pass."""
        # Through `data`, so that a forward pass that has not been backpropagated yet stays valid.
        self.weight.data.clamp_(self.least, self.most)

    def forward(self) -> torch.Tensor:
        return self.weight.clamp(self.least, self.most)
