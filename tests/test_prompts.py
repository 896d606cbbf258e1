"""What prompts compute where the official codes give no numbers: each way against another way to the same."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit
from transformers import SwinConfig, SwinForImageClassification

from vpt_peft import VPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


def swin() -> SwinForImageClassification:
    """Two stages, of four windows and of one."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4, "num_labels": 7}
    config = SwinConfig(depths=[2, 1], num_heads=[2, 4], initializer_range=0.2, **sizes)
    return SwinForImageClassification(config).double().eval()


def shallow(count: int) -> VPTConfig:
    return VPTConfig(num_virtual_tokens=count, deep=False, modules_to_save=[])


def test_patches_are_projected_once():
    """At the first block's input, whether prompts are tokens in all blocks or keys and values."""
    outputs = []
    for implementation in ("kv", "token"):
        config = VPTConfig(num_virtual_tokens=3, project_patches=True, implementation=implementation)
        model = randomize(get_peft_model(tiny_vit(initializer_range=0.2), config)).eval()
        with torch.no_grad():
            outputs.append(model(pixel_values=images()).logits)
    assert torch.allclose(*outputs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("given, projected", [({"project_patches": True}, "0"), ({"projection_dim": 8}, "012")])
def test_prompts_that_are_projected(given: dict, projected: str):
    """Patches pass the projection at the first block alone, and so do the prompts beside them."""
    model = randomize(get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3, **given))).eval()
    adapter = find_parameters(model).adapter("default")  # type: ignore[union-attr]
    for key in "012":
        own = adapter.own_prompts(key)
        expected = adapter.parts["projection"](own) if key in projected else own
        assert torch.equal(adapter.prompts(key, 1)[0], expected)


@pytest.mark.parametrize("first, second", [(2, 3), (3, 2)])
def test_two_shallow_adapters_beside_windows(first: int, second: int):
    """They are one adapter with the prompts of both."""
    both = get_peft_model(swin(), shallow(first), adapter_name="a")
    both.add_adapter("b", shallow(second))
    both.base_model.set_adapter(["a", "b"])
    randomize(both)
    long = get_peft_model(swin(), shallow(first + second))
    prompts = find_parameters(both).vpt_prompts
    with torch.no_grad():
        find_parameters(long).vpt_prompts["default"]["0"].copy_(torch.cat([prompts[name]["0"] for name in "ab"]))
        found, expected = (model.eval()(pixel_values=images()).logits for model in (both, long))
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_images_do_not_mix_among_windows():
    """Prompts that flow on are the mean over the windows of their own image."""
    model: PeftModel = randomize(get_peft_model(swin(), shallow(3))).eval()  # type: ignore[assignment]
    batch = images()
    with torch.no_grad():
        together = model(pixel_values=batch).logits
        alone = torch.cat([model(pixel_values=image[None]).logits for image in batch])
    assert torch.allclose(together, alone, rtol=0, atol=1e-10)


def test_mixed_batch_over_windows():
    """Prompts of unequal number and biases, beside the masks of shifted windows: each image as if alone."""
    configs = {
        "long": VPTConfig(num_virtual_tokens=5, bias=["value"]),
        "short": VPTConfig(num_virtual_tokens=2),
        "moved": VPTConfig(num_virtual_tokens=2, bias=["mlp"]),
    }
    model = get_peft_model(swin(), configs["long"], adapter_name="long")
    for name in ("short", "moved"):
        model.add_adapter(name, configs[name])
    randomize(model).eval()
    names = ["short", "long", "moved", "long"]
    batch = images(len(names))
    with torch.no_grad():
        mixed = model(pixel_values=batch, adapter_names=names).logits
        for row, name in enumerate(names):
            model.set_adapter(name)
            alone = model(pixel_values=batch[row : row + 1]).logits
            assert torch.allclose(mixed[row : row + 1], alone, rtol=0, atol=1e-6), name


def test_a_model_that_runs_inside_another():
    """Each has its own call and forward pass; the outer ones go on with their adapter when the inner model is done."""
    inner, outer = (
        get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=count, deep=False), adapter_name="a")
        for count in (2, 3)
    )
    outer.add_adapter("b", VPTConfig(num_virtual_tokens=4, deep=False))
    randomize(inner).eval(), randomize(outer).eval()
    batch = images()
    with torch.no_grad():
        alone, expected = (model(pixel_values=batch).logits for model in (inner, outer))
        beside: list[torch.Tensor] = []

        def run_inner(*_: object) -> None:
            beside.append(inner(pixel_values=batch).logits)
            outer.set_adapter("b")

        handle = outer.get_base_model().vit.layers[0].mlp.register_forward_hook(run_inner)
        assert torch.equal(outer(pixel_values=batch).logits, expected)
        handle.remove()
        assert len(beside) == 1 and torch.equal(beside[0], alone)
        assert not torch.equal(outer(pixel_values=batch).logits, expected)
