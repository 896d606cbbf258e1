"""torch.func on prompted models: functional_call with other values, and per-sample gradients by vmap of grad."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from vpt_peft import GatedVPTConfig, VPTConfig


KINDS: dict[str, Callable[[], VPTConfig]] = {
    "deep": lambda: VPTConfig(num_virtual_tokens=3),
    "shallow": lambda: VPTConfig(num_virtual_tokens=3, deep=False),
    "gated": lambda: GatedVPTConfig(num_virtual_tokens=3, gate_init=0.0),
    "gated_elementwise": lambda: GatedVPTConfig(num_virtual_tokens=3, gate="elementwise", gate_init=0.0),
    "projection_dim": lambda: VPTConfig(num_virtual_tokens=3, projection_dim=8),
    "shared": lambda: VPTConfig(num_virtual_tokens=3, share_prompts=True),
    "pooled": lambda: VPTConfig(num_virtual_tokens=3, pooling="image_prompt"),
    "token": lambda: VPTConfig(num_virtual_tokens=3, implementation="token"),
    "prepend_pixel": lambda: VPTConfig(num_virtual_tokens=2, prompt_location="prepend_pixel"),
}
LABELS = torch.tensor([0, 1, 2])


def attach(kind: str, **given) -> PeftModel:
    return randomize(get_peft_model(tiny_vit(**given), KINDS[kind]())).eval()  # type: ignore[return-value]


def split(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Detached parameters by name: those that train, and the frozen ones."""
    parameters = list(model.named_parameters())
    return (
        {name: p.detach() for name, p in parameters if p.requires_grad},
        {name: p.detach() for name, p in parameters if not p.requires_grad},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_computes_with_the_given_values(kind: str):
    """All of them: each parameter that trains is exchanged by itself and changes the logits."""
    model, other = attach(kind), randomize(attach(kind), seed=5)
    with torch.no_grad():
        before = model(pixel_values=images()).logits
        expected = other(pixel_values=images()).logits
        given, _ = split(other)
        found = functional_call(model, given, (), {"pixel_values": images()}).logits
        assert torch.equal(found, expected)
        for name, value in given.items():
            assert not torch.equal(
                functional_call(model, {name: value}, (), {"pixel_values": images()}).logits, before
            )
        assert torch.equal(model(pixel_values=images()).logits, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_of_per_sample_gradients(kind: str, implementation: str):
    model = attach(kind, attn_implementation=implementation)
    trained, frozen = split(model)

    def loss(values: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, {**values, **frozen}, (), {"pixel_values": image[None]}).logits
        return torch.nn.functional.cross_entropy(logits, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(trained, images(), LABELS)
    model.zero_grad()
    logits = model(pixel_values=images()).logits
    torch.nn.functional.cross_entropy(logits, LABELS).backward()
    ordinary = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(each) == set(ordinary) and any("prompt" in name for name in each)
    for name, gradient in ordinary.items():
        assert each[name].shape == (3, *gradient.shape) and gradient.abs().max() > 0, name
        assert not torch.allclose(each[name][0], each[name][1]), name
        assert (each[name].mean(0) - gradient).abs().max() < 1e-6, name


def test_one_gradient_step_of_meta_learning():
    """The gradient through a step on the prompts, against central differences."""
    model = attach("deep")
    trained, frozen = split(model)
    name = next(name for name in trained if "prompt" in name)

    def loss(prompts: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, {**trained, **frozen, name: prompts}, (), {"pixel_values": images()}).logits
        return torch.nn.functional.cross_entropy(logits, LABELS)

    def after_a_step(prompts: torch.Tensor) -> torch.Tensor:
        return loss(prompts - 0.5 * grad(loss)(prompts))

    start, step = trained[name], torch.zeros_like(trained[name])
    step.view(-1)[0] = 1e-4
    # The fused kernels have no second derivative, and eager attention rounds to float32
    with sdpa_kernel(SDPBackend.MATH):
        difference = (after_a_step(start + step) - after_a_step(start - step)) / 2e-4
        found = grad(after_a_step)(start).reshape(-1)[0]
    assert found.abs() > 1e-8 and torch.allclose(found, difference, rtol=1e-3, atol=1e-10)
