"""Vision towers that take the patches of all images as one sequence (Qwen-VL)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoder_fixtures import to_double
from peft import get_peft_model
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    VideoLlama3VisionConfig,
    VideoLlama3VisionModel,
)

from vpt_peft import VPTConfig
from vpt_peft.encoder import EncoderError, find_encoder, read_blocks, submodule


TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}  # fmt: skip
VISION: dict[str, Any] = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
WIDE: dict[str, Any] = {**VISION, "out_hidden_size": 32, "intermediate_size": 64}
IDS = {"image_token_id": 98, "vision_start_token_id": 96, "vision_end_token_id": 97}


def qwen2(**vision: Any) -> nn.Module:
    config = Qwen2VLConfig(
        text_config=TEXT, vision_config={**VISION, "embed_dim": 32, "mlp_ratio": 2, **vision}, **IDS
    )
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5(**vision: Any) -> nn.Module:
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config={**WIDE, **windows, **vision}, **IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3(**vision: Any) -> nn.Module:
    more = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=TEXT, vision_config={**WIDE, **more, **vision}, **IDS)
    )


MODELS: dict[str, Callable[..., nn.Module]] = {"qwen2": qwen2, "qwen2.5": qwen2_5, "qwen3": qwen3}
# Frames, rows and columns of three images of 20 px to 32 px
GRIDS = [(1, 4, 6), (1, 8, 8), (1, 2, 4)]


def make(name: str, **vision: Any) -> nn.Module:
    torch.manual_seed(0)
    model = to_double(MODELS[name](**vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def patches(*grids: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(t * h * w, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64) for t, h, w in GRIDS]
    chosen = [drawn[GRIDS.index(grid)] for grid in grids]
    return {"hidden_states": torch.cat(chosen), "grid_thw": torch.tensor(grids)}


def prompted(name: str, **fields: Any) -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    """The model with deep prompts, its tower, and the prompts of each block."""
    torch.manual_seed(3)
    model = get_peft_model(make(name), VPTConfig(num_virtual_tokens=5, modules_to_save=[], **fields)).eval()
    own = [p for key, p in model.named_parameters() if ".vpt_prompts." in key]
    for prompts in own:
        prompts.data = torch.randn(prompts.shape, dtype=torch.float64)
    return model, model.get_base_model().model.visual, own


@pytest.mark.parametrize("name", MODELS)
def test_tower_is_found(name: str):
    spec = find_encoder(make(name))
    assert spec.path == "model.visual" and spec.packed
    assert [block.path for block in spec.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert spec.special == () and spec.image_size is None and spec.patch_embedding is None
    for block in spec.blocks:
        attention = block.attention
        assert (block.width, block.tokens, attention.heads, attention.head_dim) == (32, 16, 4, 8)
        assert (attention.norm, attention.out, attention.uses_interface) == ("norm1", "proj", True)
        for part, projection in enumerate((attention.query, attention.key, attention.value)):
            assert projection is not None
            assert (projection.path, projection.parts, projection.part) == ("qkv", 3, part)
        assert not block.takes_tokens and "one sequence" in block.no_tokens_reason


def test_tower_of_pixel_values_with_a_grid():
    config = VideoLlama3VisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, patch_size=4, num_channels=6
    )
    model = VideoLlama3VisionModel(config)
    spec = find_encoder(model)
    assert spec.packed and spec.channels == 6 and spec.image_size is None and len(spec.blocks) == 2
    assert not any(block.takes_tokens for block in spec.blocks)
    assert [block.attention.value.path for block in spec.blocks] == ["v_proj", "v_proj"]
    assert read_blocks(model, model, spec) == (True, True)


def test_tower_of_patches_that_are_small_images():
    module = pytest.importorskip("transformers.models.kimi_k25.modeling_kimi_k25")
    cls = module.Kimi_K25VisionModel
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    spec = find_encoder(cls(cls.config_class(**sizes, patch_size=4)))
    assert spec.packed and spec.channels == 3 and spec.image_size is None and spec.patch_embedding is None
    assert [block.tokens for block in spec.blocks] == [16, 16]
    assert all(block.attention.key is not None and not block.takes_tokens for block in spec.blocks)


def test_tower_that_cannot_be_run_says_why():
    model = make("qwen2")
    model.model.visual.config.patch_size = 5
    with pytest.raises(EncoderError, match=r"Qwen2Vision\w+ could not be run on a random input.*size of tensor"):
        find_encoder(model)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_channels(name: str, channels: int):
    assert find_encoder(make(name, in_channels=channels)).channels == channels


@pytest.mark.parametrize("window, tokens", [(8, 4), (16, 16), (64, 16)])
def test_traced_image_fits_one_window(window: int, tokens: int):
    spec = find_encoder(make("qwen2.5", window_size=window))
    assert [block.tokens for block in spec.blocks] == [tokens] * 3
    assert all(block.attention.key is not None for block in spec.blocks)


@pytest.mark.parametrize("name", MODELS)
def test_all_blocks_are_read(name: str):
    model = make(name)
    spec = find_encoder(model)
    assert read_blocks(model, submodule(model, spec.path), spec) == (True, True, True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_each_image_sees_the_prompts_by_itself(name: str, attention: str):
    model, tower, _ = prompted(name)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        together = tower(**patches(*GRIDS)).pooler_output
        alone = torch.cat([tower(**patches(grid)).pooler_output for grid in GRIDS])
        with model.disable_adapter():
            plain = tower(**patches(*GRIDS)).pooler_output
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert (together - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_prompts_are_tokens_in_front_of_each_image(name: str):
    """Keys and values equal prompt tokens at position zero that stand in front of each image in each block."""
    model, tower, prompts = prompted(name)
    inputs = patches(*GRIDS)
    seen: list[tuple[tuple, dict[str, Any]]] = []
    outputs: list[torch.Tensor] = []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        block.register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        tower(**inputs)
        sizes = [t * h * w for t, h, w in GRIDS]
        with model.disable_adapter():
            for block, own, output, (args, kwargs) in zip(
                tower.blocks, prompts, list(outputs), list(seen), strict=True
            ):
                parts = [torch.cat([own, part]) for part in args[0].split(sizes)]
                cos, sin = (
                    torch.cat([torch.cat([torch.full((5, 8), fill), part]) for part in table.split(sizes)])
                    for fill, table in zip((1.0, 0.0), kwargs["position_embeddings"], strict=True)
                )
                lengths = torch.tensor([0, *(size + 5 for size in sizes)]).cumsum(0)
                expected = block(torch.cat(parts), cu_seqlens=lengths, position_embeddings=(cos, sin))
                expected = torch.cat([part[5:] for part in expected.split([size + 5 for size in sizes])])
                torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_all_prompts_train(name: str):
    _, tower, prompts = prompted(name)
    tower(**patches(*GRIDS)).pooler_output.square().sum().backward()
    assert len(prompts) == 3 and all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in prompts)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"deep": False}, "one sequence"),
        ({"implementation": "token"}, "one sequence"),
        ({"prompt_location": "pad"}, "convolution"),
        ({"prompt_location": "add"}, "one sequence"),
        ({"pooling": "class"}, "no final norm"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_packed_sequence_cannot_do_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(EncoderError, match=message):
        get_peft_model(make("qwen2"), VPTConfig(**fields))
