"""Adapters that are not concerned are out of the way while PEFT walks the model, and back as they were afterwards."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.functional import set_adapter
from peft.utils.other import ModulesToSaveWrapper
from peft_fixtures import CONFIGS, images, logits, lora, randomize, vit
from torch import nn

from vpt_peft.tuners.vpt.resting import set_others_aside


NAMES = ["first", "second", "third", "fourth"]


def several(name: str = "deep") -> PeftModel:
    model = get_peft_model(vit(), CONFIGS[name](), adapter_name=NAMES[0])
    for other in NAMES[1:]:
        model.add_adapter(other, CONFIGS[name]())
    return randomize(model, 1).eval()  # type: ignore[return-value]


def entries(model: nn.Module) -> dict[str, list[str]]:
    """The adapters of every container, in order."""
    containers = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleDict)}
    return {path: list(m) for path, m in containers.items() if not path.endswith(tuple(NAMES))}


@pytest.mark.parametrize("name", ["deep", "gated"])
def test_only_those_named_or_trainable_stay(name: str):
    model = several(name)
    before, parameters = entries(model), {n: id(p) for n, p in model.named_parameters()}
    model.base_model.set_requires_grad("third")
    for trainable, stay in ((False, {"first", "second", "third"}), (True, {"first", "second"})):
        with set_others_aside(model, ["second", "first"], trainable):
            found = set().union(*entries(model).values())
            assert found & set(NAMES) == stay
            names = {n for n, _ in model.named_parameters()}
            assert not any(f".{other}." in n for n in names for other in set(NAMES) - stay)
    assert entries(model) == before
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


def test_changes_inside_hold():
    """An entry that is added, replaced or deleted in between stays so."""
    model = several()
    container = model.base_model.model.prompt_tuner.vpt_prompts
    kept = {name: container[name] for name in NAMES}
    with set_others_aside(model, ["first", "second"]):
        del container["first"]
        container["second"] = kept["third"]
        container["fifth"] = kept["fourth"]
    assert list(container) == ["second", "third", "fourth", "fifth"]
    assert [container[name] for name in container] == [kept[n] for n in ("third", "third", "fourth", "fourth")]


def test_an_error_inside_brings_all_back():
    model = several()
    before = entries(model)
    with pytest.raises(RuntimeError), set_others_aside(model, ["first"]):
        raise RuntimeError
    assert entries(model) == before


def test_switching_leaves_one_trainable(tmp_path):
    """As with PEFT alone: prompts that are switched to train, all others are frozen, whatever they were."""
    model = several()
    model.base_model.set_requires_grad(["second", "fourth"])
    outputs = {}
    for name in NAMES:
        model.set_adapter(name)
        outputs[name] = logits(model, images())
        trained = {n for n, p in model.named_parameters() if p.requires_grad and "vpt_prompts" in n}
        assert trained and all(f".{name}." in n for n in trained)
    assert len({tuple(each.flatten().tolist()) for each in outputs.values()}) == len(NAMES)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.load_adapter(str(tmp_path / "second"), "again")
    assert list(model.peft_config) == [*NAMES, "again"]
    model.set_adapter("again")
    assert torch.equal(logits(model, images()), outputs["second"])
    model.set_adapter("third")
    assert torch.equal(logits(model, images()), outputs["third"])


def heads_in_use(model: nn.Module) -> list[str]:
    return [name for m in model.modules() if isinstance(m, ModulesToSaveWrapper) for name in m.active_adapters]


@pytest.mark.parametrize("other", ["functional", "lora", "gated"])
def test_the_active_head_stays_in_use(other: str):
    """Where several tuners, or PEFT's functions, change one model, the tuner's active adapter and the head's differ."""
    model = get_peft_model(vit(), CONFIGS["deep"](), adapter_name="first")
    if other == "functional":
        model.add_adapter("second", CONFIGS["deep"]())
        set_adapter(model, "second")
    else:
        get_peft_model(model, lora() if other == "lora" else CONFIGS[other](), adapter_name="on_top")
    model.add_adapter("third", CONFIGS["deep"]())
    assert heads_in_use(model) == ["first"]
    head = model.base_model.model.classifier.modules_to_save
    assert {"first", "third"} <= set(head)
    model.set_adapter("third")
    assert heads_in_use(model) == ["third"]
