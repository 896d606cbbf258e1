"""The plain way to run gated prompts, as a reference: insert them into the tokens of every block and take them out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vpt_peft.encoder import EncoderSpec, submodule


class PlainGatedLoop(nn.Module):
    """Gated prompts (Yoo et al., ICML 2023, eq. 4) around a ViT, with nothing done to make them cheap.

    Per block one concatenation before and one after, all prompts as queries through the last block too, and the
    queries divided by the block's temperature.

    Args:
        model: A frozen ViT classifier; its head trains.
        spec: Its encoder.
        num_virtual_tokens: Prompts.
        gate_init: The gates' logits start at minus this.
    """

    def __init__(
        self, model: PreTrainedModel, spec: EncoderSpec, num_virtual_tokens: int, gate_init: float = 5.0
    ) -> None:
        super().__init__()
        self.encoder, self.spec = submodule(model, spec.path), spec
        self.head: Any = model.classifier
        depth, width = len(spec.blocks), spec.blocks[0].width
        parameter = next(model.parameters())
        # As PEFT keeps the values of an adapter
        like: dict[str, Any] = {"device": parameter.device, "dtype": torch.float32}
        self.prompts = nn.Parameter(torch.empty(1, num_virtual_tokens, width, **like).uniform_(-0.1, 0.1))
        self.gates = nn.Parameter(torch.full((depth - 1,), -gate_init, **like))
        self.temperatures = nn.Parameter(torch.ones(depth, **like))
        for index, block in enumerate(self.blocks()):
            attention = spec.blocks[index].attention
            if attention.query is None:
                raise ValueError("the query projection of the attention is not known")
            query = submodule(submodule(block, attention.path), attention.query.path)
            query.register_forward_hook(_ScaleQueries(self, index))

    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks in order."""
        return [submodule(self.encoder, block.path) for block in self.spec.blocks]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, labels)` of images `(batch, channels, height, width)`."""
        tokens = self.encoder.embeddings(pixel_values)
        prompts = self.prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        count = prompts.shape[1]
        for index, block in enumerate(self.blocks()):
            joined = block(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1))
            joined = joined[0] if isinstance(joined, tuple) else joined
            tokens = torch.cat([joined[:, :1], joined[:, 1 + count :]], dim=1)
            if index < len(self.gates):
                gate = torch.sigmoid(self.gates[index]).to(tokens.dtype)
                prompts = gate * joined[:, 1 : 1 + count] + (1 - gate) * prompts
        return self.head(self.encoder.layernorm(tokens)[:, 0])


class _ScaleQueries:
    """Forward hook of a query projection: divide the queries by the temperature of the block."""

    def __init__(self, loop: PlainGatedLoop, index: int) -> None:
        self.loop, self.index = loop, index

    def __call__(self, query: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output / self.loop.temperatures[self.index].to(output.dtype)
