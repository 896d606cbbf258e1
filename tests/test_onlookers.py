"""Everything runs in full as soon as somebody looks, and those who look see the tokens of the backbone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_fixtures import BLOCKS, CONFIGS, TOKENS, bare_vit, randomize, vit
from shortcut_fixtures import EXACT, READERS, SIZES, Watch, images, prompted, results, the_store
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    PreTrainedModel,
)

from vpt_peft import VPTConfig
from vpt_peft.encoder import find_encoder, submodule


def seen_by_hook(where: Callable[[PreTrainedModel], nn.Module]) -> Callable[[PeftModel], list[int]]:
    """The number of tokens in the output of a module, for a hook of the user."""

    def look(model: PeftModel) -> list[int]:
        seen: list[int] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            seen.append(hidden.shape[1])

        handle = where(model.get_base_model()).register_forward_hook(hook)
        model(images())
        handle.remove()
        return seen

    return look


LOOKS: dict[str, Callable[[PeftModel], list[int]]] = {
    "hidden_states": lambda model: [h.shape[1] for h in model(images(), output_hidden_states=True).hidden_states],
    "encoder": lambda model: [model.get_base_model().vit(images()).last_hidden_state.shape[1]],
    "hook_on_encoder": seen_by_hook(lambda base: base.vit),
    "hook_on_norm": seen_by_hook(lambda base: base.vit.layernorm),
    "hook_on_last_block": seen_by_hook(lambda base: base.vit.layers[-1]),
    "hook_in_last_block": seen_by_hook(lambda base: base.vit.layers[-1].mlp.fc2),
    "hook_on_first_block": seen_by_hook(lambda base: base.vit.layers[0]),
    "hook_on_middle_block": seen_by_hook(lambda base: base.vit.layers[1]),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["deep", "shallow", "gated"])
def test_whoever_looks_sees_the_tokens_of_the_backbone(name: str, look: str):
    model = prompted(vit(), CONFIGS[name]()).eval()
    logits = model(images()).logits
    assert set(LOOKS[look](model)) == {TOKENS}
    assert torch.equal(model(images()).logits, logits)


def test_hook_on_the_input_of_a_block_sees_no_prompts():
    model = prompted(vit(), CONFIGS["shallow"]()).eval()
    plain = the_store(model)
    seen: list[torch.Tensor] = []
    model.get_base_model().vit.layers[1].register_forward_pre_hook(
        lambda module, args: seen.append(args[0]), prepend=True
    )
    model(images())
    plain.spec = replace(plain.spec, joins=False)
    model(images())
    assert seen[0].shape[1] == TOKENS and torch.equal(*seen)


def test_attentions_are_whole():
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    model.get_base_model().set_attn_implementation("eager")
    maps = model(images(), output_attentions=True).attentions
    assert [tuple(each.shape) for each in maps] == [(3, 4, TOKENS, TOKENS + 4)] * BLOCKS
    model.get_base_model().config.output_hidden_states = True
    assert [h.shape[1] for h in model(images()).hidden_states] == [TOKENS] * (BLOCKS + 1)


def test_later_hidden_states_do_not_end_it(monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    # Leaves transformers' hooks on the blocks, which sleep from then on
    model(images(), output_hidden_states=True)
    watch = Watch(model, monkeypatch)
    model(images())
    assert watch.tokens == [1]


def test_bare_backbone_keeps_its_tokens():
    model = prompted(bare_vit(), VPTConfig(num_virtual_tokens=4)).eval()
    assert not the_store(model).spec.reads_special
    assert model(images()).last_hidden_state.shape[1] == TOKENS


def test_the_mark_of_a_call_serves_once():
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    base = model.get_base_model()
    kept: list[torch.Tensor] = []
    base.register_forward_hook(lambda module, args, output: kept.append(module.vit(args[0]).last_hidden_state))
    model(images())
    assert kept[0].shape[1] == TOKENS


ONLOOKERS: dict[str, Callable[[PreTrainedModel], Callable[[], None]]] = {
    "hook_on_norm": lambda base: base.vit.layernorm.register_forward_hook(lambda *_: None).remove,
    "hook_on_first_block": lambda base: base.vit.layers[0].register_forward_hook(lambda *_: None).remove,
    "backward_hook": lambda base: base.vit.layers[-1].register_full_backward_hook(lambda *_: None).remove,
    "hook_on_all_modules": lambda base: register_module_forward_hook(lambda *_: None).remove,
}


@pytest.mark.parametrize("look", ONLOOKERS)
def test_onlookers(look: str, monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS["shallow"]())
    watch = Watch(model, monkeypatch)
    go = ONLOOKERS[look](model.get_base_model())
    results(model)
    watched = watch.tokens == [TOKENS], watch.insertions == BLOCKS - 1
    assert watched == {"hook_on_norm": (True, False), "hook_on_first_block": (False, True)}.get(look, (True, True))
    go()
    results(model)
    assert watch.tokens[-1] == 1


@pytest.mark.parametrize("look", [*ONLOOKERS, "hidden_states", "checkpointing"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "yolos_positions_between"])
def test_onlookers_while_prompts_are_attached(name: str, look: str):
    """What was found out while somebody looked is right when nobody looks any more."""
    model = randomize(READERS[name][0]()).double().eval()
    if look == "checkpointing":
        model.gradient_checkpointing_enable()
    elif look == "hidden_states":
        model.config.output_hidden_states = True
    encoder = getattr(model, "vit", None) or getattr(model, "dinov2", None)
    seen = nn.Module()
    seen.vit = nn.Module()
    seen.vit.layernorm, seen.vit.layers = encoder.layernorm, list(encoder.modules())[-1:]
    seen.vit.layers = [submodule(encoder, block.path) for block in find_encoder(model).blocks]
    go = ONLOOKERS[look](seen) if look in ONLOOKERS else None
    adapted = randomize(get_peft_model(model, CONFIGS["shallow"]()), seed=3, trainable_only=True).eval()
    if go is not None:
        go()
    model.gradient_checkpointing_disable()
    model.config.output_hidden_states = False
    short = adapted(pixel_values=images()).logits
    store = the_store(adapted)
    store.spec = replace(store.spec, joins=False, reads_special=False)
    assert (adapted(pixel_values=images()).logits - short).abs().max() < EXACT


def test_norm_that_trains_is_watched_too(monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), VPTConfig(num_virtual_tokens=4, modules_to_save=["classifier", "layernorm"]))
    watch = Watch(model, monkeypatch)
    model(images())
    seen: list[int] = []
    model.get_base_model().vit.layernorm.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model(images())
    assert watch.tokens == [1, TOKENS] and seen == [TOKENS]


@pytest.mark.parametrize("given", [{"output_attentions": True}, {"unknown": 3}])
def test_calls_that_ask_for_more_run_in_full(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    watch = Watch(model, monkeypatch)
    model(images(), **given)
    model(images(), labels=torch.tensor([0, 1, 2]), num_items_in_batch=3)
    assert watch.tokens == [TOKENS, 1]


def test_encoders_that_collect_by_hand():
    model = Data2VecVisionForImageClassification(Data2VecVisionConfig(**SIZES, num_labels=5)).double().eval()
    adapted = get_peft_model(model, CONFIGS["shallow"]()).eval()
    shown = adapted(pixel_values=images(), output_hidden_states=True).hidden_states
    assert [hidden.shape[1] for hidden in shown] == [TOKENS] * (BLOCKS + 1)


def test_calls_of_model_and_encoder_at_the_same_time():
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    encoder, batch = model.get_base_model().vit, images()
    with torch.no_grad():
        expected = model(batch).logits, encoder(batch).last_hidden_state
    wrong: list[str] = []

    def work(run: Callable[[], torch.Tensor], wanted: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(60):
                got = run()
                if got.shape != wanted.shape or (got - wanted).abs().max() > EXACT:
                    wrong.append(f"{tuple(got.shape)}")

    jobs = [(lambda: model(batch).logits, expected[0]), (lambda: encoder(batch).last_hidden_state, expected[1])] * 2
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
