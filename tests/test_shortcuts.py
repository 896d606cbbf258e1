"""Work that is left out where nobody looks: the same results."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import draw
from peft import LoraConfig, PeftModel, get_peft_model
from peft_fixtures import CONFIGS, TOKENS, randomize, vit
from shortcut_fixtures import EXACT, READERS, Watch, images, largest_difference, prompted, results, the_store
from torch import nn
from transformers import (
    ViTForImageClassification,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.attention.extras import cool


# Their heads read prompts or patches
READ_MORE = ("pooled", "class_tokens")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_results(name: str, training: bool, monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS[name]()).train(training)
    store = the_store(model)
    assert store.spec.joins and store.spec.reads_special
    watch = Watch(model, monkeypatch)
    short = results(model)
    tokens_in_full = name == "deep_tokens" or name in READ_MORE
    assert (watch.tokens == [1]) != tokens_in_full
    insertions = watch.insertions
    store.spec = replace(store.spec, joins=False, reads_special=False)
    full = results(model)
    assert largest_difference(short, full) < EXACT
    assert insertions <= watch.insertions - insertions
    assert watch.tokens[1] >= TOKENS


@pytest.mark.parametrize("name", ["shallow", "gated", "class_tokens"])
def test_prompts_go_in_once(name: str, monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS[name]())
    watch = Watch(model, monkeypatch)
    model(images())
    # A block whose prompt outputs nobody reads takes prompts as keys and values
    assert watch.insertions == 1


def test_opt_out(monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), VPTConfig(num_virtual_tokens=4, skip_unread=False))
    watch = Watch(model, monkeypatch)
    model(images())
    assert watch.tokens == [TOKENS]


def test_no_self_check_leaves_nothing_out():
    store = the_store(prompted(vit(), VPTConfig(self_check=False)))
    assert not store.spec.joins and not store.spec.reads_special


def test_without_adapters_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    watch = Watch(model, monkeypatch)
    with model.disable_adapter():
        model(images())
    model(images())
    assert watch.tokens == [TOKENS, 1]


def test_backbone_in_training_mode_runs_in_full(monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), VPTConfig(num_virtual_tokens=4, base_in_eval=False)).train()
    watch = Watch(model, monkeypatch)
    model(images())
    assert watch.tokens == [TOKENS]


def test_mask_of_the_user(monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[:, -5:] = 0
    watch = Watch(model, monkeypatch)
    masked = model(images(), attention_mask=mask).logits
    store = the_store(model)
    store.spec = replace(store.spec, reads_special=False)
    assert torch.equal(model(images(), attention_mask=mask).logits, masked)
    assert watch.tokens == [TOKENS] * 2
    assert (model(images()).logits - masked).abs().max() > 1e-3


@pytest.mark.parametrize("second, alone", [("deep", True), ("shallow", True), ("pooled", False)])
def test_mixed_batches(second: str, alone: bool, monkeypatch: pytest.MonkeyPatch):
    model = get_peft_model(vit(), VPTConfig(num_virtual_tokens=7))
    model.add_adapter("second", CONFIGS[second]())
    model = randomize(model, seed=3).eval()
    store, names = the_store(model), ["default", "__base__", "second", "default"]
    watch = Watch(model, monkeypatch)
    short = model(pixel_values=images(4), adapter_names=names).logits
    assert (watch.tokens == [1]) == alone
    store.spec = replace(store.spec, reads_special=False)
    assert (model(pixel_values=images(4), adapter_names=names).logits - short).abs().max() < EXACT


@pytest.mark.parametrize("name", ["deep", "gated"])
def test_beside_lora(name: str, monkeypatch: pytest.MonkeyPatch):
    lora = get_peft_model(
        vit(), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], modules_to_save=["classifier"])
    )
    model = randomize(get_peft_model(lora, CONFIGS[name]()), seed=3, trainable_only=True)
    store = the_store(model)
    assert store.spec.reads_special
    watch = Watch(model, monkeypatch)
    short = results(model)
    assert watch.tokens == [1]
    store.spec = replace(store.spec, joins=False, reads_special=False)
    assert largest_difference(short, results(model)) < EXACT


def test_biases_of_the_backbone_train(monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), VPTConfig(num_virtual_tokens=4, bias="all"))
    watch = Watch(model, monkeypatch)
    short = results(model)
    assert watch.tokens == [1]
    store = the_store(model)
    store.spec = replace(store.spec, reads_special=False)
    assert largest_difference(short, results(model)) < EXACT


def test_failed_passes_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    model = get_peft_model(vit(), CONFIGS["shallow"]())
    # Takes other prompts in the block behind the one that fails
    own = VPTConfig(num_virtual_tokens=2, layers_to_transform=[1], propagate=False, implementation="token")
    model.add_adapter("own", own)
    model = randomize(model, seed=3).eval()
    base, batch = model.get_base_model(), images()
    model.set_adapter("own")
    expected = model(batch).logits
    model.set_adapter("default")
    attention = type(base.vit.layers[1].attention)
    forward = attention.forward

    def fails(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is base.vit.layers[1].attention:
            raise MemoryError
        return forward(module, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(attention, "forward", fails)
        with pytest.raises(MemoryError):
            model(batch)
    model.set_adapter("own")
    assert torch.equal(model(batch).logits, expected)
    # The caller's own tensor is not marked
    assert base.vit(batch).last_hidden_state.shape[1] == TOKENS


class ReadsPatchesInTraining(ViTForImageClassification):
    """A model of a user."""

    def forward(self, pixel_values: torch.Tensor, tokens: bool = False, **given: Any) -> Any:
        hidden = self.vit(pixel_values).last_hidden_state
        read = hidden.mean(1) if self.training else hidden[:, 0]
        return hidden if tokens else SemanticSegmenterOutput(logits=self.classifier(read))


def test_models_of_users_run_in_full():
    model = ReadsPatchesInTraining(vit().config).double()
    assert not the_store(get_peft_model(model, CONFIGS["deep"]())).spec.reads_special


@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_little_is_read_in_low_precision(dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch):
    """What the head reads is found out exactly, whatever the precision."""
    model = vit(dtype=dtype)
    forward = type(model.vit).forward

    @functools.wraps(forward)
    def blended(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        hidden = output.last_hidden_state
        mean = hidden[:, 1:].mean(1, keepdim=True) if hidden.shape[1] > 1 else 0.0
        output.last_hidden_state = torch.cat([hidden[:, :1] + share * mean, hidden[:, 1:]], dim=1) if share else hidden
        return output

    monkeypatch.setattr(type(model.vit), "forward", blended)
    assert the_store(get_peft_model(model, CONFIGS["deep"]())).spec.reads_special == (share == 0.0)


def test_temperatures_under_transforms():
    query, temperature = draw(4, 2, 5, 3, seed=2).double(), torch.tensor([0.7], dtype=torch.float64).view(1, 1, 1, 1)
    plain = query / temperature
    assert torch.equal(torch.func.vmap(lambda row: cool(row[None], temperature)[0])(query), plain)


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_what_other_models_read(name: str, zero_head: bool):
    make, special = READERS[name]
    model = randomize(make()).double().eval()
    if zero_head:
        for path, module in model.named_modules():
            if "classifier" in path.split(".")[0] and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
    config = GatedVPTConfig(num_virtual_tokens=3, gate_init=0.0)
    adapted = randomize(get_peft_model(model, config), seed=3, trainable_only=True).eval()
    store = the_store(adapted)
    assert store.spec.reads_special == special
    if name == "yolos_positions_between":
        assert not store.spec.joins
    short = adapted(pixel_values=images()).logits
    store.spec = replace(store.spec, joins=False, reads_special=False)
    assert (adapted(pixel_values=images()).logits - short).abs().max() < EXACT


def test_older_configurations_load(tmp_path):
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"skip_unread": true,', ""))
    loaded = PeftModel.from_pretrained(vit(), tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
