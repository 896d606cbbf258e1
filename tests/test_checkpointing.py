"""Gradient checkpointing and torch.compile: the same gradients, blocks really run again, graphs really whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_fixtures import BLOCKS, CONFIGS, dinov2, gradients, images, logits, lora, randomize, vit
from torch import nn

from vpt_peft.tuners.vpt.modes import HOOKS_ARE_CHECKPOINTED


NOISY = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}
FLOWING = ["shallow", "partly_deep", "strip", "pooled", "class_tokens", "gated", "gated_elementwise"]


def attach(name: str, model: nn.Module | None = None, **given: Any) -> PeftModel:
    attached = get_peft_model(vit() if model is None else model, CONFIGS[name](**given))
    return randomize(attached, 1, trainable_only=True).train()  # type: ignore[return-value]


def checkpoint(model: nn.Module, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()


def count_runs(model: nn.Module) -> list[int]:
    """A list that grows by one number, the block's, each time the MLP inside a block runs."""
    runs: list[int] = []
    blocks = [
        module
        for path, module in model.named_modules()
        if path.rsplit(".", 1)[-1].isdigit() and hasattr(module, "mlp")
    ]
    assert len(blocks) == BLOCKS
    for index, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda module, args, index=index: runs.append(index))
    return runs


def may_be_refused(name: str, use_reentrant: bool) -> bool:
    """Prompts that flow from checkpoint to checkpoint are not inputs of it where it contains the hooks."""
    return HOOKS_ARE_CHECKPOINTED and use_reentrant and name in FLOWING


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_same_gradients_and_blocks_run_again(name: str, use_reentrant: bool):
    """With the base in eval, where transformers alone would not checkpoint at all."""
    expected = gradients(attach(name), images())
    model = attach(name, vit(**NOISY))
    checkpoint(model, use_reentrant)
    runs = count_runs(model)
    try:
        found = gradients(model, images())
    except ValueError as error:
        assert may_be_refused(name, use_reentrant) and "use_reentrant" in str(error)
        return
    assert list(found) == list(expected)
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=0, atol=1e-10), key
    assert sorted(runs) == sorted([*range(BLOCKS)] * 2)
    frozen = [m for m in model.base_model.model.vit.modules() if isinstance(m, nn.Dropout)]
    assert not any(module.training for module in frozen)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["deep", "gated"])
def test_dinov2(name: str, use_reentrant: bool):
    expected = gradients(attach(name, dinov2()), images())
    model = attach(name, dinov2(drop_path_rate=0.5))
    checkpoint(model, use_reentrant)
    runs = count_runs(model)
    try:
        found = gradients(model, images())
    except ValueError as error:
        assert may_be_refused(name, use_reentrant) and "use_reentrant" in str(error)
        return
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=0, atol=1e-10), key
    assert sorted(runs) == sorted([*range(BLOCKS)] * 2)


@pytest.mark.parametrize("name", ["deep", "deep_tokens", "shallow", "gated"])
def test_prompt_dropout_is_drawn_once(name: str):
    """The second run of a block sees the prompts that the first one dropped."""
    expected = attach(name, prompt_dropout=0.5)
    torch.manual_seed(3)
    wanted = gradients(expected, images())
    model = attach(name, prompt_dropout=0.5)
    checkpoint(model, False)
    torch.manual_seed(3)
    found = gradients(model, images())
    for key, gradient in wanted.items():
        assert torch.allclose(found[key], gradient, rtol=0, atol=1e-10), key


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["deep", "deep_tokens", "shallow", "gated"])
def test_two_forward_passes_before_one_backward(name: str, use_reentrant: bool):
    """What a block kept for its second run is that of the pass it belongs to, whatever ran in between."""

    def both(model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        first = model(pixel_values=images(2, seed=1)).logits
        second = model(pixel_values=images(3, seed=2)).logits
        with torch.no_grad():
            model(pixel_values=images(1, seed=3))
        (first.square().sum() + 2 * second.sin().sum()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = both(attach(name))
    model = attach(name)
    checkpoint(model, use_reentrant)
    try:
        found = both(model)
    except ValueError as error:
        assert may_be_refused(name, use_reentrant) and "use_reentrant" in str(error)
        return
    assert list(found) == list(expected)
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=0, atol=1e-10), key


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_beside_lora(use_reentrant: bool):
    def build() -> nn.Module:
        model = vit()
        model.add_adapter(lora(), "l")
        model.add_adapter(CONFIGS["deep"](modules_to_save=[]), "p")
        model.set_adapter(["l", "p"])
        return randomize(model, 1, trainable_only=True).train()

    expected = gradients(build(), images())
    model = build()
    checkpoint(model, use_reentrant)
    runs = count_runs(model)
    found = gradients(model, images())
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=0, atol=1e-10), key
    assert sorted(runs) == sorted([*range(BLOCKS)] * 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_switched_on_in_training_mode(use_reentrant: bool):
    """`model.train()` first and checkpointing second works as well as the other way round."""
    model = attach("deep")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    runs = count_runs(model)
    gradients(model, images())
    assert sorted(runs) == sorted([*range(BLOCKS)] * 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_injected_adapter(use_reentrant: bool):
    """Through transformers' add_adapter no tuner hears of `train()`."""
    model = vit(**NOISY)
    model.add_adapter(CONFIGS["deep"](), "a")
    expected = gradients(randomize(model, 1, trainable_only=True).eval(), images())
    checkpoint(model, use_reentrant)
    runs = count_runs(model)
    found = gradients(model, images())
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=0, atol=1e-10), key
    assert sorted(runs) == sorted([*range(BLOCKS)] * 2)


def test_switched_off_again():
    model = attach("deep")
    checkpoint(model, False)
    gradients(model, images())
    model.gradient_checkpointing_disable()
    model.train()
    runs = count_runs(model)
    gradients(model, images())
    assert runs == [*range(BLOCKS)]
    assert not any(module.training for module in model.base_model.model.vit.layers)


def test_eval_and_no_grad_do_not_checkpoint():
    model = attach("shallow")
    checkpoint(model, False)
    runs = count_runs(model)
    logits(model, images())
    assert runs == [*range(BLOCKS)]
    logits(model.eval(), images())
    assert len(runs) == 2 * BLOCKS


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "deep": {},
    "shallow": {},
    "gated": {},
    "pooled": {},
    "deep_dropout": {"prompt_dropout": 0.3},
}


@pytest.mark.parametrize("case", COMPILED)
def test_one_graph(case: str, fresh_dynamo):
    """`fullgraph=True` traces forward and backward; outputs and gradients are those of eager mode."""
    model = attach(case.removesuffix("_dropout"), vit(torch.float32, num_hidden_layers=2), **COMPILED[case])
    x = images(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    found = compiled(pixel_values=x).logits
    found.square().sum().backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert gradient and all(g.isfinite().all() and g.any() for g in gradient.values())
    if "dropout" in case:
        return
    model.zero_grad()
    wanted = model(pixel_values=x).logits
    wanted.square().sum().backward()
    assert torch.allclose(found, wanted, atol=1e-5)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradient[key], parameter.grad, rtol=1e-3, atol=1e-4), key


def test_graph_follows_the_adapter(fresh_dynamo):
    """A compiled model sees other active adapters, disabling, new values and new adapters."""
    model = attach("deep", vit(torch.float32, num_hidden_layers=2)).eval()
    model.add_adapter("b", CONFIGS["shallow"]())
    x = images(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check() -> torch.Tensor:
        with torch.no_grad():
            found = compiled(pixel_values=x).logits
        assert torch.allclose(found, logits(model, x), atol=1e-5)
        return found

    first = check()
    model.set_adapter("b")
    assert not torch.allclose(check(), first, atol=1e-3)
    model.set_adapter("default")
    assert torch.allclose(check(), first, atol=1e-6)
    model.base_model.disable_adapter_layers()
    assert not torch.allclose(check(), first, atol=1e-3)
    model.base_model.enable_adapter_layers()
    randomize(model, 7, trainable_only=True)
    assert not torch.allclose(check(), first, atol=1e-3)


def test_compiled_with_checkpointing(fresh_dynamo):
    model = attach("deep", vit(torch.float32, num_hidden_layers=2))
    wanted = gradients(model, images(dtype=torch.float32))
    checkpoint(model, False)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    output = compiled(pixel_values=images(dtype=torch.float32)).logits
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, wanted[key], rtol=1e-3, atol=1e-4), key
