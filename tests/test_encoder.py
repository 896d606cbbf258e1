"""The encoder inside a model is found, described and refused without touching the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import SUPPORTED
from composites import COMPOSITES, IMAGE, SIZES, Towers, clip, swin_config, text, vit
from encoder_fixtures import build, computing_in_float64, inputs_of, require_installed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import ResNetConfig, ResNetModel, SwinModel, ViTConfig, ViTModel
from transformers.modeling_utils import AttentionInterface

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.encoder import EncoderError, find_encoder, submodule
from vpt_peft.tuners.vpt.layer import VPTLayer


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching prompts could have changed."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return {
        "modules": {path: type(module) for path, module in modules.items()},
        "hooks": {path: [len(getattr(module, name)) for name in hooks] for path, module in modules.items()},
        "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
        "configs": {path: id(module.config) for path, module in modules.items() if hasattr(module, "config")},
        "attention": {
            path: module.config._attn_implementation
            for path, module in modules.items()
            if hasattr(getattr(module, "config", None), "_attn_implementation")
        },
        "training": {path: module.training for path, module in modules.items()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "random": {"cpu": torch.get_rng_state()},
        "modes": torch._C._len_torch_function_stack(),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    for kind in before:
        if kind in ("state", "random"):
            assert after[kind].keys() == before[kind].keys()
            assert [name for name in before[kind] if not torch.equal(after[kind][name], before[kind][name])] == []
        else:
            assert after[kind] == before[kind], kind


@pytest.mark.parametrize("name", COMPOSITES)
def test_encoder_inside_a_larger_model(name: str):
    make, path, depth, _ = COMPOSITES[name]
    model = make()
    before = fingerprint(model)
    spec = find_encoder(model)
    assert_untouched(model, before)
    assert spec.path == path or spec.path.startswith(path + ".")
    assert len(spec.blocks) == depth
    assert "vision" in spec.model_type or spec.model_type in ("vit", "dinov2", "swin")
    encoder = submodule(model, spec.path)
    for block in spec.blocks:
        attention = submodule(submodule(encoder, block.path), block.attention.path)
        assert block.attention.key is not None and block.attention.value is not None
        width = submodule(attention, block.attention.key.path).weight.shape
        assert tuple(width) == (block.width, block.width)
        assert block.attention.heads * block.attention.head_dim == block.width
    assert find_encoder(model, spec.path) == spec


@pytest.mark.parametrize("name", COMPOSITES)
def test_prompts_go_to_the_encoder_alone(name: str):
    make, path, depth, _ = COMPOSITES[name]
    model = get_peft_model(make(), VPTConfig(num_virtual_tokens=2, modules_to_save=[]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # LLaVA reads the last block but one
    assert len(trained) == depth - (name == "llava")
    assert all(".vpt_prompts." in name for name in trained)
    assert all(block.startswith(f"{path}.") for block in prompted_blocks(model))
    assert len(prompted_blocks(model)) == depth


@pytest.mark.parametrize("name", COMPOSITES)
def test_head_is_found_and_given_back(name: str):
    make, _, _, head = COMPOSITES[name]
    model = get_peft_model(make(), VPTConfig(num_virtual_tokens=2))
    saved = model.peft_config["default"].modules_to_save or []
    assert head <= set(saved) and bool(head) == bool(saved)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".vpt_prompts." not in name]
    assert bool(trained) == bool(head)
    base = model.unload()
    assert [type(module) for module in base.modules()] == [type(module) for module in make().modules()]


def prompted_blocks(model: PeftModel) -> list[str]:
    """Paths of the modules that hold a tuner layer."""
    modules = model.get_base_model().named_modules()
    return [path.rpartition(".")[0] for path, module in modules if isinstance(module, VPTLayer)]


def test_two_encoders_need_a_choice():
    model = Towers()
    before = fingerprint(model)
    with pytest.raises(EncoderError, match=r"'left', 'right'.*backbone="):
        find_encoder(model)
    with pytest.raises(EncoderError, match=r"'left', 'right'.*backbone="):
        get_peft_model(model, VPTConfig())
    assert_untouched(model, before)


@pytest.mark.parametrize("chosen, other", [("left", "right"), ("right", "left")])
def test_chosen_encoder_gets_the_prompts(chosen: str, other: str):
    torch.manual_seed(0)
    model, pixels = Towers().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = dict(zip(("left", "right"), model(pixels).chunk(2, dim=-1), strict=True))
        prompted = get_peft_model(model, VPTConfig(backbone=chosen)).eval()
        after = dict(zip(("left", "right"), prompted(pixels).chunk(2, dim=-1), strict=True))
    torch.testing.assert_close(after[other], before[other], rtol=1e-5, atol=1e-5)
    assert (after[chosen] - before[chosen]).abs().max() > 1e-3
    assert all(block.startswith(f"{chosen}.") for block in prompted_blocks(prompted))


REFUSED_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "text": (text, "BertModel has no vision encoder.*pixel_values"),
    "no model": (lambda: nn.Linear(3, 3), "Linear has no vision encoder"),
    "convolutions": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
        "ResNetModel.* no softmax attention",
    ),
    "reduced": (lambda: build("segformer", dtype=torch.float32), "spatially reduced keys and values"),
    "meta": (lambda: vit().to("meta"), "meta device"),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_model_without_an_encoder_is_refused(name: str):
    make, message = REFUSED_MODELS[name]
    model = make()
    if name != "meta":
        before = fingerprint(model)
    with pytest.raises(EncoderError, match=message):
        find_encoder(model)
    with pytest.raises(EncoderError, match=message):
        get_peft_model(model, VPTConfig())
    if name != "meta":
        assert_untouched(model, before)


@pytest.mark.parametrize("backbone", ["vision", "vision_model.encoder.layers.9", "Vision_Model"])
def test_wrong_backbone_path(backbone: str):
    with pytest.raises(EncoderError, match=rf"backbone='{backbone}' is not a module of CLIPModel.*'vision_model'"):
        find_encoder(clip(), backbone)


def test_backbone_that_is_no_vision_encoder():
    with pytest.raises(EncoderError, match="could not be run"):
        find_encoder(clip(), "text_model")


# (architecture, number of special tokens in front, final norm over all tokens, patch embedding)
LAYOUTS = [
    ("vit", 1, "layernorm", "embeddings.patch_embeddings.projection"),
    ("deit", 2, "layernorm", "embeddings.patch_embeddings.projection"),
    ("dinov2_with_registers", 3, "layernorm", "embeddings.patch_embeddings.projection"),
    ("clip_vision_model", 1, None, "embeddings.patch_embedding"),
    ("siglip_vision_model", 0, "post_layernorm", "embeddings.patch_embedding"),
    ("yolos", 1, "layernorm", "embeddings.patch_embeddings.projection"),
    ("llama4_vision_model", 0, "layernorm_post", None),
    ("pixio", 2, "layernorm", "embeddings.patch_embeddings.projection"),
    ("swin", 0, "layernorm", "embeddings.patch_embeddings.projection"),
    ("beit", 1, None, "embeddings.patch_embeddings.projection"),
]


@pytest.mark.parametrize("name, prefix, final_norm, patch_embedding", LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_token_layout(name: str, prefix: int, final_norm: str | None, patch_embedding: str | None):
    require_installed(name)
    with computing_in_float64(name):
        spec = find_encoder(build(name))
    assert spec.num_prefix_tokens == prefix
    assert spec.final_norm == final_norm
    assert spec.patch_embedding == patch_embedding
    assert spec.image_size == (32, 32)
    grid = 256 if name == "swin" else 16
    assert spec.blocks[0].tokens == grid + len(spec.special)


def test_stages_of_a_hierarchy():
    spec = find_encoder(SwinModel(swin_config()))
    assert [block.width for block in spec.blocks] == [16, 32, 64, 64, 128]
    assert [block.tokens for block in spec.blocks] == [1024, 256, 64, 64, 16]
    assert [index for index, _ in spec.merges] == [1, 2, 4]
    assert all(block.windowed and not block.takes_tokens for block in spec.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "swin", "blip_vision_model", "dinov3_vit"])
def test_low_precision_finds_the_same(name: str, dtype: torch.dtype):
    exact = find_encoder(build(name))
    spec = find_encoder(build(name, dtype=torch.float32).to(dtype))
    assert [b.path for b in spec.blocks] == [b.path for b in exact.blocks]
    for block, expected in zip(spec.blocks, exact.blocks, strict=True):
        assert block.attention.key is not None and expected.attention.key is not None
        assert block.attention.key.path == expected.attention.key.path
        assert block.attention.value == expected.attention.value
        assert block.attention.norm == expected.attention.norm
    assert spec.special == exact.special


def test_projections_are_found_through_lora():
    model = get_peft_model(
        vit(), LoraConfig(target_modules=["k_proj", "v_proj", "key", "value"], init_lora_weights=False)
    )
    spec = find_encoder(model)
    key, value = spec.blocks[0].attention.key, spec.blocks[0].attention.value
    assert key is not None and value is not None
    # The wrapper, not the frozen layer inside it.
    assert "base_layer" not in key.path and "base_layer" not in value.path
    assert key.path.startswith("k") and value.path.startswith("v")


@pytest.mark.parametrize("name", SUPPORTED)
def test_looking_leaves_the_encoder_untouched(name: str):
    require_installed(name)
    model = build(name, dtype=torch.float32).train()
    next(model.children()).eval()
    before = fingerprint(model)
    find_encoder(model)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "model",
    [SwinModel(swin_config(hidden_dropout_prob=0.5)), ViTModel(ViTConfig(**SIZES, **IMAGE, hidden_dropout_prob=0.5))],
    ids=["swin", "vit"],
)
def test_dropout_does_not_hide_anything(model: nn.Module):
    assert find_encoder(model.train()) == find_encoder(model.eval())


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "swinv2"])
def test_self_check_draws_no_numbers(name: str):
    def prompts(self_check: bool) -> dict[str, torch.Tensor]:
        model = build(name)
        torch.manual_seed(5)
        peft_model = get_peft_model(model, VPTConfig(self_check=self_check))
        return {name: p.detach() for name, p in peft_model.named_parameters() if p.requires_grad}

    checked, unchecked = prompts(True), prompts(False)
    assert checked.keys() == unchecked.keys() and len(checked) > 0
    assert all(torch.equal(checked[name], unchecked[name]) for name in checked)


REFUSED_CONFIGS: dict[str, tuple[str, Callable[[], VPTConfig], type[Exception], str]] = {
    "block out of range": ("vit", lambda: VPTConfig(layers_to_transform=[1, 7]), ValueError, r"\[7\].*0 to 2"),
    "no class token": ("siglip_vision_model", lambda: VPTConfig(pooling="class"), EncoderError, "no class token"),
    "no final norm": ("beit", lambda: VPTConfig(pooling="image"), EncoderError, "no final norm"),
    "tokens in windows": ("swin", lambda: VPTConfig(implementation="token"), EncoderError, "windows"),
    "shallow in a grid": ("vitdet", lambda: VPTConfig(deep=False), EncoderError, "grid"),
    "flowing on as keys": (
        "vit",
        lambda: VPTConfig(deep=False, implementation="kv"),
        EncoderError,
        "implementation='auto'",
    ),
    "widths differ": ("swin", lambda: VPTConfig(share_prompts=True), EncoderError, "widths differ"),
    "too many gates": ("vit", lambda: GatedVPTConfig(num_gates=3), ValueError, "num_gates=3"),
    "no such backbone": ("vit", lambda: VPTConfig(backbone="tower"), EncoderError, "backbone='tower'"),
    "no patch convolution": (
        "llama4_vision_model",
        lambda: VPTConfig(prompt_location="pad"),
        EncoderError,
        "convolution",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_refused_config_leaves_the_model_untouched(name: str):
    architecture, make, error, message = REFUSED_CONFIGS[name]
    model = build(architecture, dtype=torch.float32).train()
    next(model.children()).eval()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        get_peft_model(model, make())
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "name", ["vit", "siglip2_vision_model", "swin", "blip_vision_model", "hiera", "timesformer", "eomt"]
)
def test_unloading_leaves_nothing_behind(name: str):
    require_installed(name)
    model = build(name, dtype=torch.float32).requires_grad_(False)
    before = fingerprint(model)
    peft_model = get_peft_model(model, VPTConfig(num_virtual_tokens=2, modules_to_save=[]))
    assert fingerprint(model)["hooks"] != before["hooks"]
    restored = peft_model.unload()
    assert restored is model
    torch.set_rng_state(before["random"]["cpu"])
    assert_untouched(model, before)


def test_other_threads_do_not_notice_a_trace():
    """Attention functions are looked up for all models in one place; a trace replaces the look-up for its thread."""
    other = build("siglip2_vision_model", dtype=torch.float32)
    inputs = inputs_of("siglip2_vision_model", torch.float32)
    model = build("vit", dtype=torch.float32)
    expected_spec = find_encoder(model)
    outputs: list[torch.Tensor] = []

    def run_others() -> None:
        with torch.no_grad():
            outputs.append(other(**inputs).last_hidden_state)
            outputs.append(model(torch.randn(1, 3, 64, 64), interpolate_pos_encoding=True).last_hidden_state)

    def run_in_thread(*args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run_others)
            thread.start()
            thread.join()

    run_others()
    handle = model.layers[1].register_forward_pre_hook(run_in_thread)
    assert find_encoder(model) == expected_spec
    handle.remove()
    assert len(outputs) > 2
    assert all(torch.equal(output, outputs[0]) for output in outputs[::2])


def test_two_traces_at_once():
    models = [build(name, dtype=torch.float32) for name in ("vit", "dinov2", "clip_vision_model", "beit")]
    expected = [find_encoder(model) for model in models]
    before = AttentionInterface.get_interface
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(find_encoder, models)) == expected
    assert AttentionInterface.get_interface is before


def test_global_seed_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """`torch.manual_seed` would seed every GPU, also those whose state nobody gives back."""
    model = build("vit", dtype=torch.float32)

    def fail(*args: Any) -> None:
        raise AssertionError("torch.manual_seed was called")

    monkeypatch.setattr(torch, "manual_seed", fail)
    assert find_encoder(model).special == (0,)
