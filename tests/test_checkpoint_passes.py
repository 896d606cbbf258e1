"""Gradient checkpointing where blocks run again under other conditions than those of their pass.

Other adapters are active by then, adapters are disabled, or the backward pass runs in another thread. Each time the
gradients are those without checkpointing.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit
from torch import nn
from transformers import SwinConfig, SwinForImageClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.tuners.vpt.forward_pass import CheckpointedFunction, ForwardPass, begin_pass, current_pass, end_pass


KINDS: dict[str, Callable[..., VPTConfig]] = {
    "deep": lambda **given: VPTConfig(num_virtual_tokens=3, **given),
    "shallow": lambda **given: VPTConfig(num_virtual_tokens=3, deep=False, **given),
    "gated": lambda **given: GatedVPTConfig(num_virtual_tokens=3, gate_init=0.0, **given),
    "token": lambda **given: VPTConfig(num_virtual_tokens=3, implementation="token", **given),
    "pooled": lambda **given: VPTConfig(num_virtual_tokens=3, pooling="image_prompt", **given),
    "swin": lambda **given: VPTConfig(num_virtual_tokens=3, **given),
}
# Up to transformers 5.22 a block's hooks run inside its checkpoint
HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)
MAY_BE_REFUSED = ("shallow", "gated", "pooled")
Gradients = dict[str, torch.Tensor]
BESIDE = "beside"


def swin() -> SwinForImageClassification:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4, "num_labels": 7}
    config = SwinConfig(depths=[2, 1], num_heads=[2, 4], initializer_range=0.2, **sizes)
    return SwinForImageClassification(config).double().eval()


def attach(kind: str, **given: Any) -> PeftModel:
    """Adapters a and b of one kind with different prompts and heads, every parameter of both recorded by autograd."""
    base = swin() if kind == "swin" else tiny_vit(initializer_range=0.2)
    model = get_peft_model(base, KINDS[kind](**given), adapter_name="a")
    model.add_adapter("b", KINDS[kind](**given))
    return randomize(model).train()  # type: ignore[return-value]


def switch(model: PeftModel, name: str) -> None:
    """Switch as users do; PEFT freezes the others, and autograd would leave out what is frozen by the backward pass."""
    model.set_adapter(name)
    thaw(model)


def thaw(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "prompt_tuner" in name or "modules_to_save" in name:
            parameter.requires_grad_(True)


@contextmanager
def counted_blocks(model: nn.Module) -> Iterator[list[int]]:
    """A list with an item for each run of a block while the context lasts, those of `BESIDE` not counted."""
    runs: list[int] = []

    def count(*args: object) -> None:
        if threading.current_thread().name != BESIDE:
            runs.append(1)

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    norms = [m for layer in layers for n, m in layer.named_modules() if n == "layernorm_after"]
    handles = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def compare(kind: str, use_reentrant: bool, scenario: Callable[[PeftModel], None], **given: Any) -> None:
    """Gradients of `scenario` with checkpointing equal those without, and blocks did run again."""
    expected, plain = collect(attach(kind, **given), scenario)
    model = attach(kind, **given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()
    try:
        found, checkpointed = collect(model, scenario)
    except ValueError as error:
        assert kind in MAY_BE_REFUSED and use_reentrant and HOOKS_INSIDE and "use_reentrant" in str(error)
        return
    assert checkpointed > plain > 0
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-10), name


def collect(model: PeftModel, scenario: Callable[[PeftModel], None]) -> tuple[Gradients, int]:
    thaw(model)
    with counted_blocks(model) as runs:
        scenario(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("prompts" in name and gradient.abs().max() > 1e-6 for name, gradient in gradients.items())
    return gradients, len(runs)


def loss_of(model: PeftModel, batch: torch.Tensor) -> torch.Tensor:
    logits = model(pixel_values=batch).logits
    return (logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sum().sin()


def two_adapters(model: PeftModel) -> torch.Tensor:
    """Loss of adapter a plus loss of adapter b, on batches of different sizes."""
    switch(model, "a")
    first = loss_of(model, images(2, seed=1))
    switch(model, "b")
    return first + 2 * loss_of(model, images(3, seed=2))


def assert_both_have_gradients(model: PeftModel) -> None:
    for adapter in "ab":
        found = [p.grad for n, p in model.named_parameters() if f"prompts.{adapter}." in n and p.grad is not None]
        assert found and all(gradient.abs().max() > 1e-6 for gradient in found), adapter


reentrant_or_not = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@reentrant_or_not
def test_two_adapters_before_one_backward(kind: str, use_reentrant: bool):
    def scenario(model: PeftModel) -> None:
        two_adapters(model).backward()
        assert_both_have_gradients(model)

    compare(kind, use_reentrant, scenario)


@each_kind
@reentrant_or_not
def test_both_adapters_active_by_the_backward_pass(kind: str, use_reentrant: bool):
    def scenario(model: PeftModel) -> None:
        loss = two_adapters(model)
        model.base_model.set_adapter(["a", "b"])
        thaw(model)
        loss.backward()
        assert_both_have_gradients(model)

    # Only one head can be active
    compare(kind, use_reentrant, scenario, modules_to_save=[])


@each_kind
@reentrant_or_not
@pytest.mark.parametrize("adapters", [1, 2])
def test_backward_in_another_thread(kind: str, use_reentrant: bool, adapters: int):
    def scenario(model: PeftModel) -> None:
        loss = two_adapters(model) if adapters == 2 else loss_of(model, images())
        errors: list[Exception] = []

        def backward() -> None:
            try:
                loss.backward()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join(timeout=60)
        if errors:
            raise errors[0]

    compare(kind, use_reentrant, scenario)


@each_kind
@reentrant_or_not
def test_backward_beside_a_pass_in_another_thread(kind: str, use_reentrant: bool):
    """The other thread runs the other adapter again and again until the backward pass is done."""

    def scenario(model: PeftModel) -> None:
        switch(model, "a")
        loss = loss_of(model, images())
        switch(model, "b")
        done, errors, passes = threading.Event(), [], []

        def forward() -> None:
            try:
                while not done.is_set():
                    with torch.no_grad():
                        model(pixel_values=images(2, seed=4))
                    passes.append(1)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=forward, name=BESIDE)
        thread.start()
        while not passes and not errors:
            thread.join(timeout=1e-3)
        try:
            loss.backward()
        finally:
            done.set()
            thread.join(timeout=60)
        assert not errors

    compare(kind, use_reentrant, scenario)


@each_kind
@reentrant_or_not
def test_a_pass_of_the_base_before_the_backward_pass(kind: str, use_reentrant: bool):
    """As distillation from the base does: its logits enter the loss, without gradients."""

    def scenario(model: PeftModel) -> None:
        logits = model(pixel_values=images()).logits
        with model.disable_adapter(), torch.no_grad():
            base = model(pixel_values=images()).logits
        assert not torch.allclose(base, logits.detach())
        thaw(model)
        nn.functional.kl_div(logits.log_softmax(-1), base.softmax(-1)).backward()

    compare(kind, use_reentrant, scenario)


@each_kind
@reentrant_or_not
def test_backward_while_adapters_are_disabled(kind: str, use_reentrant: bool):
    def scenario(model: PeftModel) -> None:
        loss = loss_of(model, images())
        with model.disable_adapter():
            thaw(model)
            loss.backward()

    compare(kind, use_reentrant, scenario)


@each_kind
@reentrant_or_not
@pytest.mark.parametrize("first", ["adapter", "base"])
def test_gradients_of_base_and_adapter_in_one_loss(kind: str, use_reentrant: bool, first: str):
    """One of the two passes ran while adapters were disabled; the images have a gradient in both."""

    def scenario(model: PeftModel) -> None:
        pixels = images(2).requires_grad_(True)
        total = torch.zeros((), dtype=torch.float64)
        for name in ("adapter", "base") if first == "adapter" else ("base", "adapter"):
            with model.disable_adapter() if name == "base" else nullcontext():
                total = total + (1 if name == "adapter" else 3) * loss_of(model, pixels)
        thaw(model)
        total.backward()
        # Collected with the gradients of parameters, so that they are compared as well
        model.register_parameter("pixels", nn.Parameter(pixels.detach()))
        model.pixels.grad = pixels.grad  # type: ignore[union-attr]

    compare(kind, use_reentrant, scenario)


@pytest.mark.parametrize("kind", ["deep", "pooled"])
def test_passes_end_with_their_graph(kind: str, monkeypatch: pytest.MonkeyPatch):
    """What blocks keep to run again holds nothing that holds it: it is gone without the garbage collector."""
    kept: list[weakref.ref] = []
    snapshot = ForwardPass.for_another_run

    def noted(self: ForwardPass) -> ForwardPass:
        made = snapshot(self)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(ForwardPass, "for_another_run", noted)
    model = attach(kind)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gc.disable()
    try:
        loss = model(pixel_values=images()).logits.sum()
        assert kept and any(each() is not None for each in kept)
        del loss
        assert all(each() is None for each in kept)
    finally:
        gc.enable()


def test_every_run_of_a_block_begins_alike():
    """Where a block's hooks run inside its checkpoint, they write into the states that flow in."""
    owner: Any = object()
    flows_in, seen, runs = torch.zeros(1), [], []

    def block() -> None:
        here = current_pass(owner).block_pass(1)  # type: ignore[union-attr]
        seen.append(here.states["a"])
        here.states["a"] = torch.ones(1)

    begin_pass(ForwardPass(owner, [], states={"a": flows_in}))
    try:
        CheckpointedFunction(runs.append)(block)
    finally:
        end_pass(owner)
    for _ in range(2):
        runs[0]()
    assert len(seen) == 2 and all(state is flows_in for state in seen) and current_pass(owner) is None
