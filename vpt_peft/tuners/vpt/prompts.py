"""The modules that own trainable values: each is a leaf with one `weight`, read only by calling it."""

from __future__ import annotations

import math

import torch
from torch import nn


class Prompt(nn.Module):
    """A set of prompts of any shape: tokens `(prompts, width)`, pixels `(channels, height, width)`.

    Calling it returns a copy, not a view: sharding frameworks free the parameter's storage behind a view.
    """

    def __init__(self, *shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def reset_parameters(self, method: str, bound: float) -> None:
        """Draw the values: "xavier_uniform" in ±bound, "normal" with deviation bound / sqrt(3), "zeros", "unit"."""
        if method == "zeros":
            nn.init.zeros_(self.weight)
        elif method == "normal":
            nn.init.normal_(self.weight, std=bound / math.sqrt(3.0))
        elif method == "unit_interval":
            nn.init.uniform_(self.weight, 0.0, 1.0)
        elif method == "unit_normal":
            nn.init.normal_(self.weight)
        else:
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self) -> torch.Tensor:
        return self.weight.clone()

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


class ScalarGate(nn.Module):
    """Z = g · Ẑ + (1 - g) · Z_in with g = sigmoid(weight), a scalar (Yoo et al., ICML 2023, eq. 4)."""

    def __init__(self, init: float, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), -init, device=device, dtype=dtype))

    def forward(self, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Mix `entered` and `left`, both `(batch, prompts, width)`."""
        gate = torch.sigmoid(self.weight).to(left.dtype)
        return gate * left + (1 - gate) * entered


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
