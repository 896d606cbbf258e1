"""Work that is left out where nobody looks: the same results, and everything in full as soon as somebody does."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import draw
from peft import LoraConfig, PeftModel, get_peft_model
from peft_fixtures import BLOCKS, CONFIGS, TOKENS, bare_vit, randomize, vit
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.attention.extras import cool
from vpt_peft.encoder import find_encoder, submodule
from vpt_peft.tuners.vpt import layer as layer_module
from vpt_peft.tuners.vpt.store import VPTPromptStore, find_store


EXACT = 1e-12
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
# Their heads read prompts or patches
READ_MORE = ("pooled", "class_tokens")


def images(count: int = 3) -> torch.Tensor:
    return draw(count, 3, 32, 32, seed=1).double()


def prompted(model: PreTrainedModel, config: VPTConfig) -> PeftModel:
    return randomize(get_peft_model(model, config), seed=3, trainable_only=True)


def the_store(model: nn.Module) -> VPTPromptStore:
    store = find_store(model)
    assert store is not None
    return store


class Watch:
    """Counts of tokens that the last block's MLP gets and of insertions of prompt tokens, seen without hooks."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.insertions = 0
        mlp: Any = the_store(model).layers[-1].block.mlp
        forward, insert = type(mlp).forward, layer_module.insert_tokens

        def seen(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            if module is mlp:
                self.tokens.append(hidden.shape[1])
            return forward(module, hidden)

        def counted(*args: Any) -> torch.Tensor:
            self.insertions += 1
            return insert(*args)

        # Of the class: a forward pass replaced on the module itself counts as an onlooker
        monkeypatch.setattr(type(mlp), "forward", seen)
        monkeypatch.setattr(layer_module, "insert_tokens", counted)


def results(model: PeftModel, **given: Any) -> list[torch.Tensor]:
    """Logits and the gradients of everything that trains."""
    model.zero_grad()
    logits = model(images(), **given).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None)]


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    assert len(one) == len(other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


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


class ReadsPatchesInTraining(ViTForImageClassification):
    """A model of a user."""

    def forward(self, pixel_values: torch.Tensor, tokens: bool = False, **given: Any) -> Any:
        hidden = self.vit(pixel_values).last_hidden_state
        read = hidden.mean(1) if self.training else hidden[:, 0]
        return hidden if tokens else SemanticSegmenterOutput(logits=self.classifier(read))


def test_models_of_users_run_in_full():
    model = ReadsPatchesInTraining(vit().config).double()
    assert not the_store(get_peft_model(model, CONFIGS["deep"]())).spec.reads_special


@pytest.mark.parametrize("given", [{"output_attentions": True}, {"unknown": 3}])
def test_calls_that_ask_for_more_run_in_full(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = prompted(vit(), CONFIGS["deep"]()).eval()
    watch = Watch(model, monkeypatch)
    model(images(), **given)
    model(images(), labels=torch.tensor([0, 1, 2]), num_items_in_batch=3)
    assert watch.tokens == [TOKENS, 1]


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


def test_encoders_that_collect_by_hand():
    model = Data2VecVisionForImageClassification(Data2VecVisionConfig(**SIZES, num_labels=5)).double().eval()
    adapted = get_peft_model(model, CONFIGS["shallow"]()).eval()
    shown = adapted(pixel_values=images(), output_hidden_states=True).hidden_states
    assert [hidden.shape[1] for hidden in shown] == [TOKENS] * (BLOCKS + 1)


def test_temperatures_under_transforms():
    query, temperature = draw(4, 2, 5, 3, seed=2).double(), torch.tensor([0.7], dtype=torch.float64).view(1, 1, 1, 1)
    plain = query / temperature
    assert torch.equal(torch.func.vmap(lambda row: cool(row[None], temperature)[0])(query), plain)


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


def _clip() -> PreTrainedModel:
    vision = {**SIZES, "projection_dim": 16}
    return CLIPForImageClassification(CLIPConfig(vision_config=vision, text_config={"hidden_size": 32}, num_labels=5))


# The model, and whether its output depends on special tokens alone
READERS: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "vit": (vit, True),
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**SIZES, num_labels=5)), True),
    "vit_msn": (lambda: ViTMSNForImageClassification(ViTMSNConfig(**SIZES, num_labels=5)), True),
    "dinov2": (lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, num_labels=5)), False),
    "ijepa": (lambda: IJepaForImageClassification(IJepaConfig(**SIZES, num_labels=5)), False),
    "clip": (_clip, False),
    "yolos": (
        lambda: YolosForObjectDetection(
            YolosConfig(**{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3, use_mid_position_embeddings=False)
        ),
        False,
    ),
    "yolos_positions_between": (
        lambda: YolosForObjectDetection(YolosConfig(**{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3)),
        False,
    ),
}


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
