"""YOLOS (Fang et al., NeurIPS 2021), whose detection tokens train with the head while the encoder is frozen."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import YolosForObjectDetection
from transformers import initialization as init


class TokenOffsets(nn.Module):
    """What is added to the last tokens of a sequence; it starts at zero.

    Args:
        count: number of tokens.
        width: of each.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens `(batch, tokens, width)`, the last ones changed."""
        others, last = tokens[:, : -len(self.weight)], tokens[:, -len(self.weight) :]
        return torch.cat([others, last + self.weight.to(last.dtype)], 1)


class FrozenYolosForObjectDetection(YolosForObjectDetection):
    """YOLOS with offsets of its detection tokens beside the encoder, where they are part of the head.

    The tokens themselves are parameters of the encoder's embeddings, which adapters leave as they are.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.detection_tokens = TokenOffsets(config.num_detection_tokens, config.hidden_size)
        self.vit.embeddings.register_forward_hook(partial(_add_offsets, self))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenOffsets):
            init.zeros_(module.weight)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenYolosForObjectDetection:
        """Let all parameters train but the offsets: the encoder's own tokens do then."""
        super().requires_grad_(requires_grad)
        self.detection_tokens.requires_grad_(False)
        return self


def _add_offsets(
    model: FrozenYolosForObjectDetection, embeddings: nn.Module, args: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    return model.detection_tokens(output)
