"""Prompts follow their block's device: offloaded and dispatched models, loading without memory, blocks nobody reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from small_models import images, randomize, tiny_vit
from torch import distributed, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTForImageClassification,
)

from vpt_peft import EncoderError, GatedVPTConfig, VPTConfig


KINDS: dict[str, Callable[[], VPTConfig]] = {
    "deep": lambda: VPTConfig(num_virtual_tokens=3),
    "token": lambda: VPTConfig(num_virtual_tokens=3, implementation="token"),
    "shallow": lambda: VPTConfig(num_virtual_tokens=3, deep=False),
    "gated": lambda: GatedVPTConfig(num_virtual_tokens=3, gate_init=0.0),
    "pooled": lambda: VPTConfig(num_virtual_tokens=3, pooling="image_prompt"),
    "projection_dim": lambda: VPTConfig(num_virtual_tokens=3, projection_dim=8),
    "shared": lambda: VPTConfig(num_virtual_tokens=3, share_prompts=True),
    "prepend_pixel": lambda: VPTConfig(num_virtual_tokens=2, prompt_location="prepend_pixel"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
ON_DISK = {
    "vit.embeddings": "cpu", "vit.layers.0": "cpu", "vit.layers.1": "disk", "vit.layers.2": "disk",
    "vit.layernorm": "cpu", "classifier": "cpu",
}  # fmt: skip


def attach(kind: str, base: nn.Module | None = None) -> PeftModel:
    base = tiny_vit(initializer_range=0.2) if base is None else base
    return randomize(get_peft_model(base, KINDS[kind]())).eval()  # type: ignore[return-value]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=images()).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-12)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pixel_values=images()).logits.sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.device.type == "meta"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_vit(initializer_range=0.2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def offloaded(saved: Path) -> nn.Module:
    """The saved classifier, two of its blocks on the disk."""
    model = ViTForImageClassification.from_pretrained(
        saved, device_map=ON_DISK, offload_folder=saved.parent / "offload", dtype=torch.float64
    )
    assert {name.split(".")[2] for name in on_meta(model)} == {"1", "2"}
    return model.eval()


@each_kind
def test_cpu_offload(kind: str):
    """No value stays where the modules are; each is brought when its module runs."""
    model = attach(kind)
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any("prompt" in name for name in on_meta(model))
    assert close(logits(model), expected)
    assert close(logits(model), expected)


@each_kind
def test_disk_offload(kind: str, tmp_path: Path):
    model = attach(kind)
    expected = logits(model)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert any("prompt" in name for name in on_meta(model))
    assert close(logits(model), expected)


@each_kind
def test_dispatched_with_blocks_on_the_disk(kind: str, tmp_path: Path):
    model = attach(kind)
    expected = logits(model)
    parts = {f"base_model.model.{name}": device for name, device in ON_DISK.items()}
    parts["base_model.model.prompt_tuner"] = "cpu"
    known = dict(model.named_modules())
    parts = {name: device for name, device in parts.items() if name in known}
    covered = tuple(parts)
    parts.update({n: "cpu" for n, _ in model.named_parameters() if not n.startswith(covered)})
    dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any("layers.1." in name for name in on_meta(model))
    assert close(logits(model), expected)


@each_kind
def test_attached_to_a_model_with_blocks_on_the_disk(kind: str, saved: Path):
    """Refused before anything is changed, or right: real prompts on the device their block runs on, which train."""
    base = offloaded(saved)
    before = logits(base)
    try:
        model = attach(kind, base)
    except EncoderError as error:
        assert "meta device" in str(error) and "load" in str(error)
        assert torch.equal(logits(base), before) and not any("prompt" in name for name, _ in base.named_modules())
        return
    expected = attach(kind, tiny_vit(initializer_range=0.2))
    assert not any("prompt" in name or "modules_to_save" in name for name in on_meta(model))
    assert close(logits(model), logits(expected))
    found, wanted = gradients(model), gradients(expected)
    assert set(found) == set(wanted) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-12), name


@each_kind
def test_low_cpu_mem_usage(kind: str, tmp_path: Path):
    """Prompts are made on the meta device and then loaded; none stays there, also of a second adapter."""
    expected = attach(kind)
    expected.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_vit(initializer_range=0.2), tmp_path, low_cpu_mem_usage=True).eval()
    assert on_meta(model) == set()
    assert close(logits(model), logits(expected))
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert on_meta(model) == set()
    assert close(logits(model), logits(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: one block is put there")
@pytest.mark.parametrize("kind", ["deep", "token", "shallow", "gated"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prompts_stand_on_the_device_of_their_block(kind: str, implementation: str):
    def build() -> ViTForImageClassification:
        return tiny_vit(initializer_range=0.2, attn_implementation=implementation)

    expected = attach(kind, build())
    places = dict.fromkeys(ON_DISK, "cuda:0") | {"vit.layers.1": "cpu"}
    base = dispatch_model(build(), places, main_device="cuda:0")
    model = attach(kind, base)
    own = {n: p.device.type for n, p in model.named_parameters() if "_prompts.default." in n}
    for name, device in own.items():
        assert device == ("cpu" if "_prompts.default.1" in name else "cuda"), name
    assert (logits(model).cpu() - logits(expected)).abs().max() < 1e-6
    found, wanted = gradients(model), gradients(expected)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name].cpu(), gradient, rtol=0, atol=1e-6), name


def llava(vision_feature_layer: int | list[int]) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """A model of three vision blocks that reads the hidden states of some layers, and a batch for it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
        "initializer_range": 0.2,
    }  # fmt: skip
    text = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8), text_config=text, image_token_id=98,
        vision_feature_layer=vision_feature_layer, image_seq_length=16,
    )  # fmt: skip
    ids = torch.tensor([[1, *[98] * 16, 5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images(1), "labels": ids}
    return LlavaForConditionalGeneration(config).double(), batch


READ = [(-1, 3), (-2, 2), (-3, 1), ([-3, -2], 2)]


@pytest.mark.parametrize(("layer", "blocks"), READ)
@pytest.mark.parametrize("kind", ["deep", "token"])
def test_blocks_nobody_reads_get_no_prompts(kind: str, layer: int | list[int], blocks: int):
    """Every parameter that trains has a gradient, and each block that is read has prompts."""
    base, batch = llava(layer)
    model = get_peft_model(base, KINDS[kind]()).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trained if "_prompts." in name]) == blocks
    model(**batch).loss.backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("layer", [-2, [-3, -2]], ids=str)
@pytest.mark.parametrize("kind", ["deep", "shallow", "gated"])
def test_ddp_runs_where_a_block_is_not_read(kind: str, layer: int | list[int], tmp_path: Path):
    """`DistributedDataParallel` stops at the second step where a parameter had no gradient in the first."""
    base, batch = llava(layer)
    model = get_peft_model(base, KINDS[kind]()).train()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = parallel(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        distributed.destroy_process_group()
    assert losses[0] != losses[1]


def test_saved_prompts_of_blocks_that_are_read(tmp_path: Path):
    base, batch = llava(-2)
    model = randomize(get_peft_model(base, KINDS["deep"]()))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        loaded = PeftModel.from_pretrained(llava(-2)[0], tmp_path)
    assert not [str(each.message) for each in caught if "missing" in str(each.message).lower()]
    assert get_peft_model_state_dict(loaded).keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(get_peft_model_state_dict(loaded)) == 2
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
