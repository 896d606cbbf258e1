"""Attention maps: in the model's own shape by `output_attentions`, and in full by `vpt_peft.attention_maps`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit
from torch import nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
)

import vpt_peft
from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.attention.extras import AttentionExtras
from vpt_peft.attention.intercept import PromptInterceptor


PROMPTS, TOKENS, BLOCKS, HEADS = 3, 17, 3, 4
# Eager attention takes its softmax in float32 inside transformers
CLOSE = 1e-6
KINDS: dict[str, Callable[[], VPTConfig]] = {
    "deep": lambda: VPTConfig(num_virtual_tokens=PROMPTS),
    "token": lambda: VPTConfig(num_virtual_tokens=PROMPTS, implementation="token"),
    "shallow": lambda: VPTConfig(num_virtual_tokens=PROMPTS, deep=False),
    "partly_deep": lambda: VPTConfig(num_virtual_tokens=PROMPTS, layers_to_transform=[0, 2]),
    "pooled": lambda: VPTConfig(num_virtual_tokens=PROMPTS, pooling="image_prompt"),
    "gated": lambda: GatedVPTConfig(num_virtual_tokens=PROMPTS, gate_init=0.0),
    "no_temperature": lambda: GatedVPTConfig(
        num_virtual_tokens=PROMPTS, gate_init=0.0, gate="elementwise", attention_temperature=False
    ),
}
needs_maps = pytest.mark.skipif(not hasattr(vpt_peft, "attention_maps"), reason="there is no vpt_peft.attention_maps")


def base(**given: Any) -> nn.Module:
    return tiny_vit(attn_implementation="eager", initializer_range=0.3, **given)


def attach(kind: str, **given: Any) -> PeftModel:
    return randomize(get_peft_model(base(**given), KINDS[kind]())).eval()  # type: ignore[return-value]


def maps_of(model: nn.Module, **given: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(pixel_values=images(2), output_attentions=True, **given).attentions


def parameters(model: PeftModel, part: str, adapter: str = "default") -> dict[int, torch.Tensor]:
    """Values of one part of an adapter by block, found by the names they are saved under."""
    found = {n: p.detach() for n, p in model.named_parameters() if f"_{part}.{adapter}." in n}
    return {int(name.split(f"_{part}.{adapter}.")[1].split(".")[0]): value for name, value in found.items()}


def reference(model: PeftModel, adapter: str = "default") -> list[torch.Tensor]:
    """Full maps `(batch, heads, tokens, class + prompts + patches)` of each block, run on tokens step by step."""
    config = model.peft_config[adapter]
    plain = model.base_model.model.vit
    prompts, gates = parameters(model, "prompts", adapter), parameters(model, "gates", adapter)
    temperatures = parameters(model, "temperatures", adapter)
    with torch.no_grad(), model.disable_adapter():
        hidden = plain.embeddings(images(2))
        carried, maps = torch.empty(0), []
        for index, block in enumerate(plain.layers):
            if index in prompts:
                carried = prompts[index].reshape(1, -1, hidden.shape[-1]).expand(2, -1, -1)
            tokens = torch.cat([hidden[:, :1], carried, hidden[:, 1:]], dim=1)
            normed, attention = block.layernorm_before(tokens), block.attention
            query, key, value = (
                getattr(attention, f"{letter}_proj")(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for letter in "qkv"
            )
            temperature = temperatures[index].reshape(()) if index in temperatures else 1.0
            weights = (query @ key.transpose(-1, -2) / 8**0.5 / temperature).softmax(-1)
            maps.append(weights[:, :, [0, *range(1 + PROMPTS, TOKENS + PROMPTS)]])
            attended = attention.o_proj((weights @ value).transpose(1, 2).flatten(2)) + tokens
            output = attended + block.mlp(block.layernorm_after(attended))
            hidden = torch.cat([output[:, :1], output[:, 1 + PROMPTS :]], dim=1)
            after = output[:, 1 : 1 + PROMPTS]
            if index in gates and config.gate == "scalar":
                gate = gates[index].reshape(()).sigmoid()
                after = gate * after + (1 - gate) * carried
            carried = after
    return maps


def without_prompts(full: torch.Tensor, prefix: int = 1) -> torch.Tensor:
    return torch.cat([full[..., :prefix], full[..., prefix + PROMPTS :]], dim=-1)


REFERENCED = [kind for kind in KINDS if kind != "no_temperature"]


@pytest.mark.parametrize("kind", KINDS)
def test_output_attentions_have_the_shape_without_prompts(kind: str):
    """What goes to prompts is left out, so that rows sum to less than one."""
    plain, maps = maps_of(base()), maps_of(attach(kind))
    assert [each.shape for each in maps] == [each.shape for each in plain] == [(2, HEADS, TOKENS, TOKENS)] * BLOCKS
    for each in maps:
        assert (each.sum(-1) < 1 + CLOSE).all() and each.sum(-1).mean() < 0.99 and (each >= 0).all()


@pytest.mark.parametrize("kind", REFERENCED)
def test_output_attentions_are_those_of_blocks_run_on_tokens(kind: str):
    model = attach(kind)
    for found, full in zip(maps_of(model), reference(model), strict=True):
        assert (found - without_prompts(full)).abs().max() < CLOSE


def test_both_implementations_give_equal_maps():
    one, other = attach("deep"), attach("token")
    for found, expected in zip(maps_of(one), maps_of(other), strict=True):
        assert (found - expected).abs().max() < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_rollout(kind: str):
    """Attention rollout (Abnar and Zuidema, 2020): the product of the maps, each mixed with the identity."""
    model = attach(kind)
    rolled = torch.eye(TOKENS, dtype=torch.float64)
    for each in maps_of(model):
        mixed = each.mean(1) + torch.eye(TOKENS)
        rolled = (mixed / mixed.sum(-1, keepdim=True)) @ rolled
    assert rolled.shape == (2, TOKENS, TOKENS)
    assert torch.allclose(rolled.sum(-1), torch.ones(2, TOKENS, dtype=torch.float64))
    assert rolled[:, 0, 1:].std() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_asking_for_maps_changes_no_logits(kind: str):
    model = attach(kind)
    with torch.no_grad():
        expected = model(pixel_values=images(2)).logits
        found = model(pixel_values=images(2), output_attentions=True, output_hidden_states=True)
    assert (found.logits - expected).abs().max() < 10 * CLOSE
    assert [each.shape[1] for each in found.hidden_states] == [TOKENS] * (BLOCKS + 1)


def test_merged_prompts():
    model = attach("deep")
    expected = maps_of(model)
    model.merge_adapter()
    for found, wanted in zip(maps_of(model), expected, strict=True):
        assert (found - wanted).abs().max() < CLOSE


def test_disabled_adapters_give_the_maps_of_the_base():
    model = attach("deep")
    with model.disable_adapter():
        found = maps_of(model)
    for each, expected in zip(found, maps_of(base()), strict=True):
        assert torch.equal(each, expected)


def test_mixed_batches():
    """Each image has the maps of its adapter."""
    model = get_peft_model(base(), KINDS["deep"](), adapter_name="a")
    model.add_adapter("b", VPTConfig(num_virtual_tokens=5, deep=False))
    randomize(model).eval()
    mixed = maps_of(model, adapter_names=["b", "a"])
    model.set_adapter("a")
    a = maps_of(model)
    model.set_adapter("b")
    b = maps_of(model)
    for each, of_a, of_b in zip(mixed, a, b, strict=True):
        assert each.shape == (2, HEADS, TOKENS, TOKENS)
        assert (each[0] - of_b[0]).abs().max() < CLOSE and (each[1] - of_a[1]).abs().max() < CLOSE


def swin(kind: str | None, depths: tuple[int, int] = (2, 1)) -> nn.Module:
    torch.manual_seed(0)
    config = SwinConfig(
        depths=list(depths), num_heads=[2, 4], initializer_range=0.3, image_size=32, patch_size=2, embed_dim=16,
        window_size=4, num_labels=7, attn_implementation="eager",
    )  # fmt: skip
    model = SwinForImageClassification(config).double().eval()
    return model if kind is None else randomize(get_peft_model(model, KINDS[kind]())).eval()


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_swin(kind: str):
    """Maps of windows, of the last block of each stage, as without prompts."""
    plain, maps = maps_of(swin(None)), maps_of(swin(kind))
    assert [each.shape for each in maps] == [each.shape for each in plain]
    for each in maps:
        assert (each.sum(-1) < 1 + CLOSE).all() and each.sum(-1).mean() < 0.99 and (each >= 0).all()


def test_swin_values():
    """The first block's maps from its own norm, projections and position bias, the prompts' columns cut."""
    model = swin("deep", depths=(1, 1))
    found = maps_of(model)[0]
    block = model.base_model.model.swin.encoder.layers[0].blocks[0]
    norm, attention = block.layernorm_before, block.attention
    prompts = next(p for n, p in model.named_parameters() if n.endswith("_prompts.default.0")).detach()
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), model.disable_adapter():
        model(pixel_values=images(2))
        handle.remove()
        windows = seen[0].reshape(2, 4, 4, 4, 4, 16).transpose(2, 3).reshape(32, 16, 16)
        query, key = (
            getattr(attention, f"{letter}_proj")(windows).unflatten(-1, (2, 8)).transpose(1, 2) for letter in "qk"
        )
        extra = attention.k_proj(norm(prompts.reshape(-1, 16))).unflatten(-1, (2, 8)).transpose(0, 1)
    table, index = (
        next(value for name, value in named if name.endswith(end))
        for named, end in ((attention.named_parameters(), "bias_table"), (attention.named_buffers(), "position_index"))
    )
    bias = table.detach()[index.reshape(-1)].reshape(16, 16, 2).permute(2, 0, 1)
    own = (query @ key.transpose(-1, -2) / 8**0.5 + bias).exp()
    shares = (query @ extra.transpose(-1, -2) / 8**0.5).exp()
    expected = own / (own.sum(-1, keepdim=True) + shares.sum(-1, keepdim=True))
    assert shares.shape == (32, 2, 16, PROMPTS) and (found - expected).abs().max() < CLOSE


@needs_maps
@pytest.mark.parametrize("kind", KINDS)
def test_full_maps_have_one_layout(kind: str):
    model = attach(kind)
    found = vpt_peft.attention_maps(model, images(2))
    assert len(found) == BLOCKS
    columns = ["class", *[f"prompt_{i}" for i in range(PROMPTS)], *[f"patch_{i}" for i in range(TOKENS - 1)]]
    for each, cut in zip(found, maps_of(model), strict=True):
        assert each.columns == columns
        assert each.maps.shape == (2, HEADS, TOKENS, TOKENS + PROMPTS)
        assert (each.maps.sum(-1) - 1).abs().max() < 1e-5
        assert (without_prompts(each.maps) - cut).abs().max() < CLOSE


@needs_maps
@pytest.mark.parametrize("kind", REFERENCED)
def test_full_maps_are_those_of_blocks_run_on_tokens(kind: str):
    model = attach(kind)
    for found, expected in zip(vpt_peft.attention_maps(model, images(2)), reference(model), strict=True):
        assert (found.maps - expected).abs().max() < CLOSE


@needs_maps
@pytest.mark.parametrize("kind", ["deep", "shallow", "gated"])
def test_full_maps_whatever_attention_function_runs(kind: str):
    """Also where the model's own function gives no maps; the model is as before then."""
    model, eager = attach(kind), attach(kind)
    model.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad():
        before = model(pixel_values=images(2)).logits
    expected = vpt_peft.attention_maps(eager, images(2))
    for found, wanted in zip(vpt_peft.attention_maps(model, images(2)), expected, strict=True):
        assert found.columns == wanted.columns and (found.maps - wanted.maps).abs().max() < CLOSE
    assert model.get_base_model().config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(pixel_values=images(2)).logits, before)


@needs_maps
def test_full_maps_of_a_named_adapter():
    """The adapter need not be active, and which is active stays."""
    model = get_peft_model(base(), KINDS["deep"](), adapter_name="a")
    model.add_adapter("b", KINDS["shallow"]())
    randomize(model).eval()
    model.set_adapter("a")
    for name in ("a", "b"):
        for found, expected in zip(
            vpt_peft.attention_maps(model, images(2), adapter_name=name), reference(model, name), strict=True
        ):
            assert (found.maps - expected).abs().max() < CLOSE
    assert model.active_adapter == "a"
    with pytest.raises(ValueError, match="nobody"):
        vpt_peft.attention_maps(model, images(2), adapter_name="nobody")


@needs_maps
def test_full_maps_in_training_mode_leave_it():
    config = VPTConfig(num_virtual_tokens=PROMPTS, prompt_dropout=0.5)
    model = randomize(get_peft_model(base(), config)).eval()
    expected = vpt_peft.attention_maps(model, images(2))
    model.train()
    modes = [module.training for module in model.modules()]
    for found, wanted in zip(vpt_peft.attention_maps(model, images(2)), expected, strict=True):
        assert (found.maps - wanted.maps).abs().max() < CLOSE
    assert [module.training for module in model.modules()] == modes


@needs_maps
def test_columns_where_some_blocks_have_no_prompts():
    model = randomize(
        get_peft_model(base(), VPTConfig(num_virtual_tokens=2, layers_to_transform=[1], propagate=False))
    )
    found = vpt_peft.attention_maps(model.eval(), images(2))
    assert [sum("prompt" in name for name in each.columns) for each in found] == [0, 2, 0]
    assert [each.maps.shape[-1] for each in found] == [TOKENS, TOKENS + 2, TOKENS]


@needs_maps
def test_columns_of_registers():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
    config = Dinov2WithRegistersConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=2)
    model = Dinov2WithRegistersModel(config).double().eval()
    found = vpt_peft.attention_maps(randomize(get_peft_model(model, KINDS["deep"]())).eval(), images(2))
    for each in found:
        assert each.columns[:7] == [
            "class", "register_0", "register_1", "prompt_0", "prompt_1", "prompt_2", "patch_0",
        ]  # fmt: skip
        assert each.maps.shape == (2, 4, 19, 22) and (each.maps.sum(-1) - 1).abs().max() < 1e-5


@needs_maps
@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_columns_without_a_class_token(kind: str):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).double().eval()
    found = vpt_peft.attention_maps(randomize(get_peft_model(model, KINDS[kind]())).eval(), images(2))
    for each in found:
        assert each.columns == ["prompt_0", "prompt_1", "prompt_2", *[f"patch_{i}" for i in range(16)]]
        assert each.maps.shape == (2, 4, 16, 19)


@needs_maps
def test_a_model_without_prompts_is_refused():
    with pytest.raises((ValueError, TypeError), match="prompts"):
        vpt_peft.attention_maps(copy.deepcopy(base()), images(2))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_maps_of_a_torch_call_have_its_scale(scale: float | None):
    query, key, value = torch.randn(3, 2, HEADS, 5, 8, dtype=torch.float64).unbind()
    recorded: list = []
    with PromptInterceptor(AttentionExtras(maps=recorded)):
        nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    expected = (query @ key.mT * (8**-0.5 if scale is None else scale)).softmax(-1)
    assert (recorded[0].maps - expected).abs().max() < 1e-12


def test_images_of_another_size():
    model = get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=PROMPTS)).eval()
    model.base_model.model.set_attn_implementation("eager")
    size = model.config.image_size
    larger = torch.rand(1, 3, 2 * size, size, dtype=torch.float64)
    found = vpt_peft.attention_maps(model, larger)[0]
    patches = 2 * (TOKENS - 1)
    assert (
        found.maps.shape[-2:] == (1 + patches, 1 + PROMPTS + patches) and found.columns[-1] == f"patch_{patches - 1}"
    )
    with torch.no_grad():
        expected = model(pixel_values=larger, interpolate_pos_encoding=True, output_attentions=True).attentions[0]
    patches_alone = found.maps[..., [0, *range(1 + PROMPTS, 1 + PROMPTS + patches)]]
    assert torch.allclose(patches_alone, expected, atol=CLOSE)
