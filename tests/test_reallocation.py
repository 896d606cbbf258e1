"""Prompts that move between blocks by gradient times value."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit

from vpt_peft import VPTConfig, reallocate_prompts
from vpt_peft.reallocation import _scores
from vpt_peft.tuners.vpt.parameters import find_parameters


def prompted(**fields) -> PeftModel:
    return randomize(get_peft_model(tiny_vit(), VPTConfig(**{"num_virtual_tokens": 3, **fields})))  # type: ignore[return-value]


def stored(model) -> list[torch.Tensor]:
    prompts = find_parameters(model).adapter("default").parts["prompts"]  # type: ignore[union-attr]
    return [p.detach().clone() for p in prompts.parameters()]


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": images(n, seed=n), "labels": torch.arange(n)} for n in (3, 5)]


def loss(model) -> float:
    with torch.no_grad():
        return float(sum(model.eval()(**batch).loss for batch in batches()))


def scores_by_difference(model, step: float = 1e-6) -> list[list[float]]:
    """What the loss gains per unit when a prompt is scaled up: gᵀp, without autograd."""
    parameters = list(find_parameters(model).adapter("default").parts["prompts"].parameters())  # type: ignore[union-attr]
    found = []
    for parameter in parameters:
        found.append([])
        for row in range(len(parameter)):
            whole, both = parameter.data[row].clone(), []
            for sign in (1.0, -1.0):
                parameter.data[row] = whole * (1.0 + sign * step)
                both.append(loss(model))
            parameter.data[row] = whole
            found[-1].append((both[0] - both[1]) / (2 * step))
    return found


def test_the_worst_prompt_goes_where_prompts_help_most():
    # Layer norm undoes scale: only behind a projection with a bias do prompts have a slope along themselves
    model = prompted(projection_dim=8)
    scores, before = scores_by_difference(model), stored(model)
    goal = min(range(3), key=lambda block: sum(scores[block]) / 3)
    source = max((b for b in range(3) if b != goal), key=lambda block: max(scores[block]))
    row = max(range(3), key=lambda index: scores[source][index])
    assert scores[source][row] > 1e-6
    parameters = find_parameters(model)
    prompts = dict(enumerate(parameters.adapter("default").parts["prompts"].parameters()))  # type: ignore[union-attr]
    found = _scores(model, parameters, "default", prompts, batches())  # type: ignore[arg-type]
    assert torch.allclose(torch.stack(list(found.values())), torch.tensor(scores, dtype=torch.float64), atol=1e-6)
    counts = reallocate_prompts(model, batches())
    assert counts == {b: 3 + (b == goal) - (b == source) for b in range(3)}
    wanted = list(before)
    wanted[goal] = torch.cat([before[goal], before[source][row : row + 1]])
    wanted[source] = torch.cat([before[source][:row], before[source][row + 1 :]])
    assert all(torch.equal(one, other) for one, other in zip(stored(model), wanted, strict=True))
    assert model.peft_config["default"].num_virtual_tokens == list(counts.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prompts_whose_scale_the_norm_undoes(dtype: torch.dtype):
    """In float64 gᵀp is small but sure; in float32 it is noise, and the scores are of what the norm gives."""
    model = prompted().to(dtype)
    batch = {"pixel_values": images(4, dtype), "labels": torch.arange(4)}
    parameters = list(find_parameters(model).adapter("default").parts["prompts"].parameters())  # type: ignore[union-attr]
    if dtype == torch.float64:
        gradients = torch.autograd.grad(model(**batch).loss, parameters)
        scores = [(g * p).sum(-1) for g, p in zip(gradients, parameters, strict=True)]
    else:
        scores = scores_behind_the_norm(model, batch, [p.detach() for p in parameters])
    wanted = expected_counts(scores)
    before = torch.stack([rows.max() for rows in scores])
    counts = reallocate_prompts(model, [batch])
    assert counts == wanted and float(before.max()) > 0


def scores_behind_the_norm(model, batch, prompts) -> list[torch.Tensor]:
    """Gradients of factors on the normed prompts, in a plain ViT with prompt tokens put into keys and values."""
    vit, head = tiny_vit(dtype=torch.float32).vit, model.base_model.model.classifier.modules_to_save["default"]
    hidden, factors = vit.embeddings(batch["pixel_values"]), []
    for block, own in zip(vit.layers, prompts, strict=True):
        normed, attention = block.layernorm_before(hidden), block.attention
        factors.append(torch.ones(len(own), 1, requires_grad=True))
        both = torch.cat([normed, (block.layernorm_before(own) * factors[-1]).expand(len(hidden), -1, -1)], dim=1)
        query, key, value = (
            each(tokens).view(len(hidden), -1, 4, 8).transpose(1, 2)
            for each, tokens in ((attention.q_proj, normed), (attention.k_proj, both), (attention.v_proj, both))
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1)
        hidden = hidden + attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.layernorm_after(hidden))
    loss = torch.nn.functional.cross_entropy(head(vit.layernorm(hidden)[:, 0]), batch["labels"])
    return [gradient.squeeze(-1) for gradient in torch.autograd.grad(loss, factors)]


def expected_counts(scores: list[torch.Tensor]) -> dict[int, int]:
    goal = min(range(3), key=lambda block: float(scores[block].mean()))
    source = max((b for b in range(3) if b != goal), key=lambda block: float(scores[block].max()))
    return {block: 3 + (block == goal) - (block == source) for block in range(3)}


@pytest.mark.parametrize("seed, moved", [(8, 3), (7, 0)])
def test_several_moves_leave_one_prompt_each_and_only_idle_ones_go(seed: int, moved: int):
    model = randomize(prompted(projection_dim=8), seed)
    scores = scores_by_difference(model)
    goal = min(range(3), key=lambda block: sum(scores[block]) / 3)
    idle = [min(sum(score > 0 for score in scores[b]), 2) for b in range(3) if b != goal]
    counts = reallocate_prompts(model, batches(), moves=100)
    assert sum(idle) == moved and counts[goal] == 3 + moved and sum(counts.values()) == 9
    assert min(counts.values()) >= 1


def test_the_model_goes_on_training_saves_and_loads(tmp_path):
    model = prompted(projection_dim=8)
    model.train()
    reallocate_prompts(model, [(batch["pixel_values"], batch["labels"]) for batch in batches()])
    assert model.training and all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = loss(model)
    for _ in range(3):
        optimizer.zero_grad()
        sum(model(**batch).loss for batch in batches()).backward()
        optimizer.step()
    assert loss(model) < before - 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert loss(again) == pytest.approx(loss(model), abs=1e-12)
    assert [len(rows) for rows in stored(again)] == model.peft_config["default"].num_virtual_tokens


def test_an_adapter_for_inference_stays_one():
    model = prompted(projection_dim=8, inference_mode=True)
    reallocate_prompts(model, batches())
    assert not any(p.requires_grad for p in model.base_model.model.prompt_tuner.parameters())


@pytest.mark.parametrize(
    "fields, given, message",
    [
        ({}, {"adapter_name": "other"}, "adapter_name='other' is not an active"),
        ({}, {"moves": 0}, "moves=0 must be at least 1"),
        ({}, {"dataloader": []}, "it gives no batches"),
        ({}, {"dataloader": [{"pixel_values": images()}]}, "needs a loss"),
        ({"prompt_rank": 2}, {}, "without prompt_rank"),
        ({"deep": False}, {}, "in several blocks"),
        ({"share_prompts": True}, {}, "in several blocks"),
        ({"prompt_location": "add"}, {}, "needs prompt tokens"),
    ],
)
def test_refused(fields, given, message: str):
    model = prompted(**fields)
    before = stored(model)
    with pytest.raises(ValueError, match=message):
        reallocate_prompts(model, **{"dataloader": batches(), **given})
    assert all(torch.equal(one, other) for one, other in zip(stored(model), before, strict=True))
    assert not isinstance(model.peft_config["default"].num_virtual_tokens, list)
