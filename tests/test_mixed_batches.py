"""One batch with an adapter per image, and prompts merged into constant keys and values."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from small_models import images, randomize, tiny_vit

from vpt_peft import GatedVPTConfig, VPTConfig


KINDS = {
    "long": VPTConfig(num_virtual_tokens=5),
    "short": VPTConfig(num_virtual_tokens=2),
    "shallow": VPTConfig(num_virtual_tokens=4, deep=False),
    "pooled": VPTConfig(num_virtual_tokens=3, deep=False, pooling="image_prompt"),
    "pooled_before": VPTConfig(num_virtual_tokens=3, pooling="prompt", pool_before_norm=True),
    "class_type": VPTConfig(num_virtual_tokens=2, token_type="class"),
    "added": VPTConfig(prompt_location="add"),
    "strip": VPTConfig(prompt_location="prepend_pixel", num_virtual_tokens=2),
    "projected": VPTConfig(num_virtual_tokens=3, projection_dim=8),
    "patches": VPTConfig(num_virtual_tokens=3, project_patches=True),
    "last": VPTConfig(num_virtual_tokens=3, layers_to_transform=[2]),
    "as_tokens": VPTConfig(num_virtual_tokens=3, implementation="token"),
}


def several_tasks(kinds=KINDS, **fields):
    names = list(kinds)
    model = get_peft_model(tiny_vit(**fields), kinds[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, kinds[name])
    return randomize(model).double().eval()


def alone(model, name: str, batch: torch.Tensor) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(pixel_values=batch).logits
    model.set_adapter(name)
    return model(pixel_values=batch).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_image_as_if_alone(implementation):
    model = several_tasks(attn_implementation=implementation)
    names = [*KINDS, "__base__", *reversed(KINDS), "long"]
    batch = images(len(names))
    with torch.no_grad():
        together = model(pixel_values=batch, adapter_names=names).logits
        # Eager attention takes its softmax in float32 inside transformers.
        tolerance = 1e-12 if implementation == "sdpa" else 2e-6
        for row, name in enumerate(names):
            expected = alone(model, name, batch[row : row + 1])
            assert torch.allclose(together[row : row + 1], expected, atol=tolerance, rtol=0), name


def test_adapters_at_rest_are_not_walked_through(monkeypatch: pytest.MonkeyPatch):
    """A walk through the modules of a thousand of them would take longer than a small batch."""
    model = several_tasks()
    batch, names = images(2), ["long", "short"]
    expected = model(pixel_values=batch, adapter_names=names).logits
    classifier = model.base_model.model.classifier

    def fail(*args: object) -> None:
        raise AssertionError("walked through")

    for at_rest in (model.base_model.model.prompt_tuner.vpt_prompts["last"], classifier.modules_to_save["last"]):
        monkeypatch.setattr(at_rest, "named_modules", fail)
    with pytest.raises(AssertionError, match="walked through"):
        list(model.modules())
    assert torch.equal(model(pixel_values=batch, adapter_names=names).logits, expected)


def test_gated_adapters_share_a_batch():
    kinds = {
        "gated": GatedVPTConfig(num_virtual_tokens=4),
        "elementwise": GatedVPTConfig(num_virtual_tokens=2, gate="elementwise"),
        "mae": GatedVPTConfig(num_virtual_tokens=3, pooling="image_prompt", pool_before_norm=True),
        "cold": GatedVPTConfig(num_virtual_tokens=3, attention_temperature=False, num_gates=1),
    }
    model = several_tasks(kinds, attn_implementation="sdpa")
    names = ["mae", "gated", "__base__", "elementwise", "cold", "gated"]
    batch = images(len(names))
    with torch.no_grad():
        together = model(pixel_values=batch, adapter_names=names).logits
        for row, name in enumerate(names):
            expected = alone(model, name, batch[row : row + 1])
            assert torch.allclose(together[row : row + 1], expected, atol=1e-12, rtol=0), name


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["long", "nobody", "long"], ValueError, "nobody"),
        (["long", "long"], ValueError, "2 names for 3 images"),
        (["long"] * 4, ValueError, "4 names for 3 images"),
        ("long", TypeError, "list with one adapter name per image"),
        ([1, 2, 3], TypeError, "list with one adapter name per image"),
    ],
)
def test_bad_names(names, error, words):
    model = several_tasks({"long": KINDS["long"], "short": KINDS["short"]})
    before = model(pixel_values=images()).logits
    with pytest.raises(error, match=words):
        model(pixel_values=images(), adapter_names=names)
    assert torch.equal(model(pixel_values=images()).logits, before)


def test_mixed_batches_are_for_inference():
    model = several_tasks({"long": KINDS["long"]}).train()
    with pytest.raises(ValueError, match="eval"):
        model(pixel_values=images(), adapter_names=["long"] * 3)


def test_whole_image_prompts_are_refused():
    model = several_tasks({"long": KINDS["long"], "frame": VPTConfig(prompt_location="channel", num_virtual_tokens=1)})
    with pytest.raises(ValueError, match="frame"):
        model(pixel_values=images(), adapter_names=["long", "frame", "long"])


def test_state_is_restored_after_a_failure():
    model = several_tasks({"long": KINDS["long"], "short": KINDS["short"]})
    before = model(pixel_values=images()).logits
    with pytest.raises(ValueError, match="doesn't match model"):
        model(pixel_values=images()[..., :16], adapter_names=["long", "short", "long"])
    assert torch.equal(model(pixel_values=images()).logits, before)


@pytest.mark.parametrize("name", ["long", "projected", "patches", "last", "pooled_before"])
def test_merged_prompts_give_the_same_outputs(name):
    model = several_tasks({name: KINDS[name]}, attn_implementation="sdpa")
    with torch.no_grad():
        before = model(pixel_values=images()).logits
        model.merge_adapter()
        norms = []
        handle = model.base_model.model.vit.layers[-1].attention.k_proj.register_forward_hook(
            lambda module, args, output: norms.append(args[0].shape)
        )
        merged = model(pixel_values=images()).logits
        handle.remove()
        assert torch.allclose(merged, before, atol=1e-12, rtol=0)
        if KINDS[name].pooling is None:
            assert norms == [(3, 17, 32)]  # prompts no longer pass the key map
        model.unmerge_adapter()
        assert torch.equal(model(pixel_values=images()).logits, before)


def test_merge_errors_leave_the_state():
    model = several_tasks({"long": KINDS["long"], "shallow": KINDS["shallow"]})
    before = model(pixel_values=images()).logits
    with pytest.raises(ValueError, match="not an adapter"):
        model.merge_adapter(adapter_names=["long", "nobody"])
    with pytest.raises(ValueError, match="no deep prompts"):
        model.merge_adapter(adapter_names=["shallow"])
    model.merge_adapter(adapter_names=["long"])
    with pytest.raises(ValueError, match="merged already"):
        model.merge_adapter(adapter_names=["long"])
    with pytest.raises(ValueError, match="inputs, not changes of weights"):
        model.merge_and_unload()
    assert torch.allclose(model(pixel_values=images()).logits, before, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(pixel_values=images()).logits, before)


def test_safe_merge_refuses_broken_prompts():
    model = several_tasks({"long": KINDS["long"]})
    model.base_model.model.prompt_tuner.adapter("long").parts["prompts"]["1"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert not model.base_model.model.prompt_tuner.layers[0].merged_adapters


def test_merged_prompts_are_not_in_the_state_dict_and_are_deleted_with_their_adapter():
    model = several_tasks({"long": KINDS["long"], "short": KINDS["short"]})
    keys = set(model.state_dict())
    model.merge_adapter(adapter_names=["long", "short"])
    assert set(model.state_dict()) == keys
    model.unmerge_adapter()
    model.delete_adapter("short")
    assert all("short" not in layer.merged_keys for layer in model.base_model.model.prompt_tuner.layers)
