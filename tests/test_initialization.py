"""Starts of prompts, at random and from data."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from small_models import images, tiny_vit

from vpt_peft import VPTConfig, initialize_prompts
from vpt_peft.initialization import METHODS, Reservoir


def prompted(**fields):
    return get_peft_model(tiny_vit(), VPTConfig(**{"num_virtual_tokens": 4, **fields}))


def prompts_of(model, block: int) -> torch.Tensor:
    return model.base_model.model.prompt_tuner.adapter("default").parts["prompts"][str(block)].detach().clone()


def batches(count: int = 4, size: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": images(size, seed=seed), "labels": torch.zeros(size)} for seed in range(count)]


def block_inputs(model, data) -> dict[int, torch.Tensor]:
    """What each block of the frozen encoder receives, `(images, tokens, width)`."""
    with torch.no_grad(), model.disable_adapter():
        outputs = [model.eval()(pixel_values=batch["pixel_values"], output_hidden_states=True) for batch in data]
    return {block: torch.cat([output.hidden_states[block] for output in outputs]) for block in range(4)}


@pytest.mark.parametrize("method", ["xavier_uniform", "normal"])
def test_random_starts_have_the_scale_of_a_patch_embedding(method: str):
    """Drawn within sqrt(6 / (values of a patch + width)), or with the deviation of that."""
    model, bound = prompted(num_virtual_tokens=500, init_prompts=method), (6 / (3 * 8 * 8 + 32)) ** 0.5
    for block in range(3):
        values = prompts_of(model, block)
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert method == "normal" or 0.99 * bound < float(values.abs().max()) <= bound


def test_tokens_are_real_patch_tokens_of_their_block():
    model, data = prompted(), batches()
    initialize_prompts(model, data)
    inputs = block_inputs(model, data)
    for block in range(3):
        patches = inputs[block][:, 1:].flatten(0, 1)
        distance = torch.cdist(prompts_of(model, block), patches).min(dim=1).values
        assert distance.max() < 1e-5  # the reservoir holds float32
    assert torch.pdist(prompts_of(model, 0)).min() > 1e-3


@pytest.mark.parametrize("fields", [{"pooling": "image_prompt"}, {"token_type": "class"}])
def test_heads_that_read_prompts(fields):
    model, data = prompted(**fields), batches()
    initialize_prompts(model, data)
    plain = prompted()
    initialize_prompts(plain, data)
    assert all(torch.equal(prompts_of(model, block), prompts_of(plain, block)) for block in range(3))


@pytest.mark.parametrize(("method", "offset"), [("class_token_layerwise", 0), ("class_token_final", None)])
def test_class_tokens(method, offset):
    model, data = prompted(), batches()
    initialize_prompts(model, data, method=method)
    inputs = block_inputs(model, data)
    for block in range(3):
        expected = inputs[block if offset == 0 else 3][:, 0]
        assert torch.cdist(prompts_of(model, block), expected).min(dim=1).values.max() < 1e-5


def test_mean_pool():
    model, data = prompted(), batches()
    initialize_prompts(model, data, method="mean_pool")
    expected = block_inputs(model, data)[1][:, 1:].mean(dim=1)
    assert torch.cdist(prompts_of(model, 1), expected).min(dim=1).values.max() < 1e-5


def test_kmeans_lowers_the_distance_to_the_data():
    model, data = prompted(), batches()
    patches = block_inputs(model, data)[2][:, 1:].flatten(0, 1)

    def spread() -> float:
        return float(torch.cdist(patches, prompts_of(model, 2)).min(dim=1).values.square().mean())

    initialize_prompts(model, data, method="tokens")
    sampled = spread()
    initialize_prompts(model, data, method="kmeans")
    assert spread() < sampled


@pytest.mark.parametrize("method", METHODS)
def test_reproducible_by_seed(method):
    starts = []
    for seed in (0, 0, 1):
        model = prompted()
        initialize_prompts(model, batches(), method=method, seed=seed)
        starts.append(prompts_of(model, 0 if method == "vipamin" else 1))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_nothing_else_changes():
    model = prompted().train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "prompt_tuner" not in name}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    initialize_prompts(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_batches_may_be_tuples_or_tensors():
    starts = []
    for wrap in (lambda x: {"pixel_values": x}, lambda x: (x, 0), lambda x: x):
        model = prompted()
        initialize_prompts(model, [wrap(images(4))])
        starts.append(prompts_of(model, 0))
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


def test_reservoir_is_uniform_and_bounded():
    counts = torch.zeros(40)
    for seed in range(400):
        reservoir = Reservoir(4, seed)
        for start in range(0, 40, 8):
            reservoir.add(torch.arange(start, start + 8).float().unsqueeze(1))
            assert reservoir.rows.shape[0] <= 4
        counts[reservoir.rows.flatten().long()] += 1
    assert counts.sum() == 1600
    # 40 expected per row; five standard deviations of a binomial.
    assert (counts - 40).abs().max() < 5 * 6.1


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({}, {"method": "magic"}, "magic"),
        ({}, {"adapter_name": "nobody"}, "nobody"),
        ({"prompt_location": "add"}, {}, "prepend"),
        ({"projection_dim": 8}, {}, "projection"),
        ({"num_virtual_tokens": 50}, {"method": "mean_pool"}, "12 samples"),
    ],
)
def test_errors_change_nothing(fields, arguments, words):
    model = prompted(**fields)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        initialize_prompts(model, batches(), **arguments)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
