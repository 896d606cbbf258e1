"""The life of an adapter in memory: attach, add, switch, disable, delete, unload, copy, train."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from peft_fixtures import (
    BLOCKS,
    CONFIGS,
    LABELS,
    MAIN,
    WIDTH,
    bare_vit,
    gradients,
    hook_count,
    images,
    logits,
    own_attributes,
    randomize,
    trainable,
    vit,
)
from torch import nn
from transformers import ViTModel

from vpt_peft import VPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


DEEP_NUMBERS = 3 * 4 * WIDTH
HEAD_NUMBERS = WIDTH * LABELS + LABELS


def attach(name: str, model: nn.Module | None = None, **given: Any) -> PeftModel:
    """A model with one adapter, trained values unlike any start."""
    attached = get_peft_model(vit() if model is None else model, CONFIGS[name](**given))
    return randomize(attached, 1, trainable_only=True).eval()  # type: ignore[return-value]


def two_adapters(first: str = "deep", second: str = "shallow", **given: Any) -> PeftModel:
    """Adapters "a" and "b", "a" active."""
    model = get_peft_model(vit(), CONFIGS[first](**given), adapter_name="a")
    model.add_adapter("b", CONFIGS[second](**given))
    for index, name in enumerate("ab"):
        model.set_adapter(name)
        randomize(model, index + 1, trainable_only=True)
    model.set_adapter("a")
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_attached_and_disabled(name: str):
    base, x = vit(), images()
    before = logits(base, x)
    model = attach(name, base)
    assert (logits(model, x) - before).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model, x), before)
    assert (logits(model, x) - before).abs().max() > 0.1
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, x), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), before)
    assert torch.equal(logits(model, x), before)
    model.base_model.enable_adapter_layers()
    assert (logits(model, x) - before).abs().max() > 0.1


def test_trainable_parameters(capsys: pytest.CaptureFixture[str]):
    model = get_peft_model(vit(), CONFIGS["deep"]())
    count, total = model.get_nb_trainable_parameters()
    assert count == DEEP_NUMBERS + HEAD_NUMBERS
    assert total == sum(p.numel() for p in vit().parameters()) + DEEP_NUMBERS + HEAD_NUMBERS
    model.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    assert not any(
        p.requires_grad
        for name, p in model.named_parameters()
        if "vpt_" not in name and ".modules_to_save." not in name
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_training_moves_all_of_the_adapter_and_nothing_else(name: str):
    model = attach(name).train()
    wanted = set(trainable(model))
    assert all("vpt_" in n or "gated_prompt_" in n or "modules_to_save" in n for n in wanted)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        model(pixel_values=images(seed=seed), labels=torch.tensor([1, 3])).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == wanted
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == wanted


def test_several_lengths_switch_and_act_together():
    model, x = two_adapters(modules_to_save=[]), images()
    with model.disable_adapter():
        base = logits(model, x)
    outputs = {}
    for active in ("a", "b"):
        model.set_adapter(active)
        outputs[active] = logits(model, x)
        assert model.active_adapters == [active]
    model.base_model.set_adapter(["a", "b"])
    outputs["ab"] = logits(model, x)
    assert model.active_adapters == ["a", "b"]
    assert model.get_model_status().active_adapters == ["a", "b"]
    model.base_model.set_adapter(["b", "a"])
    assert torch.allclose(logits(model, x), outputs["ab"], rtol=0, atol=1e-12)
    distinct = [base, *outputs.values()]
    for i, left in enumerate(distinct):
        for right in distinct[i + 1 :]:
            assert (left - right).abs().max() > 1e-3
    model.set_adapter("a")
    assert torch.equal(logits(model, x), outputs["a"])


def test_together_is_a_longer_prompt():
    """Two deep adapters that act at once are one adapter with the prompts of both (their order does not matter)."""
    model = bare_vit()
    both = get_peft_model(model, CONFIGS["deep"](num_virtual_tokens=2), adapter_name="a")
    both.add_adapter("b", CONFIGS["deep"](num_virtual_tokens=3))
    both.base_model.set_adapter(["a", "b"])
    long = get_peft_model(bare_vit(), CONFIGS["deep"](num_virtual_tokens=5))
    sources = find_parameters(both).vpt_prompts
    with torch.no_grad():
        for index in range(BLOCKS):
            prompts = [sources[name][str(index)] for name in "ab"]
            find_parameters(long).vpt_prompts["default"][str(index)].copy_(torch.cat(prompts))
    x = images()
    assert torch.allclose(logits(both.eval(), x), logits(long.eval(), x), rtol=0, atol=1e-12)
    assert {n.split(".vpt_prompts.")[1][0] for n in trainable(both)} == {"a", "b"}


def test_adding_leaves_the_first_adapter_alone():
    model = attach("deep")
    before, wanted = logits(model, images()), trainable(model)
    model.add_adapter("b", CONFIGS["shallow"](num_virtual_tokens=7))
    assert trainable(model) == wanted and model.active_adapters == ["default"]
    assert torch.equal(logits(model, images()), before)
    with pytest.raises(ValueError, match="b"):
        model.add_adapter("b", CONFIGS["deep"]())
    assert torch.equal(logits(model, images()), before)


def test_refused_second_adapter_leaves_the_model():
    model = attach("deep")
    before, keys, wanted = logits(model, images()), list(model.state_dict()), trainable(model)
    for fields, reason in (
        ({"layers_to_transform": [9]}, "layers_to_transform"),
        ({"backbone": "elsewhere"}, "elsewhere"),
        ({"modules_to_save": ["clasifier"]}, "clasifier"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.add_adapter("b", VPTConfig(**fields))
        assert list(model.peft_config) == ["default"]
        assert list(model.state_dict()) == keys and trainable(model) == wanted
        assert torch.equal(logits(model, images()), before)
    model.add_adapter("b", CONFIGS["deep"]())


def test_delete():
    model, x = two_adapters(), images()
    with model.disable_adapter():
        base = logits(model, x)
    first = logits(model, x)
    with pytest.raises(ValueError, match="c"):
        model.delete_adapter("c")
    model.delete_adapter("b")
    assert torch.equal(logits(model, x), first) and list(model.peft_config) == ["a"]
    assert not [key for key in model.state_dict() if ".b." in key]
    status = model.get_model_status()
    assert status.available_adapters == ["a"] and status.active_adapters == ["a"]
    model.add_adapter("b", CONFIGS["deep"](num_virtual_tokens=6))
    model.set_adapter("b")
    model.delete_adapter("b")
    assert not [key for key in model.state_dict() if ".b." in key]
    model.set_adapter("a")
    assert torch.equal(logits(model, x), first)
    model.delete_adapter("a")
    assert torch.equal(logits(model.base_model.model, x), base)
    assert not [key for key in model.state_dict() if "prompt" in key]


def test_delete_active_frees_its_values():
    """Nothing keeps the values of a deleted adapter alive, not even tensors on their way between blocks."""
    model = two_adapters("shallow", "deep")
    gradients(model, images())
    kept = [weakref.ref(p) for n, p in model.named_parameters() if ".vpt_prompts.a." in n]
    model.zero_grad()
    model.delete_adapter("a")
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    store = find_parameters(model)
    assert "a" not in store.configs and not any("a" in layer.layouts for layer in store.layers)


def test_irregular_states():
    model, x = attach("deep"), images()
    before = logits(model, x)
    find_parameters(model).enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    assert (logits(model, x) - before).abs().max() > 1e-3
    with warnings.catch_warnings(record=True), model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True
    assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_unload_and_again(name: str):
    """Nothing is left behind, and attaching anew is as the first time."""
    base, x = vit(), images()
    before, hooks, attributes = logits(base, x), hook_count(base), own_attributes(base)
    keys, implementation = list(base.state_dict()), base.config._attn_implementation
    model = attach(name, base, modules_to_save=[])
    first = logits(model, x)
    plain = model.unload()
    assert plain is base and torch.equal(logits(plain, x), before)
    assert list(plain.state_dict()) == keys and hook_count(plain) == hooks
    assert own_attributes(plain) == attributes and plain.config._attn_implementation == implementation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        again = attach(name, plain, modules_to_save=[])
    assert torch.equal(logits(again, x), first)


def test_unload_keeps_the_trained_head():
    """PEFT's manner: `unload` leaves modules_to_save as they were trained, and everything else as it was before."""
    base, x = vit(), images()
    before, encoder = logits(base, x), logits(base.vit, x)
    assert torch.equal(logits(get_peft_model(base, CONFIGS["deep"]()).unload(), x), before)
    model = attach("deep", base)
    head = model.base_model.model.classifier.modules_to_save["default"]
    plain = model.unload()
    assert plain.classifier is head and torch.equal(logits(plain.vit, x), encoder)


def test_unload_after_training_mode():
    """The frozen parts' eval mode is PEFT's business while attached; the plain model trains as before afterwards."""
    model = attach("deep", vit(hidden_dropout_prob=0.5)).train()
    model(pixel_values=images())
    plain = model.unload().train()
    assert all(module.training for module in plain.modules())
    assert not torch.equal(logits(plain, images()), logits(plain, images()))


@pytest.mark.parametrize("name", ["merge_and_unload", "unload"])
def test_prompts_cannot_become_weights(name: str):
    model, x = attach("deep"), images()
    before = logits(model, x)
    if name == "unload":
        assert not hasattr(model.unload(), "peft_config")
        return
    with pytest.raises((ValueError, NotImplementedError), match="unload"):
        model.merge_and_unload()
    assert torch.equal(logits(model, x), before)


def test_status():
    model = two_adapters()
    status = model.get_model_status()
    assert status.base_model_type == "ViTForImageClassification" and status.adapter_model_type == "VPTModel"
    assert status.peft_types == {"a": "VPT", "b": "VPT"}
    assert status.enabled is True and status.active_adapters == ["a"] and status.merged_adapters == []
    assert status.available_adapters == ["a", "b"] and status.requires_grad == {"a": True, "b": False}
    assert status.devices == {"a": ["cpu"], "b": ["cpu"]}
    assert status.trainable_params == DEEP_NUMBERS + HEAD_NUMBERS
    names = [layer.name for layer in model.get_layer_status()]
    assert "model.prompt_tuner" in names
    assert {f"model.vit.layers.{index}.prompt_tuner" for index in range(BLOCKS)} <= set(names)
    kinds = {layer.module_type for layer in model.get_layer_status()}
    assert kinds == {"VPTLayer", "VPTParameters", "HeadWrapper"}
    assert model.targeted_module_names == [f"vit.layers.{index}" for index in range(BLOCKS)]
    injected = vit()
    injected.add_adapter(CONFIGS["deep"](), "a")
    assert get_model_status(injected).available_adapters == ["a"]
    assert len(get_layer_status(injected)) == BLOCKS + 2


def test_set_requires_grad():
    model = two_adapters()
    model.set_requires_grad("b")
    assert model.get_model_status().requires_grad == {"a": True, "b": True}
    model.set_requires_grad(["a", "b"], requires_grad=False)
    assert not [name for name in trainable(model) if "prompt_tuner" in name]
    model.set_adapter("b", inference_mode=True)
    assert not trainable(model) and model.active_adapters == ["b"]
    model.set_adapter("b")
    assert {name.split(".vpt_prompts.")[1][0] for name in trainable(model) if "vpt_prompts" in name} == {"b"}


def test_bias_all():
    model = attach("deep", bias="all").train()
    before = logits(model, images())
    offsets = {n for n in trainable(model) if "vpt_biases.default." in n}
    assert len(offsets) > 6 * BLOCKS
    prompts = {n for n in trainable(model) if "vpt_prompts" in n}
    head = {n for n in trainable(model) if "modules_to_save" in n}
    assert offsets | prompts | head == set(trainable(model))
    found = gradients(model, images())
    assert {n for n, g in found.items() if g.any()} >= offsets - {n for n in found if "k_proj" in n or "key" in n}
    randomize(model, 3, trainable_only=True)
    assert (logits(model, images()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["deep", "pooled", "strip", "channel", "gated"])
def test_copies_are_apart(name: str):
    """Deep copies, pickles and torch.save files are whole and share nothing with their source."""
    model, x = attach(name), images()
    before = logits(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(logits(other, x), before)
        randomize(other, 9, trainable_only=True)
        assert (logits(other, x) - before).abs().max() > 1e-3
        assert torch.equal(logits(model, x), before)
        for theirs, ours in zip(other.modules(), model.modules(), strict=True):
            assert theirs is not ours
        gradients(other, x)
        assert all(p.grad is None for p in model.parameters())


def test_copy_of_an_injected_base_and_of_a_used_model():
    """A copy taken with a graph in flight (after a training step) works as well."""
    model = attach("gated")
    found = gradients(model, images())
    other = copy.deepcopy(model)
    for name, gradient in gradients(other, images()).items():
        assert torch.equal(gradient, found[name])


def test_repr_shows_the_prompts():
    shown = repr(attach("deep"))
    assert "VPTLayer(" in shown and "VPTParameters(" in shown and "default" in shown
    assert re.search(r"block=2", shown)


@pytest.mark.parametrize("name", MAIN)
def test_state_dict_has_no_leftovers(name: str):
    """The encoder's keys stay as they are; only the adapter's own values are added, each once."""
    base = vit()
    keys = set(base.state_dict())
    model = attach(name, base)
    gradients(model, images())
    prefix = "base_model.model."
    found = {key.removeprefix(prefix) for key in model.state_dict()}
    renamed = {key.replace("classifier.", "classifier.original_module.") for key in keys}
    added = {n.removeprefix(prefix) for n in trainable(model)}
    assert found == renamed | added
    inner = {key for key in keys if key.startswith("vit.")}
    result = model.base_model.model.load_state_dict({key: base.state_dict()[key] for key in inner}, strict=False)
    assert not result.unexpected_keys


def test_base_saved_while_prompted_is_plain(tmp_path):
    """`get_base_model().save_pretrained` writes the backbone under its own names."""
    model = attach("deep", bare_vit())
    with model.disable_adapter():
        expected = logits(model, images())
    model.unload().save_pretrained(tmp_path)
    again = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, dtype=torch.float64).eval()
    assert torch.equal(logits(again, images()), expected)
