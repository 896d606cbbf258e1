"""Modules of the baselines that prompts are compared with: an MLP head, bottleneck adapters, a side network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


ADAPTER_NAME = "bottleneck_adapter"
SIDE_NAME = "side_tuning"


class MLPHead(nn.Sequential):
    """A head of `num_layers` linear layers with GELU between them (MLP-k in the VPT paper, arXiv 2203.12119).

    Args:
        in_features (`int`): width of the backbone's output, kept by the hidden layers.
        num_labels (`int`): number of classes.
        num_layers (`int`): linear layers in all; 1 is the linear probe.

    Shapes: `(batch, in_features)` to `(batch, num_labels)`.
    """

    def __init__(self, in_features: int, num_labels: int, num_layers: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [nn.Linear(in_features, in_features), nn.GELU()]
        super().__init__(*layers, nn.Linear(in_features, num_labels))


class BottleneckAdapter(nn.Module):
    """Bottleneck adapter of Houlsby et al. (2019), arXiv 1902.00751: x + up(gelu(down(x))), the identity at the start.

    Args:
        hidden_size (`int`): width of the tokens.
        reduction (`int`): hidden size over the width of the bottleneck.

    Shapes: `(batch, tokens, hidden)` in and out; `(batch, height, width, hidden)` works too.
    """

    def __init__(self, hidden_size: int, reduction: int) -> None:
        super().__init__()
        width = max(1, hidden_size // reduction)
        self.down = nn.Linear(hidden_size, width)
        self.up = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.up(F.gelu(self.down(hidden_states)))


def _adapt_block_output(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    adapter = getattr(block, ADAPTER_NAME)
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def add_bottleneck_adapters(
    blocks: Sequence[nn.Module], widths: Sequence[int], reduction: int
) -> list[BottleneckAdapter]:
    """Put one adapter on each block's output, as a child module and a forward hook.

    Args:
        blocks (`Sequence[nn.Module]`): the blocks of the encoder.
        widths (`Sequence[int]`): width of the tokens of each block.
        reduction (`int`): that width over the width of the bottleneck.
    """
    adapters = []
    for block, width in zip(blocks, widths, strict=True):
        adapter = BottleneckAdapter(width, reduction)
        block.add_module(ADAPTER_NAME, adapter)
        block.register_forward_hook(_adapt_block_output)
        adapters.append(adapter)
    return adapters


class SideTuning(nn.Module):
    """Side-tuning of Zhang et al. (2020), arXiv 1912.13503: features = a * frozen + (1 - a) * side(image).

    The blend a = sigmoid(alpha) is learned and starts at one half, as in the paper. The side network is four strided
    convolutions, a mean over the image and a linear layer to the width of the head's input.

    Shapes: images `(batch, 3, height, width)`, features `(batch, features)`.
    """

    def __init__(self, num_channels: int, features: int, width: int = 32) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))
        widths = [num_channels, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, features))
        self._pixel_values: torch.Tensor | None = None

    def see(self, pixel_values: torch.Tensor) -> None:
        """Keep the images of the running forward pass."""
        self._pixel_values = pixel_values

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self._pixel_values is None:
            raise ValueError("pixel_values must be passed by keyword to a side-tuned model: model(pixel_values=...)")
        pixel_values, self._pixel_values = self._pixel_values, None
        blend = torch.sigmoid(self.alpha)
        return blend * features + (1 - blend) * self.network(pixel_values.to(features.dtype))


def _show_images(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    pixel_values = args[0] if args else kwargs["pixel_values"]
    getattr(model, SIDE_NAME).see(pixel_values)


class _BlendFeatures:
    """Pre-hook of the head. A class and not a closure, so that a deep copy of the model takes its own side network."""

    def __init__(self, side: SideTuning) -> None:
        self.side = side

    def __call__(self, head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self.side(args[0]), *args[1:])


def add_side_network(model: nn.Module, output_layer: nn.Linear) -> SideTuning:
    """Blend a trained side network into the features that `output_layer` reads."""
    num_channels = getattr(model.config, "num_channels", 3)
    side = SideTuning(num_channels, output_layer.in_features)
    model.add_module(SIDE_NAME, side)
    model.register_forward_pre_hook(_show_images, with_kwargs=True)
    output_layer.register_forward_pre_hook(_BlendFeatures(side))
    return side


class _RestInEval:
    """Pre-hook of the model that takes the modules that do not train out of training mode."""

    def __init__(self, active: set[nn.Module]) -> None:
        self.active = active

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not model.training:
            return
        for module in model.modules():
            # A block that recomputes its activations does so only in training mode; its own children stay in eval.
            module.training = module in self.active or bool(getattr(module, "gradient_checkpointing", False))
        model.training = True


def keep_frozen_in_eval(model: nn.Module, trained: list[nn.Module]) -> None:
    """Let `model.train()` reach only `trained` and what they hold: dropout and drop-path of frozen parts stay off.

    It acts at the start of each forward pass, so any training loop keeps it.
    """
    active = {module for root in trained for module in root.modules()}
    model.register_forward_pre_hook(_RestInEval(active))
