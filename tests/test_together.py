"""Prompts beside other methods on one model: LoRA in either order, gated beside plain, stacked, injected and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft_fixtures import BLOCKS, CONFIGS, MAIN, gradients, images, logits, lora, randomize, trainable, vit
from torch import nn

from vpt_peft.tuners.vpt.parameters import find_parameters


def reference(name: str) -> torch.Tensor:
    """Logits of prompts on a backbone into which LoRA was merged."""
    merged = randomize(get_peft_model(vit(), lora()), 2, trainable_only=True).merge_and_unload().eval()
    return logits(prompts_of(get_peft_model(merged, CONFIGS[name](modules_to_save=[]))).eval(), images())


def prompts_of(model: nn.Module) -> nn.Module:
    """Draw the prompts (not LoRA's values) anew."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_tuner" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).abs() * 0.3)
    return model


def lora_of(model: nn.Module) -> nn.Module:
    """Draw LoRA's values as in `reference`, in the order of the layers."""
    source = randomize(get_peft_model(vit(), lora()), 2, trainable_only=True)
    values = [p for n, p in source.named_parameters() if "lora_" in n]
    targets = [p for n, p in model.named_parameters() if "lora_" in n]
    assert len(values) == len(targets) == 4 * BLOCKS
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
    return model


def lora_first(name: str) -> nn.Module:
    return get_peft_model(get_peft_model(vit(), lora()), CONFIGS[name](modules_to_save=[]), adapter_name="p")


def prompts_first(name: str) -> nn.Module:
    return get_peft_model(get_peft_model(vit(), CONFIGS[name](modules_to_save=[]), adapter_name="p"), lora())


def injected(name: str, order: tuple[str, str] = ("l", "p")) -> nn.Module:
    model = vit()
    configs: dict[str, Any] = {"l": lora(), "p": CONFIGS[name](modules_to_save=[])}
    for adapter_name in order:
        model.add_adapter(configs[adapter_name], adapter_name)
    model.set_adapter(["l", "p"])
    return model


def injected_prompts_first(name: str) -> nn.Module:
    return injected(name, ("p", "l"))


WAYS = [lora_first, prompts_first, injected, injected_prompts_first]


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("way", WAYS)
def test_same_function_in_any_order(way, name: str):
    """LoRA and prompts act together, and keys and values of prompts pass the adapted maps."""
    model = prompts_of(lora_of(way(name))).eval()
    assert torch.allclose(logits(model, images()), reference(name), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["deep", "gated"])
@pytest.mark.parametrize("way", WAYS)
def test_both_train(way, name: str):
    model = prompts_of(lora_of(way(name))).eval()
    if way in (lora_first, prompts_first):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name or "prompt_tuner" in parameter_name)
    found = gradients(model, images())
    assert [n for n in found if "lora_" in n] and [n for n in found if "prompt_tuner" in n]
    assert all(gradient.any() for gradient in found.values())
    assert set(found) == {n for n in trainable(model) if "lora_" in n or "prompt_tuner" in n}


@pytest.mark.parametrize("way", [injected, injected_prompts_first])
def test_one_at_a_time(way):
    model = prompts_of(lora_of(way("deep"))).eval()
    only_lora = logits(randomize(get_peft_model(vit(), lora()), 2, trainable_only=True).eval(), images())
    only_prompts = logits(prompts_of(get_peft_model(vit(), CONFIGS["deep"](modules_to_save=[]))).eval(), images())
    model.set_adapter("l")
    assert torch.allclose(logits(model, images()), only_lora, rtol=0, atol=1e-12)
    model.set_adapter("p")
    assert torch.allclose(logits(model, images()), only_prompts, rtol=0, atol=1e-12)
    model.delete_adapter("l")
    assert torch.allclose(logits(model, images()), only_prompts, rtol=0, atol=1e-12)


def test_lora_merged_below_prompts():
    """Merging LoRA leaves the prompts in place, on the merged maps."""
    model = prompts_of(lora_of(prompts_first("deep"))).eval()
    both = logits(model, images())
    model.merge_adapter()
    assert torch.allclose(logits(model, images()), both, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, images()), both, rtol=0, atol=1e-10)


def test_lora_merged_in_place_below_prompts():
    below = lora_of(get_peft_model(vit(), lora()))
    model = prompts_of(get_peft_model(below, CONFIGS["deep"](modules_to_save=[]))).eval()
    both = logits(model, images())
    below.merge_adapter()
    assert torch.allclose(logits(model, images()), both, rtol=0, atol=1e-10)
    below.unmerge_adapter()
    assert torch.allclose(logits(model, images()), both, rtol=0, atol=1e-10)


def test_prompts_deleted_above_lora():
    below = lora_of(get_peft_model(vit(), lora())).eval()
    before = logits(below, images())
    model = prompts_of(get_peft_model(below, CONFIGS["shallow"](modules_to_save=[]), adapter_name="prompts")).eval()
    assert (logits(model, images()) - before).abs().max() > 0.1
    with model.disable_adapter():
        # PEFT disables all tuner layers below, of whatever method.
        assert torch.equal(logits(model, images()), logits(vit(), images()))
    model.base_model.delete_adapter("prompts")
    assert torch.equal(logits(below, images()), before)


def test_head_is_found_in_a_stack():
    """Prompts stacked on LoRA find the head, whether LoRA trains it already or not."""
    model = get_peft_model(get_peft_model(vit(), lora()), CONFIGS["deep"](), adapter_name="p")
    heads = [n for n in trainable(model) if "classifier" in n]
    assert len(heads) == 2 and all(".p." in n for n in heads)


def test_lora_does_not_enter_prompts():
    """LoRA on all linear maps passes the prompts' own projection and gates by."""
    model = get_peft_model(vit(), CONFIGS["gated_elementwise"](modules_to_save=[]), adapter_name="p").base_model.model
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), "l")
    adapted = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(adapted) >= 6 * BLOCKS and not [path for path in adapted if "prompt_tuner" in path]


def test_save_and_load_of_a_stack(tmp_path: Path):
    """Each adapter of a stack has a file of its own, without the other's values."""
    model = prompts_of(lora_of(lora_first("deep"))).eval()
    expected = logits(model, images())
    model.save_pretrained(tmp_path / "prompts")
    model.base_model.model.save_pretrained(tmp_path / "lora")
    assert not [key for key in get_peft_model_state_dict(model, adapter_name="p") if "lora_" in key]
    assert not [key for key in get_peft_model_state_dict(model.base_model.model) if "vpt_" in key]
    loaded = PeftModel.from_pretrained(vit(), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "prompts" / "p").eval()
    assert torch.equal(logits(loaded, images()), expected)
    inside = PeftModel.from_pretrained(vit(), tmp_path / "prompts" / "p", adapter_name="p")
    stack = lora_of(get_peft_model(inside, lora())).eval()
    assert torch.allclose(logits(stack, images()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [("g", "p"), ("p", "g")])
@pytest.mark.parametrize("stacked", [True, False])
def test_gated_beside_plain(order: tuple[str, str], stacked: bool):
    """Gated and plain prompts on one model, one at a time and both at once."""
    configs = {"g": CONFIGS["gated"](modules_to_save=[]), "p": CONFIGS["deep"](modules_to_save=[])}
    alone = {
        name: logits(prompts_of(get_peft_model(vit(), CONFIGS[kind](modules_to_save=[]))).eval(), images())
        for name, kind in (("g", "gated"), ("p", "deep"))
    }
    base = vit()
    if stacked:
        model: nn.Module = base
        for name in order:
            model = get_peft_model(model, configs[name], adapter_name=name)
    else:
        for name in order:
            base.add_adapter(configs[name], name)
        model = base
    model.eval()
    store = find_parameters(model)
    assert store is not None and sum(module is store for module in model.modules()) == 1
    assert len([module for module in model.modules() if type(module) is type(store)]) == 1
    outputs = {}
    for active in ("g", "p", ["g", "p"]):
        for parts in ("gated_prompt_", "vpt_"):
            redraw(store, parts)
        for layer in (store, *store.layers):
            layer.set_adapter(active)
        outputs[str(active)] = logits(model, images())
    for name in "gp":
        assert torch.allclose(outputs[name], alone[name], rtol=0, atol=1e-12), name
    both = outputs[str(["g", "p"])]
    assert all((both - other).abs().max() > 1e-3 for other in alone.values())
    assert gradients(model, images())


def redraw(store: nn.Module, prefix: str) -> None:
    """Draw the values of one method as `prompts_of` does for a model that has no other."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in store.named_parameters():
            if name.startswith(prefix):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).abs() * 0.3)


@pytest.mark.parametrize("name", ["deep", "gated"])
def test_mixed(name: str):
    """`mixed=True` works like the stack, or says why it does not; the model is left as it was."""
    base = vit()
    before, keys = logits(base, images()), list(base.state_dict())
    try:
        model = get_peft_model(base, CONFIGS[name](modules_to_save=[]), adapter_name="p", mixed=True)
    except (TypeError, ValueError) as error:
        assert any(word in str(error) for word in ("mixed", "Mixed", "mix"))
        assert torch.equal(logits(base, images()), before) and list(base.state_dict()) == keys
        return
    model.add_adapter("l", lora())
    model.set_adapter(["p", "l"])
    prompts_of(lora_of(model)).eval()
    assert torch.allclose(logits(model, images()), reference(name), rtol=0, atol=1e-10)


def test_mixed_kinds_in_one_peft_model():
    """One PeftModel holds one kind of method: PEFT's refusal leaves everything as it was."""
    model = get_peft_model(vit(), CONFIGS["deep"]()).eval()
    before = logits(model, images())
    for config in (CONFIGS["gated"](), lora()):
        with pytest.raises(ValueError, match="different peft types"):
            model.add_adapter("other", config)
    assert torch.equal(logits(model, images()), before) and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["shallow", "gated", "deep"])
@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_a_prompted_model_that_runs_inside_another(name: str, names: list[str] | None):
    """The outer pass goes on as if nothing had run in between, and the inner one knows nothing of it."""
    outer = get_peft_model(vit(), CONFIGS[name](), adapter_name="a")
    outer.add_adapter("b", CONFIGS[name]())
    inner = randomize(get_peft_model(vit(seed=1), CONFIGS[name](), adapter_name="c"), 3).eval()
    randomize(outer, 2).eval()
    given: dict[str, Any] = {} if names is None else {"adapter_names": names}
    pixels, found = images(), []
    alone = logits(outer, pixels, **given), logits(inner, pixels)
    block = outer.get_base_model().vit.layers[1]
    for register in (block.register_forward_pre_hook, block.register_forward_hook):
        register(lambda *_: found.append(logits(inner, pixels)) or None)
    assert torch.equal(logits(outer, pixels, **given), alone[0])
    assert len(found) == 2 and all(torch.equal(each, alone[1]) for each in found)


@pytest.mark.parametrize("path", ["vit", f"vit.layers.{BLOCKS - 1}"])
def test_an_adapter_that_is_deleted_during_a_call_serves_it_to_the_end(path: str):
    """Deleted before the encoder is entered, or in its last block; the next call runs with what is active then."""
    model = get_peft_model(vit(), CONFIGS["deep"](), adapter_name="a")
    model.add_adapter("b", CONFIGS["deep"]())
    randomize(model, 2).eval()
    of_a = logits(model, images())

    def delete(*_: Any) -> None:
        handle.remove()
        model.set_adapter("b")
        model.delete_adapter("a")

    handle = model.get_base_model().get_submodule(path).register_forward_pre_hook(delete, prepend=True)
    assert torch.equal(logits(model, images()), of_a)
    assert not torch.allclose(logits(model, images()), of_a)
