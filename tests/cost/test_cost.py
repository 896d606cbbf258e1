"""Estimates against what PEFT saves, what torch counts and what the allocator hands out."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_fixtures import VIT, hook_count, own_attributes, run_python, vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, SwinConfig, ViTConfig, ViTForImageClassification

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.cli import cost as cost_command
from vpt_peft.cost import CostEstimate, estimate_cost, estimate_costs, largest_batch
from vpt_peft.cost.meta_model import safetensors_bytes
from vpt_peft.methods import METHODS
from vpt_peft.training.checkpoints import save_trained
from vpt_peft.training.model import BaselineSpec, build_baseline


LIMIT = 10**9
BASELINES = [name for name in METHODS if name not in ("vpt", "vpt_shallow", "vpt+bias", "gated_vpt", "lora")]
CONFIGS: dict[str, Any] = {
    "deep": lambda: VPTConfig(num_virtual_tokens=6),
    "tokens": lambda: VPTConfig(num_virtual_tokens=6, implementation="token"),
    "shallow": lambda: VPTConfig(num_virtual_tokens=6, deep=False),
    "projected": lambda: VPTConfig(num_virtual_tokens=6, projection_dim=8, bias="all"),
    "dropout": lambda: VPTConfig(num_virtual_tokens=6, prompt_dropout=0.1),
    "pixels": lambda: VPTConfig(num_virtual_tokens=2, prompt_location="pad"),
    "gated": lambda: GatedVPTConfig(num_virtual_tokens=6, pooling="image_prompt"),
    "elementwise": lambda: GatedVPTConfig(num_virtual_tokens=6, gate="elementwise"),
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
}


def small_vit(**given: Any) -> ViTForImageClassification:
    """Wide and long enough for activations to outweigh everything else: 4 blocks of width 96, 65 tokens."""
    settings: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3,
                                "intermediate_size": 384, "image_size": 64, "patch_size": 8, "num_labels": 5}  # fmt: skip
    return ViTForImageClassification(ViTConfig(**{**settings, **given}))


def step(model: nn.Module, pixels: torch.Tensor) -> None:
    model.train()
    model(pixel_values=pixels).logits.float().mean().backward()
    model.zero_grad(set_to_none=True)


def measured_peak(model: nn.Module, pixels: torch.Tensor) -> int:
    """Most bytes a warm training step holds beyond what was there before, by torch's profiler."""
    step(model, pixels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, pixels)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def saved_bytes(model: nn.Module, pixels: torch.Tensor) -> int:
    """Bytes autograd keeps for the backward pass, parameters left out."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(pixel_values=pixels).logits.mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(sizes.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_bytes_of_peft_adapters(name: str, tmp_path: Path) -> None:
    model = vit(torch.float32)
    found = estimate_cost(model, CONFIGS[name](), batch_size=2, memory_limit=LIMIT)
    real = get_peft_model(model, CONFIGS[name]())
    real.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert found.trainable_values == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.total_values == sum(p.numel() for p in real.parameters())
    assert found.disk_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("method", BASELINES)
def test_values_and_bytes_of_baselines(method: str, tmp_path: Path) -> None:
    model = vit(torch.float32)
    found = estimate_cost(model, method, batch_size=2, memory_limit=LIMIT, mlp_layers=2, adapter_reduction=4)
    real = build_baseline(model, BaselineSpec(method, "vit", None, 1, 2, 4))
    save_trained(real, tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    assert found.trainable_values == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert abs(found.disk_bytes - weights.stat().st_size) < 1000


def test_size_of_a_file() -> None:
    tensors = {"b": torch.zeros(3, 5), "a": torch.zeros(7, dtype=torch.float64), "é": torch.zeros(2).bfloat16()}
    from safetensors.torch import save

    assert safetensors_bytes(tensors) == len(save(tensors, metadata={"format": "pt"}))


@pytest.mark.parametrize("name", ["deep", "gated", "lora"])
def test_flops_are_those_torch_counts(name: str) -> None:
    # torch counts no attention kernel of CPUs, but the products of attention that is written out
    model = small_vit()
    fused = estimate_cost(model, CONFIGS[name](), batch_size=3, memory_limit=LIMIT)
    model.set_attn_implementation("eager")
    written_out = estimate_cost(model, CONFIGS[name](), batch_size=3, memory_limit=LIMIT)
    real = get_peft_model(model, CONFIGS[name]()).train()
    pixels = torch.randn(3, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        loss = real(pixel_values=pixels).logits.mean()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    total = forward + counter.get_total_flops()
    assert (written_out.forward_flops, written_out.step_flops) == (forward, total)
    assert fused.forward_flops == forward
    # The fused kernel computes the attention map again in the backward pass
    assert total <= fused.step_flops == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_of_a_step(name: str) -> None:
    model, pixels = small_vit(), torch.randn(4, 3, 64, 64)
    found = estimate_cost(model, CONFIGS[name](), batch_size=4, memory_limit=LIMIT)
    real = get_peft_model(model, CONFIGS[name]())
    assert found.step_bytes == pytest.approx(measured_peak(real, pixels), rel=0.05)
    assert found.weight_bytes == sum(t.nbytes for t in (*real.parameters(), *real.buffers()))
    assert found.optimizer_bytes == 2 * sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert found.peak_bytes == found.weight_bytes + found.optimizer_bytes + pixels.nbytes + found.step_bytes


@pytest.mark.parametrize("method", BASELINES)
def test_memory_of_a_step_of_baselines(method: str) -> None:
    model, pixels = small_vit(hidden_dropout_prob=0.1), torch.randn(4, 3, 64, 64)
    found = estimate_cost(model, method, batch_size=4, memory_limit=LIMIT)
    real = build_baseline(model, BaselineSpec(method, "vit", None, 1, 3, 8))
    # Convolutions hold copies of their own in the backward pass
    assert found.step_bytes == pytest.approx(measured_peak(real, pixels), rel=0.2 if method == "sidetune" else 0.05)


@pytest.mark.parametrize("name", ["deep", "tokens", "gated"])
def test_memory_against_what_autograd_saves(name: str) -> None:
    model, pixels = small_vit(num_hidden_layers=8), torch.randn(4, 3, 64, 64)
    found = estimate_cost(model, CONFIGS[name](), batch_size=4, memory_limit=LIMIT)
    saved = saved_bytes(get_peft_model(model, CONFIGS[name]()), pixels)
    assert saved < found.step_bytes == pytest.approx(saved, rel=0.15)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_and_lower_precision() -> None:
    model, pixels = small_vit(), torch.randn(4, 3, 64, 64)
    config = replace(CONFIGS["deep"](), skip_unread=False)

    def estimate(**given: Any) -> CostEstimate:
        return estimate_cost(model, **{"method": config, "batch_size": 4, "memory_limit": LIMIT, **given})

    plain, again = estimate(), estimate(gradient_checkpointing=True)
    half, mixed = estimate(dtype="bfloat16"), estimate(autocast=torch.bfloat16)
    shorter, by_name = (
        estimate(method=replace(config, skip_unread=True)),
        estimate(method="vpt", num_virtual_tokens=6, skip_unread=True),
    )
    assert shorter.step_bytes == by_name.step_bytes
    real = get_peft_model(model, replace(config, skip_unread=True))
    assert shorter.step_bytes == pytest.approx(measured_peak(real, pixels), rel=0.05)
    model = real.unload()
    real = get_peft_model(copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(config))
    assert half.step_bytes == pytest.approx(measured_peak(real, pixels.bfloat16()), rel=0.05)
    assert half.dtype == "bfloat16" and half.weight_bytes < 0.52 * plain.weight_bytes
    assert half.step_bytes < mixed.step_bytes < plain.step_bytes and mixed.weight_bytes == plain.weight_bytes
    real = get_peft_model(model, copy.deepcopy(config))
    real.get_base_model().gradient_checkpointing_enable()
    assert again.step_bytes == pytest.approx(measured_peak(real, pixels), rel=0.15)
    assert again.step_bytes < 0.6 * plain.step_bytes and shorter.step_bytes < 0.8 * plain.step_bytes
    assert again.step_flops > 1.2 * plain.step_flops


@pytest.mark.parametrize("method", ["vpt", "linear", "full"])
def test_largest_batch_is_the_largest(method: str) -> None:
    limit = 60_000_000
    found = estimate_cost(small_vit(), method, batch_size=4, memory_limit=limit, headroom=0.1)
    at = [
        estimate_cost(small_vit(), method, batch_size=found.largest_batch_size + more, memory_limit=limit).peak_bytes
        for more in (0, 1)
    ]
    assert found.largest_batch_size > 4
    assert at[0] <= 0.9 * limit < at[1]


@pytest.mark.parametrize(("room", "expected"), [(0, 0), (-5, 0), (149, 0), (150, 1), (1000, 18), (10**6, 19998)])
@pytest.mark.parametrize("known", [1, 8, 40])
def test_largest_batch_of_a_line(room: int, expected: int, known: int) -> None:
    def peak(images: int) -> int:
        return 100 + 50 * images

    assert largest_batch(peak, room, (known, peak(known))) == expected


def test_the_model_stays_as_it_is() -> None:
    model = vit(torch.float32)
    model.classifier.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    attributes, hooks, state = own_attributes(model), hook_count(model), torch.get_rng_state()
    estimate_costs(model, ["vpt", "lora", "adapter", "full"], batch_size=2, memory_limit=LIMIT)
    estimate_cost(ViTConfig(**VIT), "linear", batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert own_attributes(model) == attributes and hook_count(model) == hooks and not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_what_is_given_may_be_model_config_or_name() -> None:
    prompted = get_peft_model(vit(torch.float32), CONFIGS["deep"]())
    as_it_is = estimate_cost(prompted, None, batch_size=2, memory_limit=LIMIT)
    by_config = estimate_cost(ViTConfig(**VIT), "vpt", batch_size=2, memory_limit=LIMIT, num_virtual_tokens=6)
    assert as_it_is.method == "as it is"
    for name in ("trainable_values", "disk_bytes", "step_flops", "step_bytes", "weight_bytes"):
        assert getattr(as_it_is, name) == getattr(by_config, name)
    with pytest.raises(ValueError, match="pass method=None"):
        estimate_cost(prompted, "vpt")


def test_windows_and_vision_towers() -> None:
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    swin = estimate_cost(config, "vpt", batch_size=2, memory_limit=LIMIT, num_virtual_tokens=3, num_labels=4)
    assert swin.trainable_values == 3 * (2 * 16 + 2 * 32) + 4 * 33
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**layers, "vocab_size": 50}, vision_config={**layers, "image_size": 32, "patch_size": 8}
        )
    )
    tower = estimate_cost(clip, "vpt", batch_size=2, memory_limit=LIMIT, num_virtual_tokens=3)
    assert tower.trainable_values == 2 * 3 * 32
    assert tower.step_flops > 1.5 * tower.forward_flops > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "vtp"}, "method='vtp' is unknown; choose one of vpt"),
        ({"method": 3}, "method=3 must be a name or a PEFT configuration"),
        ({"batch_size": 0}, "batch_size=0 must be an integer from 1"),
        ({"dtype": "int8"}, "dtype='int8' is not a floating-point type"),
        ({"autocast": "half-ish"}, "autocast='half-ish' is not a floating-point type"),
        ({"optimizer": "lion"}, "optimizer='lion' is unknown"),
        ({"num_labels": 0}, "num_labels=0 must be at least 1"),
        ({"device": "tpuu"}, "device='tpuu' cannot be used here"),
        ({"memory_limit": -5}, "memory_limit=-5 must be a positive number"),
        ({"memory_limit": 0}, "memory_limit=0 must be a positive number"),
        ({"headroom": 1.0}, "headroom=1.0 must be a share"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be an integer of at least 1"),
        ({"method": "partial", "partial_blocks": 9}, "partial_blocks=9 but the encoder has 3 blocks"),
        ({"method": VPTConfig(layers_to_transform=[7])}, r"the encoder has 3 blocks"),
    ],
)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_cost(vit(torch.float32), **{"memory_limit": LIMIT, **given})


def test_a_last_block_that_is_read_in_full_is_refused() -> None:
    with pytest.raises(ValueError, match="skip_unread=True does not fit ViTModel: it has no head"):
        estimate_cost(vit(torch.float32).vit, "vpt", memory_limit=LIMIT, skip_unread=True)


def test_a_limit_below_the_weights_fits_nothing() -> None:
    assert estimate_cost(vit(torch.float32), "linear", memory_limit=1000).largest_batch_size == 0


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table = str(tmp_path / "vit"), tmp_path / "costs.json"
    ViTConfig(**VIT).save_pretrained(folder)
    flags = ["--model_name_or_path", folder, "--method", "vpt", "linear", "--memory_limit_gb", "0.1"]
    assert cost_command.run([*flags, "--num_labels", "7", "--output_file", str(table)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(table.read_text())
    assert [line.split("|")[1].strip(" :-") for line in lines[:4]] == ["method", "", "vpt", "linear"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert [row["trainable_values"] for row in rows] == [3 * 10 * 32 + 7 * 33, 7 * 33]
    assert f"{rows[0]['trainable_values']:,}" in lines[2] and f"{rows[0]['largest_batch_size']:,}" in lines[2]
    assert "fits 100.0 MB with room" in lines[-1]
    cost_command.run([*flags, "--format", "json"])
    assert set(json.loads(capsys.readouterr().out)[0]) == {*CostEstimate.__dataclass_fields__, "peak_bytes"}


@pytest.mark.parametrize("limit", ["-3", "0", "inf", "nan"])
def test_command_refuses_limits_that_are_none(limit: str) -> None:
    with pytest.raises(ValueError, match=f"--memory_limit_gb {limit} must be a positive number"):
        cost_command.run(["--method", "vpt", "--memory_limit_gb", limit])


def test_quantised_weights_are_refused() -> None:
    model = vit(torch.float32)
    model.vit.layers[0].mlp.fc1.register_buffer("qweight", torch.zeros(64, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="vit.layers.0.mlp.fc1 has quantised weights.*pass the model's configuration"):
        estimate_cost(model, "vpt", memory_limit=LIMIT)


# glibc's malloc keeps freed blocks in fragments unless it is told to map each of them.
RESIDENT = """
import gc, json, sys
import torch
from transformers import ViTConfig, ViTForImageClassification
from vpt_peft.cost import estimate_cost
from peft import get_peft_model
from vpt_peft import VPTConfig

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def train(model, steps, images):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    pixels = torch.randn(images, 3, 128, 128)
    for _ in range(steps):
        model(pixel_values=pixels).logits.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

def build(method, **given):
    size = dict(hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=128, num_hidden_layers=6)
    model = ViTForImageClassification(ViTConfig(**{**size, **given}))
    return get_peft_model(model, VPTConfig(num_virtual_tokens=20)).train() if method == "vpt" else model.train()

method = sys.argv[1]
train(build(method, num_hidden_layers=1), 1, 1)
gc.collect()
before = resident("VmRSS")
model = build(method)
open("/proc/self/clear_refs", "w").write("5")
train(model, 2, 24)
measured = resident("VmHWM") - before
config = ViTConfig(**model.config.to_dict())
print(json.dumps([estimate_cost(config, method, batch_size=24, num_virtual_tokens=20).peak_bytes, measured]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the peak by way of /proc")
@pytest.mark.parametrize("method", ["vpt", "full"])
def test_memory_of_a_process(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most a process of its own has resident while it trains, against the estimate, moments included."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    estimated, measured = json.loads(run_python(RESIDENT, method).stdout.splitlines()[-1])
    assert estimated == pytest.approx(measured, rel=0.15)


def test_command_with_a_number_for_each_block_rank_and_biases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ViTConfig(**VIT).save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--method", "vpt", "--format", "json"]
    trained = []
    for more in (["2"], ["2", "5", "1"], ["2", "--prompt_rank", "1"], ["2", "--bias", "value", "mlp"]):
        assert cost_command.run([*flags, "--num_virtual_tokens", *more]) == 0
        trained.append(json.loads(capsys.readouterr().out)[0]["trainable_values"])
    assert [number - trained[0] for number in trained[1:]] == [2 * 32, 3 * (2 + 32 - 2 * 32), 3 * 2 * 32]
