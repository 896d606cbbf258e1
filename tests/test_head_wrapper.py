"""One copy of a head for each adapter: which runs, which trains, and what PEFT does with it."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from peft_fixtures import WIDTH, images, vit
from torch import nn

from vpt_peft.active import Call, enter_call, leave_call
from vpt_peft.heads import HeadWrapper, Labels, LabelSwitch, unwrap_heads, wrap_heads


@contextmanager
def call(*names: str, per_image: tuple[str, ...] | None = None) -> Iterator[None]:
    enter_call(Call(names, per_image))
    try:
        yield
    finally:
        leave_call()


def linear(outputs: int, value: float, inputs: int = 4) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    return layer


def wrapper_of(**heads: nn.Module) -> HeadWrapper:
    """A wrapper around a head that gives zeros, with these copies; the first is active."""
    model = nn.Sequential(OrderedDict(head=linear(3, 0.0)))
    for index, name in enumerate(heads):
        wrap_heads(model, ["head"], name, active=index == 0, inference_mode=False)
    wrapper = model.head
    assert isinstance(wrapper, HeadWrapper)
    for name, head in heads.items():
        wrapper.modules_to_save[name] = head
    return wrapper


def first(output: torch.Tensor) -> list[float]:
    return output[:, 0].tolist()


def test_the_call_says_which_head_runs():
    wrapper, ones = wrapper_of(a=linear(3, 1.0), b=linear(3, 2.0)), torch.ones(2, 4)
    assert first(wrapper(ones)) == [4.0, 4.0]
    with call("b"):
        assert first(wrapper(ones)) == [8.0, 8.0]
        assert wrapper.weight[0, 0] == 2.0
        wrapper.enable_adapters(False)
        assert first(wrapper(ones)) == [8.0, 8.0]
    assert first(wrapper(ones)) == [0.0, 0.0]
    wrapper.enable_adapters(True)
    with call():
        assert first(wrapper(ones)) == [0.0, 0.0]
    with call("headless"):
        assert first(wrapper(ones)) == [0.0, 0.0]
    with call("headless", "b"):
        assert first(wrapper(ones)) == [8.0, 8.0]
    wrapper.set_adapter([])
    assert first(wrapper(ones)) == [0.0, 0.0]
    with call("a"):
        assert first(wrapper(ones)) == [4.0, 4.0]


def test_a_head_that_another_method_made_active_runs():
    wrapper = wrapper_of(a=linear(3, 1.0), b=linear(3, 2.0))
    wrapper.update("lora")
    wrapper.modules_to_save["lora"] = linear(3, 5.0)
    wrapper.set_adapter("lora")
    with call("a"):
        assert first(wrapper(torch.ones(1, 4))) == [20.0]


def test_mixed_batch_in_order():
    wrapper = wrapper_of(a=linear(3, 1.0), b=linear(3, 2.0))
    names = ("b", "__base__", "a", "b", "headless")
    with call("a", "b", per_image=names):
        rows = torch.arange(1.0, 6.0)[:, None].expand(-1, 4)
        assert first(wrapper(rows)) == [8.0, 0.0, 12.0, 32.0, 0.0]
        # Frames of a video are rows of their own
        frames = torch.arange(1.0, 11.0)[:, None].expand(-1, 4)
        assert first(wrapper(frames)) == [8.0, 16.0, 0.0, 0.0, 20.0, 24.0, 56.0, 64.0, 0.0, 0.0]
        with pytest.raises(ValueError, match="5 names, but Linear gets 6 rows"):
            wrapper(torch.ones(6, 4))
        with pytest.raises(ValueError, match="weight is read by the model itself"):
            _ = wrapper.weight
        assert wrapper.out_features == 3
    assert first(wrapper(rows[:2], adapter_names=["b", "__base__"])) == [8.0, 0.0]


def test_mixed_batch_of_unequal_widths():
    wrapper = wrapper_of(a=linear(5, 1.0), b=linear(2, 2.0))
    with call("a", "b", per_image=("b", "a", "__base__")):
        found = wrapper(torch.ones(3, 4))
        infinite = float("-inf")
        expected = [[8.0, 8.0] + [infinite] * 3, [4.0] * 5, [0.0] * 3 + [infinite] * 2]
        assert found.tolist() == expected
        with pytest.raises(ValueError, match=r"unequal size give \[\(7, 2\), \(7, 5\), \(7, 3\)\]"):
            wrapper(torch.ones(3, 7, 4))


@pytest.mark.parametrize(
    "heads, of_b, message",
    [
        ({"a": linear(5, 1.0), "b": linear(1, 2.0)}, None, "regression"),
        ({"a": linear(5, 1.0), "b": linear(2, 2.0)}, Labels.from_names({0: "x", 1: "y"}, "regression"), "regression"),
        ({"a": linear(5, 1.0), "b": linear(4, 2.0)}, Labels.from_names({0: "x", 1: "y"}), "not the labels' scores"),
    ],
)
def test_other_values_are_not_padded(heads, of_b: Labels | None, message: str):
    wrapper = wrapper_of(**heads)
    if of_b is not None:
        wrapper.labels = LabelSwitch(vit(num_labels=5))
        wrapper.labels.add("b", of_b)
    with call("a", "b", per_image=("b", "a")), pytest.raises(ValueError, match=message):
        wrapper(torch.ones(2, 4))


class Several(nn.Module):
    """A head that takes and returns nests of tensors."""

    def __init__(self, value: float, extra: bool = False) -> None:
        super().__init__()
        self.scale, self.extra = nn.Parameter(torch.tensor(value)), extra

    def forward(self, hidden: list[torch.Tensor], grid: int, bias: torch.Tensor | None = None):
        output = {"x": hidden[0] * self.scale, "y": [hidden[1] + self.scale], "grid": grid, "none": None}
        output["positions"] = torch.arange(3)
        return {**output, "extra": hidden[0]} if self.extra else output


def test_mixed_batch_through_any_module():
    wrapper = wrapper_of(a=Several(2.0), b=Several(3.0))
    hidden = [torch.arange(3.0)[:, None], torch.arange(3.0)]
    with call("a", "b", per_image=("b", "a", "b")):
        found = wrapper(hidden, grid=2)
    assert found["x"].flatten().tolist() == [0.0, 2.0, 6.0]
    assert found["y"][0].tolist() == [3.0, 3.0, 5.0]
    assert found["grid"] == 2 and found["none"] is None and found["positions"].tolist() == [0, 1, 2]
    wrapper.modules_to_save["b"] = Several(3.0, extra=True)
    with call("a", "b", per_image=("b", "a", "b")), pytest.raises(ValueError, match="return different things"):
        wrapper(hidden, grid=2)


def test_threads_do_not_see_each_other():
    wrapper = wrapper_of(a=linear(3, 1.0), b=linear(5, 2.0))
    wrong: list[object] = []
    before = sys.getswitchinterval()

    def work(names: tuple[str, ...], expected: list[float]) -> None:
        for _ in range(200):
            with call("a", "b", per_image=names):
                if first(wrapper(torch.ones(2, 4))) != expected:
                    wrong.append(names)
            with call(names[0]):
                if first(wrapper(torch.ones(1, 4))) != expected[:1]:
                    wrong.append(names[0])

    def switch() -> None:
        for _ in range(400):
            wrapper.set_adapter("b")
            wrapper.set_adapter("a")

    jobs = [(("a", "b"), [4.0, 8.0]), (("b", "a"), [8.0, 4.0]), (("b", "b"), [8.0, 8.0])]
    threads = [threading.Thread(target=work, args=job) for job in jobs] + [threading.Thread(target=switch)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


def test_which_copies_train():
    model = nn.Sequential(OrderedDict(head=linear(3, 0.0)))

    def training() -> dict[str, bool]:
        copies = {"original": model.head.original_module, **model.head.modules_to_save}
        return {name: copy.weight.requires_grad for name, copy in copies.items()}

    wrap_heads(model, ["head"], "a", active=True, inference_mode=False)
    assert training() == {"original": False, "a": True}
    wrap_heads(model, ["head"], "b", active=False, inference_mode=True)
    assert training() == {"original": False, "a": True, "b": False}
    model.head.set_adapter("b")
    assert training() == {"original": False, "a": False, "b": True}
    wrap_heads(model, ["head"], "c", active=False, inference_mode=False)
    assert training() == {"original": False, "a": False, "b": True, "c": False}
    model.head.set_adapter("a", inference_mode=True)
    wrap_heads(model, ["head"], "d", active=False, inference_mode=False)
    assert not any(training().values())
    wrap_heads(model, ["head"], "e", active=True, inference_mode=False)
    assert [name for name, trains in training().items() if trains] == ["e"]
    inactive = nn.Sequential(OrderedDict(head=linear(3, 0.0)))
    wrap_heads(inactive, ["head"], "a", active=False, inference_mode=False)
    assert not any(p.requires_grad for p in inactive.parameters())
    assert inactive.head.active_adapters == []


def test_one_head_in_several_places():
    shared = linear(3, 0.0)
    model = nn.ModuleDict({"first": shared, "list": nn.ModuleList([shared, shared])})
    wrap_heads(model, ["first"], "a", active=True, inference_mode=False)
    places = [model["first"], model["list"][0], model["list"][1]]
    assert all(place is places[0] for place in places) and isinstance(places[0], HeadWrapper)
    with torch.no_grad():
        places[0].modules_to_save["a"].weight.fill_(1.0)
    unwrap_heads(model)
    assert all(place.weight[0, 0] == 1.0 for place in (model["first"], model["list"][0], model["list"][1]))


def test_heads_in_one_another_are_refused():
    inner = nn.Sequential(OrderedDict(head=linear(3, 0.0)))
    model = nn.Sequential(OrderedDict(head=inner, other=linear(3, 0.0)))
    for paths in (["head", "head.head"], ["other", "head.head", "head"]):
        with pytest.raises(ValueError, match="head.head is in head.*name head alone"):
            wrap_heads(model, paths, "a", active=True, inference_mode=False)
        assert not any(isinstance(module, HeadWrapper) for module in model.modules())
    wrap_heads(model, ["head"], "a", active=True, inference_mode=False)
    with pytest.raises(ValueError, match="head.head is in head"):
        wrap_heads(model, ["head.head"], "b", active=False, inference_mode=False)


def lora(outputs_differ: bool = True) -> PeftModel:
    """A ViT under LoRA, PEFT's own method, with a head wrapped for its adapters "a" and "b"."""
    torch.manual_seed(0)
    model = get_peft_model(vit(torch.float32), LoraConfig(target_modules=["q_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    for index, name in enumerate(("a", "b")):
        wrap_heads(model, ["classifier"], name, active=index == 0, inference_mode=False)
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save[name].bias.fill_(index + 1.0 if outputs_differ else 0.0)
    return model.eval()


def test_peft_saves_and_loads():
    model, fresh = lora(), lora(outputs_differ=False)
    pixels = images(dtype=torch.float32)
    for name in ("a", "b"):
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert "base_model.model.classifier.bias" in state
        assert not any("original_module" in key for key in state)
        result = set_peft_model_state_dict(fresh, state, adapter_name=name)
        assert not result.unexpected_keys
        for each in (model, fresh):
            each.set_adapter(name)
        assert torch.equal(model(pixel_values=pixels).logits, fresh(pixel_values=pixels).logits)


def test_peft_switches_disables_and_deletes():
    model, pixels = lora(), images(dtype=torch.float32)
    base = vit(torch.float32)(pixel_values=pixels).logits
    bias = base - vit(torch.float32).classifier.bias
    head = model.base_model.model.classifier

    def logits() -> torch.Tensor:
        return model(pixel_values=pixels).logits.detach()

    assert torch.allclose(logits(), bias + 1.0, atol=1e-5)
    model.set_adapter("b")
    assert torch.allclose(logits(), bias + 2.0, atol=1e-5)
    assert [name for name, p in head.named_parameters() if p.requires_grad] == [
        "modules_to_save.b.weight", "modules_to_save.b.bias",
    ]  # fmt: skip
    with model.disable_adapter():
        assert torch.allclose(logits(), base, atol=1e-5)
    assert torch.allclose(logits(), bias + 2.0, atol=1e-5)
    model.delete_adapter("b")
    assert list(head.modules_to_save) == ["a"] and head.prompt_adapters == {"a"}
    assert torch.allclose(logits(), bias + 1.0, atol=1e-5)
    unloaded = model.unload()
    assert isinstance(unloaded.classifier, nn.Linear)
    assert torch.allclose(unloaded(pixel_values=pixels).logits, bias + 1.0, atol=1e-5)


def test_unwrap_to_the_original():
    model = lora()
    unwrap_heads(model, use_original=True)
    assert torch.equal(model.base_model.model.classifier.bias, vit(torch.float32).classifier.bias)


def test_a_head_of_another_method_is_taken_over():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    model = get_peft_model(vit(torch.float32), config, adapter_name="lora")
    head = model.base_model.model.classifier
    assert type(head) is ModulesToSaveWrapper
    wrap_heads(model, ["classifier"], "prompts", active=False, inference_mode=False)
    assert type(head) is HeadWrapper
    assert head.modules_to_save["lora"].weight.requires_grad
    assert list(head.modules_to_save) == ["lora", "prompts"] and head.active_adapters == ["lora"]


def test_copies_of_a_wrapper():
    wrapper, ones = wrapper_of(a=linear(3, 1.0), b=linear(3, 2.0)), torch.ones(1, 4)
    for copied in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        with torch.no_grad():
            copied.modules_to_save["b"].weight.fill_(3.0)
        with call("b"):
            assert first(copied(ones)) == [12.0] and first(wrapper(ones)) == [8.0]


def test_the_wrapper_compiles():
    wrapper = wrapper_of(a=linear(WIDTH, 1.0), b=linear(WIDTH, 2.0))
    compiled = torch.compile(wrapper, fullgraph=True, backend="eager")
    for name, expected in (("a", 4.0), ("b", 8.0)):
        with call(name):
            assert first(compiled(torch.ones(1, 4))) == [expected]
