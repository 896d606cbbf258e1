"""VIPAMIN's start against its formulas on the weights of a ViT, written out."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from small_models import images, randomize, tiny_vit

from vpt_peft import GatedVPTConfig, VPTConfig, initialize_prompts
from vpt_peft.tuners.vpt.parameters import find_parameters


def prompted(config: type[VPTConfig] = VPTConfig, **fields):
    return randomize(get_peft_model(tiny_vit(), config(**{"num_virtual_tokens": 4, **fields})))


def stored(model, block: int) -> torch.Tensor:
    return find_parameters(model).adapter("default").own_prompts(str(block)).detach().clone()  # type: ignore[union-attr]


def drawn(blocks: int, rank: int | None = None) -> torch.Tensor:
    """Prompts of the first of several blocks as a new adapter draws them with the seed 0."""
    torch.manual_seed(0)
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    if rank is None:
        return torch.empty(4, 32, dtype=torch.float64).uniform_(-bound, bound)
    factors = [torch.empty(4, rank, dtype=torch.float64).normal_(std=0.02) for _ in range(blocks)]
    bound = (6 / (32 + rank)) ** 0.5
    return factors[0] @ torch.empty(32, rank, dtype=torch.float64).uniform_(-bound, bound).T


def reference(prompts: torch.Tensor, block: int, pixels: torch.Tensor, k: int, share: float) -> torch.Tensor:
    """(1 - λ) p_avg + λ p_orth with heads of width 8, one prompt after the other."""
    vit = tiny_vit().vit
    hidden = vit.embeddings(pixels)
    for earlier in vit.layers[:block]:
        hidden = earlier(hidden)
    layer, attention = vit.layers[block], vit.layers[block].attention
    normed = layer.layernorm_before(hidden)
    query, key, value = (
        (each(normed)).view(len(pixels), -1, 4, 8).transpose(1, 2)
        for each in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1)
    output = (weights @ value).transpose(1, 2).flatten(2).mean(0)
    basis = torch.linalg.qr(output.T)[0]
    keys = key[:, :, 1:].mean((0, 1))
    tokens = hidden[:, 1:].mean(0)
    weight, bias = attention.v_proj.weight, attention.v_proj.bias
    started = []
    for prompt in prompts:
        own = attention.k_proj(layer.layernorm_before(prompt)).view(4, 8).mean(0)
        nearest = torch.cosine_similarity(own, keys, dim=-1).argsort(descending=True)[:k]
        changed = prompt @ weight.T + bias
        outside = changed - basis @ (basis.T @ changed) - bias
        started.append((1 - share) * tokens[nearest].mean(0) + share * outside @ torch.linalg.pinv(weight.T))
    return torch.stack(started).detach()


@pytest.mark.parametrize("config, fields", [(VPTConfig, {"layers_to_transform": [1, 2]}), (GatedVPTConfig, {})])
@pytest.mark.parametrize("k, share", [(1, 0.0), (3, 0.4), (2, 1.0)])
def test_formulas(config, fields, k: int, share: float):
    model, block = prompted(config, **fields), 1 if fields else 0
    data = [images(3, seed=1), images(2, seed=2)]
    others = [stored(model, 2)] if fields else []
    initialize_prompts(model, data, method="vipamin", neighbors=k, orthogonal=share)
    wanted = reference(drawn(2), block, torch.cat(data), k, share)
    assert float((stored(model, block) - wanted).abs().max()) < 1e-9 * float(wanted.abs().max())
    assert all(torch.equal(stored(model, 2), other) for other in others)


def test_the_orthogonal_part_gives_what_the_attention_does_not():
    """W_V p_orth + b_V has nothing in the space of the attention's outputs."""
    model, pixels = prompted(), images(4)
    initialize_prompts(model, [pixels], method="vipamin", orthogonal=1.0)
    attention = tiny_vit().vit.layers[0].attention
    outputs: list[torch.Tensor] = []
    plain = tiny_vit()
    plain.vit.layers[0].attention.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with torch.no_grad():
        plain(pixel_values=pixels)
        values = attention.v_proj(stored(model, 0))
    mean = outputs[0].mean(0)
    assert float((mean @ values.T).abs().max()) < 1e-9 and float(values.abs().max()) > 1e-2


def test_low_rank_gets_the_nearest_product():
    low, data = prompted(prompt_rank=4), [images(3)]
    initialize_prompts(low, data, method="vipamin", neighbors=2, orthogonal=0.5)
    wanted = reference(drawn(3, 4), 0, data[0], 2, 0.5)
    assert float((stored(low, 0) - wanted).abs().max()) < 1e-9


@pytest.mark.parametrize(
    "given, message",
    [
        ({"neighbors": 0}, "neighbors=0 must be at least 1"),
        ({"neighbors": 17}, "neighbors=17 is more than the 16 patch tokens"),
        ({"orthogonal": 1.5}, "orthogonal=1.5 a share"),
    ],
)
def test_refused(given, message: str):
    model = prompted()
    before = stored(model, 0)
    with pytest.raises(ValueError, match=message):
        initialize_prompts(model, [images()], method="vipamin", **given)
    assert torch.equal(stored(model, 0), before)
