"""Prompts of low rank, and a number of prompts for each block: the same function as whole prompts, in every file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import images, randomize, tiny_vit

from vpt_peft import EncoderError, GatedVPTConfig, VPTConfig, initialize_prompts
from vpt_peft.cost import estimate_cost
from vpt_peft.export import export_model
from vpt_peft.official import load_official_state_dict, official_state_dict
from vpt_peft.tuners.vpt.parameters import find_parameters


COUNTS = [2, 5, 1]
FIELDS = [
    {"prompt_rank": 2, "num_virtual_tokens": 5},
    {"num_virtual_tokens": COUNTS},
    {"prompt_rank": 3, "num_virtual_tokens": COUNTS},
]


def prompted(config: type[VPTConfig] = VPTConfig, seed: int = 2, **fields) -> PeftModel:
    return randomize(get_peft_model(tiny_vit(), config(**fields)), seed).eval()  # type: ignore[return-value]


def stored(model, name: str = "default") -> dict[int, torch.Tensor]:
    """The prompts of each block, multiplied out by hand."""
    parts = find_parameters(model).adapter(name).parts  # type: ignore[union-attr]
    whole, basis = dict(parts["prompts"].named_parameters()), parts.get("basis")
    others = {} if basis is None else dict(basis.named_parameters())
    return {int(k): torch.einsum("pr,dr->pd", v, others[k]) if others else v for k, v in whole.items()}


def run(model, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def reference(prompts: dict[int, torch.Tensor], head: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """VPT-deep as the paper has it: prompt tokens behind the class token, dropped behind each block."""
    vit = tiny_vit().vit
    hidden = vit.embeddings(pixels)
    for index, block in enumerate(vit.layers):
        tokens = prompts[index].expand(len(pixels), -1, -1)
        hidden = block(torch.cat([hidden[:, :1], tokens, hidden[:, 1:]], dim=1))
        hidden = torch.cat([hidden[:, :1], hidden[:, 1 + tokens.shape[1] :]], dim=1)
    return head(vit.layernorm(hidden)[:, 0])


def head_of(model) -> torch.nn.Module:
    return model.base_model.model.classifier.modules_to_save["default"]


@pytest.mark.parametrize("implementation", ["auto", "token"])
@pytest.mark.parametrize("fields", FIELDS)
def test_outputs_and_gradients_are_those_of_plain_prompt_tokens(fields, implementation: str):
    model, pixels = prompted(**fields, implementation=implementation), images()
    model(pixel_values=pixels).logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    wanted = reference(stored(model), head_of(model), pixels)
    assert float((run(model, pixels) - wanted.detach()).abs().max()) < 1e-12
    wanted.square().sum().backward()
    assert len(found) == 2 + 3 * (1 + ("prompt_rank" in fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(
    "config, fields",
    [
        (VPTConfig, {"deep": False}),
        (VPTConfig, {"pooling": "image_prompt", "prompt_dropout": 0.1}),
        (VPTConfig, {"projection_dim": 6}),
        (VPTConfig, {"share_prompts": True}),
        (GatedVPTConfig, {}),
    ],
)
def test_low_rank_is_the_product_in_all_methods(config, fields):
    low, whole = (
        prompted(config, num_virtual_tokens=4, **extra, **fields, bias="all") for extra in ({"prompt_rank": 2}, {})
    )
    prompts = stored(low)
    for name, parameter in whole.named_parameters():
        if ".vpt_prompts." in name or ".gated_prompt_prompts." in name:
            parameter.data = prompts[int(name.rsplit(".", 1)[1])].detach()
        elif parameter.requires_grad:
            parameter.data = dict(low.named_parameters())[name].detach()
    assert float((run(low, images()) - run(whole, images())).abs().max()) < 1e-12


@pytest.mark.parametrize("fields", FIELDS)
def test_saved_merged_exported(fields, tmp_path):
    model, pixels = prompted(**fields), images()
    before = run(model, pixels)
    model.save_pretrained(tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    numbers = fields["num_virtual_tokens"] if isinstance(fields["num_virtual_tokens"], list) else [5] * 3
    rank = fields.get("prompt_rank")
    start = "base_model.model.prompt_tuner."
    shapes = {f"{start}vpt_prompts.{i}": (n, rank or 32) for i, n in enumerate(numbers)}
    shapes |= {f"{start}vpt_basis.{i}": (32, rank) for i in range(3)} if rank else {}
    assert {key: tuple(value.shape) for key, value in file.items() if "classifier" not in key} == shapes
    again = PeftModel.from_pretrained(tiny_vit(), tmp_path / "adapter")
    assert again.peft_config["default"].num_virtual_tokens == fields["num_virtual_tokens"]
    assert torch.equal(run(again, pixels), before)
    model.merge_adapter()
    assert float((run(model, pixels) - before).abs().max()) < 1e-12
    parts = find_parameters(model).adapter("default").parts  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in parts["basis" if rank else "prompts"].parameters():
            parameter.neg_()
    assert float((run(model, pixels) - before).abs().max()) > 1e-3


def test_exported(tmp_path):
    model = prompted(prompt_rank=3, num_virtual_tokens=COUNTS).float()
    path = export_model(model, tmp_path / "model.pt2", format="torch")
    found = torch.export.load(path).module()(images(dtype=torch.float32))
    found = found["logits"] if isinstance(found, dict) else found[0] if isinstance(found, (tuple, list)) else found
    assert float((found - run(model, images(dtype=torch.float32))).abs().max()) < 1e-4


def test_mixed_batch():
    model = get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3), adapter_name="plain")
    for number, fields in enumerate(FIELDS):
        model.add_adapter(f"a{number}", VPTConfig(**fields))
    randomize(model).eval()
    pixels, names = images(5), ["a2", "plain", "a0", "__base__", "a1"]
    mixed = model(pixel_values=pixels, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = run(model, pixels[row : row + 1])
        else:
            model.set_adapter(name)
            alone = run(model, pixels[row : row + 1])
        assert float((mixed[row] - alone[0]).abs().max()) < 1e-12, name


def test_scale_of_new_products():
    """A has deviation 0.02, B is drawn by Xavier's rule; zeros start at zero and learn."""
    parts = find_parameters(
        get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=400, prompt_rank=100))
    ).adapter("default").parts  # type: ignore[union-attr]  # fmt: skip
    factor, basis = (parts[part]["0"] for part in ("prompts", "basis"))
    assert float(factor.std()) == pytest.approx(0.02, rel=0.02)
    bound = (6 / (32 + 100)) ** 0.5
    assert 0.99 * bound < float(basis.abs().max()) <= bound
    model = get_peft_model(tiny_vit(), VPTConfig(prompt_rank=2, init_prompts="zeros"))
    assert all(float(value.detach().abs().max()) == 0.0 for value in stored(model).values())
    model(pixel_values=images()).logits.square().sum().backward()
    assert float(find_parameters(model).adapter("default").parts["prompts"]["0"].grad.abs().max()) > 0.0


@pytest.mark.parametrize("rank", [2, 6])
def test_starts_from_data_are_the_nearest_product(rank: int):
    data = [images(4)]
    whole, low = (
        get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=4, **extra)) for extra in ({}, {"prompt_rank": rank})
    )
    for model in (whole, low):
        initialize_prompts(model, data)
    for index, rows in stored(whole).items():
        left, scale, right = torch.linalg.svd(rows.detach(), full_matrices=False)
        wanted = left[:, :rank] * scale[:rank] @ right[:rank]
        assert float((stored(low)[index] - wanted).abs().max()) < 1e-6


def test_starts_from_data_for_each_number():
    model, plain = prompted(num_virtual_tokens=COUNTS), prompted(num_virtual_tokens=5)
    for each in (model, plain):
        initialize_prompts(each, [images(4)])
    assert [len(rows) for rows in stored(model).values()] == COUNTS
    assert torch.equal(stored(model)[1], stored(plain)[1])


def test_official_names():
    model = prompted(prompt_rank=2, num_virtual_tokens=4)
    found, prompts = official_state_dict(model), stored(model)
    assert torch.allclose(found["prompt_embeddings"][0], prompts[0])
    assert torch.allclose(found["deep_prompt_embeddings"], torch.stack([prompts[1], prompts[2]]))
    with pytest.raises(ValueError, match="prompt_rank=2: official prompts are no product"):
        load_official_state_dict(model, found)
    with pytest.raises(ValueError, match=r"num_virtual_tokens=\[2, 5, 1\]: the official code has one number"):
        official_state_dict(prompted(num_virtual_tokens=COUNTS))


@pytest.mark.parametrize("fields", FIELDS)
def test_cost(fields):
    model = prompted(**fields)
    estimate = estimate_cost(tiny_vit(), VPTConfig(**fields), batch_size=2)
    assert estimate.trainable_values == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_order_is_that_of_the_blocks():
    model = prompted(num_virtual_tokens=[1, 4], layers_to_transform=[0, 1], layers_from_end=True, propagate=False)
    assert {index: len(rows) for index, rows in stored(model).items()} == {1: 1, 2: 4}


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: VPTConfig(num_virtual_tokens=[]), ValueError, r"num_virtual_tokens=\[\]"),
        (lambda: VPTConfig(num_virtual_tokens=[3, 0]), ValueError, "num_virtual_tokens=0 must be at least 1"),
        (lambda: VPTConfig(num_virtual_tokens=[3, 1.5]), TypeError, "num_virtual_tokens=1.5 must be an integer"),
        (lambda: VPTConfig(num_virtual_tokens=[3], prompt_location="pad"), ValueError, "a list is for prompt tokens"),
        (lambda: VPTConfig(num_virtual_tokens=[3], share_prompts=True), ValueError, "blocks that share prompts"),
        (lambda: VPTConfig(prompt_rank=0), ValueError, "prompt_rank=0 must be at least 1"),
        (lambda: VPTConfig(prompt_rank=2, prompt_location="add"), ValueError, "prompt_rank is defined for prompt tok"),
        (lambda: prompted(num_virtual_tokens=[3, 4]), ValueError, r"has 2 numbers, but 3 blocks have prompts"),
    ],
)
def test_refused(make: Callable, error: type[Exception], message: str):
    with pytest.raises(error, match=message) as caught:
        make()
    assert not isinstance(caught.value, EncoderError)
