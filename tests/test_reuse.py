"""A name, a configuration or a backbone that is used again: what runs is what the configuration says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


PAIRS = {
    "pooling": (VPTConfig, {}, VPTConfig, {"pooling": "image"}),
    "location": (VPTConfig, {"num_virtual_tokens": 1}, VPTConfig, {"num_virtual_tokens": 1, "prompt_location": "add_shared"}),
    "propagate": (VPTConfig, {"deep": False}, VPTConfig, {"deep": False, "propagate": False}),
    "shared": (VPTConfig, {"deep": False}, VPTConfig, {"share_prompts": True}),
    "clamp": (GatedVPTConfig, {}, GatedVPTConfig, {"temperature_max": 0.6}),
    "number": (VPTConfig, {}, VPTConfig, {"num_virtual_tokens": 5}),
    "bias": (VPTConfig, {"bias": "all"}, VPTConfig, {"bias": ["norm"]}),
}  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images()).logits


def fail(*args, **kwargs) -> None:
    raise RuntimeError("on purpose")


def saved(folder: Path, cls: type, fields: dict, seed: int) -> torch.Tensor:
    model = get_peft_model(tiny_vit(), cls(**{"num_virtual_tokens": 3, **fields}))
    randomize(model, seed).save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("pair", PAIRS)
def test_backbone_used_again(pair: str, tmp_path: Path):
    first, first_fields, second, second_fields = PAIRS[pair]
    saved(tmp_path / "one", first, first_fields, 3)
    wanted = saved(tmp_path / "two", second, second_fields, 4)
    backbone = tiny_vit()
    PeftModel.from_pretrained(backbone, tmp_path / "one")
    assert torch.equal(logits(PeftModel.from_pretrained(backbone, tmp_path / "two")), wanted)


@pytest.mark.parametrize("pair", PAIRS)
def test_name_in_use_is_refused_for_another_configuration(pair: str, tmp_path: Path):
    first, first_fields, second, second_fields = PAIRS[pair]
    before = saved(tmp_path / "one", first, first_fields, 3)
    wanted = saved(tmp_path / "two", second, second_fields, 4)
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "one")
    with pytest.raises(ValueError, match="another configuration.*delete_adapter"):
        model.load_adapter(tmp_path / "two", "default")
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path / "two", "other")
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "two", "default")
    model.set_adapter("default")
    assert torch.equal(logits(model), wanted)


def test_a_refused_attach_puts_the_earlier_adapter_back(monkeypatch: pytest.MonkeyPatch):
    backbone = tiny_vit()
    model = randomize(get_peft_model(backbone, VPTConfig(num_virtual_tokens=3)))
    before, labels = logits(model), dict(backbone.config.id2label)
    from vpt_peft.tuners.vpt import model as module

    with monkeypatch.context() as patched:
        patched.setattr(module, "wrap_heads", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            get_peft_model(backbone, VPTConfig(num_virtual_tokens=5, id2label={0: "a", 1: "b"}))
    assert torch.equal(logits(model), before) and backbone.config.id2label == labels
    assert find_parameters(backbone).configs["default"].num_virtual_tokens == 3


def test_a_refused_first_attach_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    from vpt_peft.tuners.vpt import model as module

    backbone = tiny_vit()
    before, kinds = logits(backbone), [type(each) for each in backbone.modules()]

    with monkeypatch.context() as patched:
        patched.setattr(module, "fit_head", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            get_peft_model(backbone, VPTConfig(num_virtual_tokens=5, id2label={0: "a", 1: "b"}))
    assert [type(each) for each in backbone.modules()] == kinds and find_parameters(backbone) is None
    assert torch.equal(logits(backbone), before) and backbone.config.num_labels == 7
    get_peft_model(backbone, VPTConfig(num_virtual_tokens=5, id2label={0: "a", 1: "b"}))
    assert logits(backbone).shape == (3, 2)


def test_deleted_and_added_again_is_fresh():
    model = randomize(get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3)))
    model.add_adapter("other", VPTConfig(num_virtual_tokens=2))
    model.delete_adapter("other")
    config = VPTConfig(num_virtual_tokens=4, pooling="image")
    model.add_adapter("other", config)
    assert model.peft_config["other"] is config
    prompts = find_parameters(model).adapter("other").parts["prompts"]
    assert prompts["0"].shape == (4, 32)
    model.set_adapter("other")
    assert torch.equal(model.get_base_model().classifier.modules_to_save["other"].weight,
                       model.get_base_model().classifier.original_module.weight)  # fmt: skip


def test_the_configuration_is_the_one_given_and_may_serve_another_model(tmp_path: Path):
    config = VPTConfig(num_virtual_tokens=3)
    models = [get_peft_model(tiny_vit(num_labels=labels), config) for labels in (7, 4)]
    assert all(model.peft_config["default"] is config for model in models)
    for index, (model, labels) in enumerate(zip(models, (7, 4), strict=True)):
        model.save_pretrained(tmp_path / str(index))
        loaded = PeftModel.from_pretrained(tiny_vit(num_labels=3), tmp_path / str(index))
        assert len(loaded.peft_config["default"].id2label) == labels
        assert torch.equal(logits(loaded), logits(model)) and logits(loaded).shape == (3, labels)


def test_merged_values_do_not_outlive_what_they_were_made_of(tmp_path: Path):
    wanted = saved(tmp_path, VPTConfig, {}, 4)
    model = randomize(get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3)), 3)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-12)


def test_a_merged_adapter_trains():
    model = randomize(get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3)), 3)
    plain = copy.deepcopy(model)
    model.merge_adapter()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, plain)]
    for _ in range(2):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each.train()(pixel_values=images(), labels=torch.tensor([0, 1, 2])).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-12)
    prompts = find_parameters(model).adapter("default").parts["prompts"]
    assert all(prompts[key].grad.abs().max() > 0 for key in prompts)


@pytest.mark.parametrize(
    "fields", [{"pooling": "image"}, {"pooling": "image_prompt", "pool_before_norm": True}, {"bias": "all"}]
)
def test_a_norm_that_trains_keeps_its_prompts(fields: dict):
    """Copying a module with hooks for `modules_to_save` does not copy what the hooks belong to."""
    found = []
    for heads in (["classifier"], ["classifier", "vit.layernorm"]):
        model = get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3, modules_to_save=heads, **fields))
        for name, parameter in model.named_parameters():
            if "prompt_tuner" in name and "layernorm" != name.rsplit(".", 1)[-1]:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if "bias" in fields and len(heads) == 1:
            find_parameters(model).adapter("default").parts["biases"]["layernorm"].data.zero_()
        found.append(logits(model))
        assert torch.equal(logits(copy.deepcopy(model)), found[-1])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
