"""Prompts as keys and values under every attention implementation, with masks, and the arithmetic around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, draw
from encoder_fixtures import Float64, build, inputs_of
from peft import PeftModel, get_peft_model
from reference_attention import prompted_by_reference
from torch import nn
from torch.overrides import _len_torch_function_stack
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flash_attention
from transformers.masking_utils import flash_attention_mask

from vpt_peft import VPTConfig, attention_maps
from vpt_peft.attention import AttentionExtras
from vpt_peft.attention.extras import insert_columns, over_rows, widen_mask
from vpt_peft.tuners.vpt.adapter import PromptAdapter


PROMPTS = 3
EXACT = 1e-9
IMPLEMENTATIONS = [
    ("vit", "eager"),
    ("vit", "sdpa"),
    ("vit", "flex_attention"),
    ("beit", "eager"),
    ("beit", "sdpa"),
    ("beit_shared_bias", "eager"),
    ("beit_shared_bias", "sdpa"),
    ("siglip_vision_model", "flex_attention"),
    ("siglip2_vision_model", "eager"),
    ("siglip2_vision_model", "sdpa"),
    ("dinov3_vit", "flex_attention"),
    ("swin", "eager"),
    ("swin", "sdpa"),
]


@pytest.fixture(autouse=True)
def exact_computation() -> Iterator[None]:
    """Eager attention casts to float32, and compiled flex attention does not run in float64."""
    with Float64(), torch.compiler.set_stance("force_eager"):
        yield


def prompted(name: str, attention: str | None = "sdpa", **config: Any) -> PeftModel:
    """A tiny encoder with deep prompts of fixed values; `attention` is the implementation, `None` for the default."""
    model = build(name)
    if attention is not None:
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
    config = {"num_virtual_tokens": PROMPTS, "modules_to_save": [], **config}
    peft_model = get_peft_model(model, VPTConfig(**config)).eval()
    for index, prompt in prompts_of(peft_model).items():
        prompt.data = 0.3 * draw(*prompt.shape, seed=index).to(prompt)
    return peft_model


def prompts_of(model: nn.Module) -> dict[int, nn.Parameter]:
    return {int(name.split(".")[-1]): p for name, p in model.named_parameters() if ".vpt_prompts." in name}


def attention_of(model: PeftModel, name: str, block: int = 0) -> nn.Module:
    oracle = ARCHITECTURES[name]
    return model.get_base_model().get_submodule(f"{oracle.blocks[block]}.{oracle.attention}")


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def expected(name: str, inputs: dict[str, Any], peft_model: PeftModel) -> torch.Tensor:
    """The same by attention written apart from the package."""
    model = build(name)
    with prompted_by_reference(model, ARCHITECTURES[name], {i: p.detach() for i, p in prompts_of(peft_model).items()}):
        return output(model, inputs)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("name, implementation", IMPLEMENTATIONS)
def test_every_implementation(name: str, implementation: str):
    inputs = inputs_of(name)
    model = prompted(name, implementation)
    result = output(model, inputs)
    assert difference(result, expected(name, inputs, model)) < EXACT
    with model.disable_adapter():
        assert difference(output(model, inputs), result) > 1e-3


@pytest.mark.parametrize(
    "name, before, after",
    [(name, before, after) for name, before in IMPLEMENTATIONS for other, after in IMPLEMENTATIONS if name == other],
)
def test_later_choice_of_implementation_keeps_the_prompts(name: str, before: str, after: str):
    inputs = inputs_of(name)
    model = prompted(name, before)
    result = output(model, inputs)
    model.get_base_model().set_attn_implementation(after)
    assert model.get_base_model().config._attn_implementation == after
    assert difference(output(model, inputs), result) < EXACT
    base = model.unload()
    assert base.config._attn_implementation == after
    assert attention_config(base, name) is base.config


def attention_config(model: nn.Module, name: str) -> Any:
    oracle = ARCHITECTURES[name]
    return model.get_submodule(f"{oracle.blocks[0]}.{oracle.attention}").config


def test_names_stay_out_of_the_config(tmp_path):
    model = prompted("vit")
    assert model.get_base_model().config._attn_implementation == "sdpa"
    model.get_base_model().config.save_pretrained(tmp_path)
    assert "vpt_" not in (tmp_path / "config.json").read_text()
    assert attention_of(model, "vit").config._attn_implementation == "vpt_sdpa"
    assert attention_of(model, "vit").config.hidden_size == model.get_base_model().config.hidden_size


def test_attention_maps():
    model, inputs = prompted("vit", "eager"), inputs_of("vit")
    with torch.no_grad():
        shown = model(**inputs, output_attentions=True).attentions
    found = attention_maps(model, inputs["pixel_values"])
    assert len(found) == len(shown) == 3
    prompts = [f"prompt_{index}" for index in range(PROMPTS)]
    for (weights, columns), square in zip(found, shown, strict=True):
        assert columns == ["class", *prompts, *(f"patch_{index}" for index in range(16))]
        assert weights.shape == (2, 4, 17, PROMPTS + 17) and square.shape == (2, 4, 17, 17)
        assert torch.equal(square, torch.cat([weights[..., :1], weights[..., 1 + PROMPTS :]], dim=-1))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17, dtype=weights.dtype))
    # The share of the prompts in the first block, from the definition.
    oracle, base = ARCHITECTURES["vit"], model.get_base_model()
    block, attention = base.get_submodule(oracle.blocks[0]), attention_of(model, "vit")
    with torch.no_grad(), model.disable_adapter():
        tokens = block.layernorm_before(base.embeddings(inputs["pixel_values"]))
        prompts = block.layernorm_before(prompts_of(model)[0]).expand(2, -1, -1)
        keys = attention.get_submodule(oracle.key)(
            torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
        ).unflatten(-1, (4, 8))
        queries = attention.get_submodule(oracle.key.replace("k", "q", 1))(tokens).unflatten(-1, (4, 8))
        logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / 8**0.5
    torch.testing.assert_close(found[0].maps, logits.softmax(-1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_is_not_seen_but_prompts_are(implementation: str):
    name = "siglip2_vision_model"
    inputs = inputs_of(name)
    model = prompted(name, implementation)
    result = output(model, inputs)
    # The second image by itself, without its four patches of padding.
    alone = {
        "pixel_values": inputs["pixel_values"][1:, :12],
        "pixel_attention_mask": inputs["pixel_attention_mask"][1:, :12],
        "spatial_shapes": inputs["spatial_shapes"][1:],
    }
    assert difference(result[1:, :12], output(model, alone)) < EXACT
    inputs["pixel_values"][1, 12:] += 1.0
    assert difference(result[1, :12], output(model, inputs)[1, :12]) < EXACT
    with model.disable_adapter():
        assert difference(result[1:, :12], output(model, alone)) > 1e-3


def user_masks() -> dict[str, torch.Tensor]:
    padding = torch.ones(2, 17, dtype=torch.long)
    padding[0, 14:] = padding[1, 9:] = 0
    seen = padding[:, None, None, :].bool().expand(2, 1, 17, 17).clone()
    seen[:, :, 3, 1:8] = False
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    return {"padding": padding, "boolean": seen, "additive": additive, "bias": draw(2, 4, 17, 17).double()}


MASKED = [(kind, name) for kind in ("padding", "additive", "bias") for name in ("eager", "sdpa")]


@pytest.mark.parametrize("kind, implementation", [*MASKED, ("boolean", "sdpa"), ("padding", "flex_attention")])
def test_masks_of_the_user(kind: str, implementation: str):
    mask = user_masks()[kind]
    inputs = {**inputs_of("vit"), "attention_mask": mask}
    model = prompted("vit", implementation)
    result = output(model, inputs)
    token = prompted("vit", implementation, implementation="token")
    assert difference(result, output(token, inputs)) < EXACT
    if kind == "boolean":
        inputs["attention_mask"] = user_masks()["additive"]
    assert difference(result, expected("vit", inputs, model)) < EXACT
    inputs.pop("attention_mask")
    assert difference(result, output(model, inputs)) > 1e-3


def plain_flash(query, key, value, mask, scaling: float) -> torch.Tensor:
    """Attention over `(batch, tokens, heads, head_dim)` with a padding mask `(batch, keys)`, as in flash attention."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * scaling
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


class FakeFlash:
    """An attention function that notes what it was given."""

    name = "fake_flash_attention_2"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        linear = next(child for child in module.modules() if isinstance(child, nn.Linear))
        self.calls.append(
            {
                "name": module.config._attn_implementation,
                "dtype": linear.weight.dtype,
                "is_causal": module.is_causal,
                "query": query,
                "key": key,
                "value": value,
                "mask": attention_mask,
            }
        )
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return plain_flash(query, key, value, attention_mask, scaling), None


@pytest.fixture
def fake_flash() -> Iterator[FakeFlash]:
    function = FakeFlash()
    AttentionInterface.register(FakeFlash.name, function)
    AttentionMaskInterface.register(FakeFlash.name, flash_attention_mask)
    yield function
    for mapping in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        del mapping[FakeFlash.name]
    AttentionInterface._global_mapping.pop("vpt_" + FakeFlash.name, None)


@pytest.mark.parametrize("name, masked", [("vit", False), ("vit", True), ("siglip2_vision_model", True)])
def test_flash_functions_see_the_real_name_and_prompts_first(name: str, masked: bool, fake_flash: FakeFlash):
    inputs = inputs_of(name)
    mask = inputs.get("pixel_attention_mask")
    if name == "vit" and masked:
        mask = inputs["attention_mask"] = user_masks()["padding"]
    model = prompted(name)
    wanted = output(model, inputs)
    model.get_base_model().config._attn_implementation_internal = FakeFlash.name
    found = output(model, inputs)
    # A fully padded query has no defined result; nobody reads it.
    rows = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert difference(found[rows], wanted[rows]) < EXACT
    assert len(fake_flash.calls) == 3
    for index, call in enumerate(fake_flash.calls):
        tokens = call["query"].shape[2]
        assert call["name"] == FakeFlash.name
        assert call["dtype"] == torch.float64 and call["is_causal"] is False
        assert call["key"].shape == call["value"].shape == (2, 4, PROMPTS + tokens, 8)
        attention = attention_of(model, name, index)
        block = model.get_base_model().get_submodule(ARCHITECTURES[name].blocks[index])
        normed = block.get_submodule(ARCHITECTURES[name].norm)(prompts_of(model)[index])
        for kind, path in (("key", ARCHITECTURES[name].key), ("value", ARCHITECTURES[name].value)):
            by_head = attention.get_submodule(path)(normed).unflatten(-1, (4, 8)).transpose(0, 1)
            assert difference(call[kind][0, :, :PROMPTS], by_head) < EXACT
            assert difference(call[kind][1, :, :PROMPTS], by_head) < EXACT
        if mask is None:
            assert call["mask"] is None
        else:
            assert call["mask"].shape == (2, PROMPTS + tokens)
            assert bool((call["mask"][:, :PROMPTS] == 1).all())
            assert torch.equal(call["mask"][:, PROMPTS:].long(), mask)


def test_transformers_flash_function_asks_for_the_real_kernel(monkeypatch: pytest.MonkeyPatch):
    model, inputs = prompted("vit"), inputs_of("vit")
    wanted = output(model, inputs)
    asked: list[tuple[str, int, int]] = []

    def kernel(
        query, key, value, attention_mask, query_length, *args, softmax_scale=None, attn_implementation=None, **kwargs
    ):
        asked.append((attn_implementation, query_length, key.shape[1]))
        return plain_flash(query, key, value, attention_mask, softmax_scale)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    model.get_base_model().config._attn_implementation_internal = "flash_attention_2"
    assert difference(output(model, inputs), wanted) < EXACT
    assert asked == [("flash_attention_2", 17, PROMPTS + 17)] * 3


@pytest.mark.parametrize("name", ["vit", "flava_image_model", "blip_vision_model", "hiera"])
def test_failing_attention_leaves_nothing_behind(name: str):
    model, inputs = prompted(name, None), inputs_of(name)
    result = output(model, inputs)
    attention = attention_of(model, name)

    def fail(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        # The map has made the prompts' keys by then.
        if output.shape[-2] != PROMPTS:
            raise RuntimeError("on purpose")

    handle = attention.get_submodule(ARCHITECTURES[name].key).register_forward_hook(fail)
    depth = _len_torch_function_stack()
    with pytest.raises(RuntimeError, match="on purpose"):
        output(model, inputs)
    assert _len_torch_function_stack() == depth
    handle.remove()
    assert torch.equal(output(model, inputs), result)


@pytest.mark.parametrize("name", ["vit", "swin", "blip_vision_model", "hiera", "vitdet"])
def test_dropped_prompts_stay_with_their_image(name: str, monkeypatch: pytest.MonkeyPatch):
    """Prompt dropout makes prompts per image: every image sees the ones drawn for it, in all of its windows."""
    model = prompted(name, None, prompt_dropout=0.5)
    inputs = inputs_of(name)
    same = {key: value[:1].expand_as(value).contiguous() for key, value in inputs.items()}
    drawn: list[torch.Tensor] = []
    original = PromptAdapter.prompts

    def prompts(adapter: PromptAdapter, key: str | None, batch: int) -> torch.Tensor:
        values = original(adapter, key, 1)
        # The first image keeps its prompts, the second gets others.
        drawn.append(values)
        return torch.cat([values, -values]).detach()

    monkeypatch.setattr(PromptAdapter, "prompts", prompts)
    first, second = (flat_output(model, same)[index] for index in (0, 1))
    monkeypatch.setattr(PromptAdapter, "prompts", lambda adapter, key, batch: original(adapter, key, 1))
    assert difference(first, flat_output(model, same)[0]) < EXACT
    monkeypatch.setattr(PromptAdapter, "prompts", lambda adapter, key, batch: -original(adapter, key, 1))
    assert difference(second, flat_output(model, same)[1]) < EXACT
    assert difference(first, second) > 1e-3
    assert len(drawn) >= len(ARCHITECTURES[name].blocks)


def flat_output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def test_insert_columns():
    mask = torch.arange(6).reshape(2, 3)
    assert insert_columns(mask, -1, 0, 2, 9).tolist() == [[9, 9, 0, 1, 2], [9, 9, 3, 4, 5]]
    assert insert_columns(mask, -1, 1, 1, 9).tolist() == [[0, 9, 1, 2], [3, 9, 4, 5]]
    assert insert_columns(mask, 0, 2, 1, 9).tolist() == [[0, 1, 2], [3, 4, 5], [9, 9, 9]]


def test_windows_of_an_image_lie_together():
    per_image = torch.tensor([[1.0], [2.0]])
    assert over_rows(per_image, 6).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert over_rows(per_image, 2) is per_image
    assert over_rows(per_image[:1], 3).flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "mask, opened",
    [
        (torch.zeros(1, 1, 4, 4, dtype=torch.float64), 0.0),
        (torch.full((2, 3, 4, 4), -5.0, dtype=torch.float64), 0.0),
        (torch.zeros(1, 1, 1, 4, dtype=torch.bool), True),
        (torch.zeros(2, 4, dtype=torch.long), 1),
    ],
    ids=["additive", "bias", "boolean", "padding"],
)
def test_masks_are_open_for_keys_in_front(mask: torch.Tensor, opened: Any):
    extras = AttentionExtras(keys=torch.zeros(1, 3, 2, 8), values=torch.zeros(1, 3, 2, 8))
    wide = widen_mask(mask, 4, 4, extras)
    assert wide.shape == (*mask.shape[:-1], 6) and wide.dtype == mask.dtype
    assert bool((wide[..., :2] == opened).all())
    assert torch.equal(wide[..., 2:], mask)


def test_masks_of_ones_are_open_at_one():
    extras = AttentionExtras(keys=torch.zeros(1, 1, 2, 8), values=torch.zeros(1, 1, 2, 8), mask_open=1.0)
    assert widen_mask(torch.zeros(1, 1, 3, 3), 3, 3, extras)[..., :2].unique().tolist() == [1.0]


def test_masks_are_open_for_tokens_among_the_others():
    mask = torch.full((1, 1, 3, 3), -5.0)
    wide = widen_mask(mask, 5, 5, AttentionExtras(prefix=1, inserted=2))
    assert wide.shape == (1, 1, 5, 5)
    kept = [0, 3, 4]
    assert torch.equal(wide[:, :, kept][..., kept], mask)
    assert wide[:, :, 1:3].unique().tolist() == [0.0] and wide[..., 1:3].unique().tolist() == [0.0]
