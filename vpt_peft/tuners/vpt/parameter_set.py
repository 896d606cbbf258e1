"""A module of parameters by key: all prompts of one adapter, or all its bias offsets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn


class ParameterSet(nn.Module):
    """All prompts (or all bias offsets) of one adapter, a parameter for each block, named by its index.

    One module for all of them, since PEFT walks every module of the model to switch or load an adapter. It is read only
    by calling it, so that hooks of offloading and sharding frameworks run, and returns a copy, not a view: sharding
    frameworks free the parameter's storage behind a view.

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
        self.names = dict.fromkeys(shapes)
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def __getitem__(self, key: str) -> nn.Parameter:
        parameter = self._parameters.get(key)
        # Under FSDP1 it is an attribute
        return getattr(self, key) if parameter is None else parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

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
        """A copy of one parameter."""
        return self[key].clone()
