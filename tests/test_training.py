"""Training: modes of frozen parts, dropout, precision, what leaves the blocks, and the Trainer."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_fixtures import (
    BLOCKS,
    CONFIGS,
    TOKENS,
    WIDTH,
    dinov2,
    gradients,
    images,
    logits,
    lora,
    randomize,
    trainable,
    vit,
)
from safetensors.torch import load_file
from torch import nn
from transformers import BeitBackbone, BeitConfig, Dinov2Backbone, Dinov2Config, Trainer, TrainingArguments

from vpt_peft import attention_maps


NOISY = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}


def attach(name: str, model: nn.Module | None = None, **given: Any) -> PeftModel:
    attached = get_peft_model(vit() if model is None else model, CONFIGS[name](**given))
    return randomize(attached, 1, trainable_only=True).eval()  # type: ignore[return-value]


class TokenNorm(nn.BatchNorm1d):
    """Batch statistics over `(batch, tokens, width)`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_parts_stay_in_eval(name: str):
    """Dropout and attention dropout of the backbone are off: training outputs are those of eval mode."""
    model, x = attach(name, vit(**NOISY)), images()
    expected = logits(model, x)
    model.train()
    assert model.training and torch.equal(logits(model, x), expected)
    encoder = model.base_model.model.vit
    kinds = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Conv2d)
    frozen = [m for path, m in encoder.named_modules() if isinstance(m, kinds) and "prompt_tuner" not in path]
    assert len(frozen) > 5 * BLOCKS and not any(module.training for module in frozen)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_drop_path_and_its_kin():
    model, x = attach("shallow", dinov2(drop_path_rate=0.9, hidden_dropout_prob=0.4)), images()
    expected = logits(model, x)
    assert torch.equal(logits(model.train(), x), expected)


def test_batch_statistics_stay():
    base = vit()
    base.vit.embeddings.dropout = TokenNorm(WIDTH).double().eval()
    model = attach("deep", base).train()
    gradients(model, 5 + images())
    norm = base.vit.embeddings.dropout
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0


def test_frozen_parts_outside_the_encoder_stay_too():
    """A head that is not trained is frozen like the rest."""
    base = vit()
    base.classifier = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), base.classifier).double().eval()
    model = attach("deep", base, modules_to_save=[])
    expected = logits(model, images())
    assert torch.equal(logits(model.train(), images()), expected)
    assert not base.classifier[0].running_mean.any()


def test_trained_head_and_lora_keep_their_dropout():
    base = vit()
    base.classifier = nn.Sequential(nn.Dropout(0.5), base.classifier)
    model, x = attach("deep", base).train(), images()
    assert not torch.equal(logits(model, x), logits(model, x))
    assert torch.equal(logits(model.eval(), x), logits(model, x))
    injected = vit(**NOISY)
    injected.add_adapter(lora(lora_dropout=0.5), "l")
    injected.add_adapter(CONFIGS["deep"](modules_to_save=[]), "p")
    injected.set_adapter(["l", "p"])
    injected.train()
    assert not torch.equal(logits(injected, x), logits(injected, x))
    quiet = vit(**NOISY)
    quiet.add_adapter(lora(lora_dropout=0.0), "l")
    quiet.add_adapter(CONFIGS["deep"](modules_to_save=[]), "p")
    quiet.set_adapter(["l", "p"])
    assert torch.equal(logits(quiet.train(), x), logits(quiet, x))


def test_base_in_eval_can_be_switched_off():
    model, x = attach("deep", vit(**NOISY), base_in_eval=False).train(), images()
    assert all(module.training for module in model.modules())
    assert not torch.equal(logits(model, x), logits(model, x))


def test_modes_of_an_injected_adapter():
    """transformers' `model.train()` passes no tuner; the encoder puts itself in eval when it runs."""
    model, x = vit(**NOISY), images()
    model.add_adapter(CONFIGS["deep"](), "a")
    expected = logits(model.eval(), x)
    assert torch.equal(logits(model.train(), x), expected)
    model.disable_adapters()
    model.train()
    assert not torch.equal(logits(model, x), logits(model, x))


@pytest.mark.parametrize("name", CONFIGS)
def test_prompt_dropout_is_drawn_per_image(name: str):
    """Two copies of an image in a batch see different prompts, in training only."""
    try:
        model = attach(name, prompt_dropout=0.5)
    except ValueError as error:
        assert name in ("channel",) and "prompt_dropout" in str(error)
        return
    x = images(1).expand(4, -1, -1, -1)
    settled = logits(model, x)
    assert all(torch.allclose(settled[0], row, rtol=0, atol=1e-12) for row in settled)
    torch.manual_seed(0)
    drawn = logits(model.train(), x)
    distances = [(drawn[i] - drawn[j]).abs().max() for i in range(4) for j in range(i)]
    assert min(distances) > 1e-3
    torch.manual_seed(0)
    assert torch.equal(logits(model, x), drawn)
    assert not torch.equal(logits(model, x), drawn)


def test_prompt_dropout_scales():
    """What is kept is scaled by 1 / (1 - rate), so the mean over draws is the prompt itself."""
    model = attach("shallow", prompt_dropout=0.25).train()
    store = model.base_model.model.prompt_tuner
    torch.manual_seed(0)
    drawn = store.adapter("default").prompts("0", 4000)
    stored = store.vpt_prompts["default"]["0"]
    kept = drawn != 0
    assert torch.allclose(drawn, torch.where(kept, stored / 0.75, 0.0))
    assert abs(kept.double().mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / drawn.numel())


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_never_show_prompts(name: str):
    """`hidden_states` are as many and as long as without prompts; the first is what the embeddings gave."""
    base = vit()
    plain = base(pixel_values=images(), output_hidden_states=True).hidden_states
    model = attach(name, base)
    for active in (False, True, False):
        model.train(active)
        output = model(pixel_values=images(), output_hidden_states=True)
        assert [tuple(h.shape) for h in output.hidden_states] == [(2, TOKENS, WIDTH)] * (BLOCKS + 1)
        if name not in ("added", "channel", "project_patches"):
            assert torch.equal(output.hidden_states[0], plain[0])
        assert not torch.allclose(output.hidden_states[-1], plain[-1])
        # With nobody looking the last block makes the class token alone, in other sums
        assert torch.allclose(output.logits, model(pixel_values=images()).logits, rtol=0, atol=1e-12)
    with model.disable_adapter():
        found = model(pixel_values=images(), output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_hidden_states_are_the_same_in_both_modes():
    tokens, keys = attach("deep_tokens"), attach("deep")
    found = [m(pixel_values=images(), output_hidden_states=True).hidden_states for m in (tokens, keys)]
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, extra", [("deep", 4), ("deep_tokens", 4), ("shallow", 3), ("gated", 3)])
def test_attention_maps(name: str, extra: int):
    """Maps are as without prompts; those with prompts have a column for each, and rows that sum to one."""
    model = attach(name, vit(attn_implementation="eager"))
    shown = model(pixel_values=images(), output_attentions=True).attentions
    found = attention_maps(model, images())
    assert len(shown) == len(found) == BLOCKS
    for square, (maps, columns) in zip(shown, found, strict=True):
        assert columns[: extra + 2] == ["class", *(f"prompt_{index}" for index in range(extra)), "patch_0"]
        assert maps.shape[-2:] == (TOKENS, TOKENS + extra) and square.shape[-2:] == (TOKENS, TOKENS)
        assert torch.allclose(maps.sum(-1), torch.ones_like(maps[..., 0]))
        assert torch.allclose(square, torch.cat([maps[..., :1], maps[..., 1 + extra :]], dim=-1), rtol=0, atol=1e-12)


def backbone(cls: type, **given: Any) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "image_size": 32}
    config_cls = BeitConfig if cls is BeitBackbone else Dinov2Config
    config = config_cls(**sizes, patch_size=8, out_features=["stem", "stage1", "stage3"], **given)
    return randomize(cls(config), 0).double().eval()


@pytest.mark.parametrize("name", ["deep", "deep_tokens", "shallow", "gated"])
@pytest.mark.parametrize(
    "cls, given",
    [
        (Dinov2Backbone, {}),
        (Dinov2Backbone, {"reshape_hidden_states": False}),
        (BeitBackbone, {"use_relative_position_bias": True}),
    ],
)
def test_feature_maps(cls: type, given: dict[str, Any], name: str):
    """Feature maps have the shapes they have without prompts, and the stem is untouched."""
    base = backbone(cls, **given)
    plain = base(images()).feature_maps
    model = attach(name, base)
    found = model.base_model.model(images()).feature_maps
    assert [f.shape for f in found] == [p.shape for p in plain]
    assert torch.equal(found[0], plain[0]) and not torch.allclose(found[-1], plain[-1])
    if name == "deep_tokens":
        keys = attach("deep", backbone(cls, **given)).base_model.model(images()).feature_maps
        assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(found, keys, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(name: str):
    """float32 weights under bfloat16 autocast: float32 gradients that point the same way."""
    model, x = attach(name, vit(torch.float32)), images(dtype=torch.float32)
    exact = gradients(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, x)
    assert set(found) == set(exact)
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
        cosine = nn.functional.cosine_similarity(gradient.flatten(), exact[key].flatten(), dim=0)
        assert cosine > 0.95, key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(name: str, dtype: torch.dtype):
    model = attach(name, vit(dtype)).train()
    found = gradients(model, images(dtype=dtype))
    assert set(found) == set(trainable(model))
    assert all(g.isfinite().all() for g in found.values())
    assert {g.dtype for n, g in found.items() if "prompt_tuner" in n} == {torch.float32}


def test_a_failed_forward_leaves_no_trace():
    """An image of the wrong size fails in the middle of the model; the next one is as if nothing had been."""
    for name in ("shallow", "gated", "deep"):
        model = attach(name)
        expected = gradients(model, images())
        handle = model.base_model.model.vit.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(pixel_values=images(3))
        handle.remove()
        found = gradients(model, images())
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class Images(torch.utils.data.Dataset):
    """Random images with labels, from `input`-independent seeds."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": images(1, torch.float32, seed=index)[0], "labels": index % 5}


def trainer(folder: Path, name: str, **given: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.1, max_steps=4, save_steps=2,
        save_strategy="steps", eval_strategy="steps", eval_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
        seed=3, remove_unused_columns=False, label_names=["labels"], **given,
    )  # fmt: skip
    model = attach(name, vit(torch.float32), prompt_dropout=0.0)
    return Trainer(model=model, args=arguments, train_dataset=Images(), eval_dataset=Images())


@pytest.mark.parametrize("name", ["deep", "gated"])
def test_trainer_saves_resumes_and_finds_the_best(name: str, tmp_path: Path):
    whole = trainer(tmp_path / "whole", name, load_best_model_at_end=True, metric_for_best_model="loss")
    before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    moved = {n for n, p in whole.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable(whole.model))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in checkpoint.iterdir()}
    assert not (checkpoint / "model.safetensors").exists()
    last = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")

    kept = shutil.copytree(str(whole.state.best_model_checkpoint), tmp_path / "best")

    resumed = trainer(tmp_path / "whole", name)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    again = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert list(again) == list(last)
    for key, value in last.items():
        assert torch.allclose(again[key], value, rtol=0, atol=1e-6), key

    x = images(dtype=torch.float32)
    best = PeftModel.from_pretrained(vit(torch.float32), kept).eval()
    assert torch.equal(logits(best, x), logits(whole.model.eval(), x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_checkpointing(use_reentrant: bool, tmp_path: Path):
    losses = []
    for given in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
    ):
        run = trainer(tmp_path / str(len(given)), "deep", **given)
        run.train()
        losses.append([entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
