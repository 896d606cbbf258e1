"""Heads of another number of labels than the model's, and the labels that go with them."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from accelerate import init_empty_weights
from composites import mask2former
from peft_fixtures import VIT, WIDTH, images, vit
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from vpt_peft.heads import (
    HeadWrapper,
    Labels,
    LabelSwitch,
    apply_labels,
    build_heads,
    fit_head,
    read_labels,
    wrap_heads,
)


BIRDS = Labels.from_names(dict(enumerate(("robin", "wren", "owl"))))


def fitted(model: nn.Module, num_labels: int, base: int | None, path: str = "classifier") -> HeadWrapper:
    built = build_heads(model, [path], num_labels, base)
    (wrapper,) = wrap_heads(model, [path], "task", active=True, inference_mode=False)
    if built:
        fit_head(wrapper, "task", built[path])
    return wrapper


class TwoLayers(nn.Module):
    """A head of which only the last layer depends on the labels."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config, self.num_labels, self.hidden = config, config.num_labels, nn.Linear(WIDTH, WIDTH)
        self.bins = nn.Parameter(torch.zeros(config.num_labels))
        self.masks = nn.Conv2d(WIDTH, config.num_labels + 1, 1)
        self.register_buffer("weights", torch.ones(config.num_labels))


class Own(PreTrainedModel):
    """A class of the user's own that draws its head's last layer around three."""

    config_class, main_input_name = ViTConfig, "pixel_values"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.head = TwoLayers(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, mean=3.0, std=0.01)
            nn.init.constant_(module.bias, -4.6)


def test_names_go_by_index_in_whatever_order_they_are_given():
    labels = Labels.from_names({2: "owl", 0: "robin", 1: "wren"})
    assert labels.id2label == BIRDS.id2label and labels.label2id == {"robin": 0, "wren": 1, "owl": 2}


def test_a_head_is_drawn_as_its_class_does():
    model = vit(torch.float32, initializer_range=0.5)
    weights = vars(model.classifier).copy()
    torch.manual_seed(0)
    head = fitted(model, 300, 5).modules_to_save["task"]
    assert head.weight.shape == (300, WIDTH) and head.out_features == 300
    assert 0.47 < head.weight.std() < 0.53 and abs(head.weight.mean()) < 0.02
    assert torch.equal(head.bias, torch.zeros(300))
    assert head.weight.requires_grad and head.weight.is_leaf
    assert vars(model.classifier.original_module).keys() == weights.keys()
    with torch.no_grad():
        logits = model(pixel_values=images(dtype=torch.float32)).logits
    assert logits.shape == (2, 300) and logits.isfinite().all()


def test_only_what_differs_is_drawn():
    model = Own(ViTConfig(**VIT))
    with torch.no_grad():
        model.head.hidden.weight.fill_(7.0)
    wrapper = fitted(model, 3, 5, "head")
    head = wrapper.modules_to_save["task"]
    assert torch.equal(head.hidden.weight, wrapper.original_module.hidden.weight)
    assert head.masks.weight.shape == (4, WIDTH, 1, 1) and head.masks.out_channels == 4 and head.num_labels == 3
    assert 2.9 < head.masks.weight.mean() < 3.1 and head.masks.weight.std() < 0.1
    assert torch.allclose(head.masks.bias, torch.full((4,), -4.6))
    assert head.weights.shape == (3,) and torch.equal(head.bins, torch.zeros(3))
    assert head.config.num_labels == 3 and model.config.num_labels == 5
    assert wrapper.original_module.masks.weight.shape[0] == 6 and wrapper.original_module.num_labels == 5


def test_equal_sizes_keep_the_copied_values():
    model = vit(torch.float32)
    expected = model.classifier.weight.clone()
    assert torch.equal(fitted(model, 5, 5).modules_to_save["task"].weight, expected)


def test_dtype_and_frozen_copies():
    model = vit(torch.bfloat16)
    built = build_heads(model, ["classifier"], 3, 5)
    (wrapper,) = wrap_heads(model, ["classifier"], "task", active=False, inference_mode=False)
    fit_head(wrapper, "task", built["classifier"])
    head = wrapper.modules_to_save["task"]
    assert head.weight.dtype == torch.bfloat16 and not head.weight.requires_grad


def test_two_sizes_beside_the_base():
    model, pixels = vit(torch.float32), images(dtype=torch.float32)
    for name, labels in (("birds", 3), ("cars", 7)):
        # Built while another adapter's labels may be in the configuration
        built = build_heads(model, ["classifier"], labels, 5)
        (wrapper,) = wrap_heads(model, ["classifier"], name, active=name == "birds", inference_mode=False)
        fit_head(wrapper, name, built["classifier"])
        model.config.num_labels = labels
    for name, width in (("birds", 3), ("cars", 7), ([], 5)):
        wrapper.set_adapter(name)
        assert model(pixel_values=pixels).logits.shape == (2, width)


@pytest.mark.parametrize("where", ["init_empty_weights", "meta base"])
def test_without_memory(where: str):
    if where == "meta base":
        with torch.device("meta"):
            model = ViTForImageClassification(ViTConfig(**VIT))
        assert fitted(model, 3, 5).modules_to_save["task"].weight.is_meta
        return
    model = vit(torch.float32)
    with init_empty_weights():
        head = fitted(model, 3, 5).modules_to_save["task"]
    assert not any(p.is_meta for p in head.parameters()) and head.weight.shape == (3, WIDTH)
    assert 0.0 < head.weight.std() < 0.1


def test_nothing_is_drawn_where_the_size_fits():
    model = vit(torch.float32)
    state = torch.get_rng_state()
    assert build_heads(model, ["classifier"], 5, 5) == {}
    assert torch.equal(state, torch.get_rng_state())


def own_head() -> nn.Module:
    model = vit(torch.float32)
    model.classifier = nn.Sequential(OrderedDict(hidden=nn.Linear(WIDTH, WIDTH), out=nn.Linear(WIDTH, 5)))
    return model


def wider_head() -> nn.Module:
    model = vit(torch.float32)
    model.classifier = nn.Linear(2 * WIDTH, 5)
    return model


class Unbuildable(Own):
    def __init__(self, config: ViTConfig, more: int) -> None:
        super().__init__(config)


@pytest.mark.parametrize(
    "make, paths, base, message",
    [
        (lambda: nn.Sequential(OrderedDict(head=nn.Linear(WIDTH, 5))), ["head"], None, "not a transformers model"),
        (own_head, ["classifier"], 5, "head classifier is not the one its class makes"),
        (wider_head, ["classifier"], 5, "head classifier is not the one its class makes"),
        (lambda: vit(torch.float32), [], 5, "no head of its own"),
        (lambda: vit(torch.float32), ["vit.layernorm"], 5, "classifier.bias, classifier.weight depends on them but"),
        (lambda: Unbuildable(ViTConfig(**VIT), 1), ["head"], 5, "cannot be built from its configuration alone"),
    ],
)
def test_heads_that_cannot_fit(make, paths: list[str], base: int | None, message: str):
    model = make()
    before = [(name, p.shape) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=f"id2label of 3 labels: .*{message}"):
        build_heads(model, paths, 3, base)
    assert [(name, p.shape) for name, p in model.named_parameters()] == before


def test_own_module_of_equal_size():
    model = nn.Sequential(OrderedDict(head=nn.Linear(WIDTH, 5)))
    assert build_heads(model, ["head"], 5, None) == {}


def test_labels_of_a_configuration():
    config = ViTConfig(**VIT)
    labels = read_labels(config)
    assert labels == Labels.from_names({index: f"LABEL_{index}" for index in range(5)})
    apply_labels(config, BIRDS)
    assert config.num_labels == 3 and config.id2label[2] == "owl" and config.label2id["wren"] == 1
    assert read_labels(config) == BIRDS
    assert read_labels(nn.Linear(1, 1)) is None
    assert Labels.from_names({0: "size"}).is_regression and not BIRDS.is_regression
    assert Labels.from_names({0: "a", 1: "b"}, "regression").is_regression


def loss(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=images(dtype=torch.float32), labels=labels).loss


def test_labels_follow_the_adapter():
    model = vit(torch.float32)
    base, switch = read_labels(model.config), LabelSwitch(model)
    wrapper = fitted(model, 3, 5)
    switch.add("task", BIRDS)
    switch.add("same")
    switch.use("task")
    assert model.config.id2label == BIRDS.id2label and model.num_labels == 3
    assert loss(model, torch.tensor([2, 1])).isfinite()
    assert model.config.problem_type == "single_label_classification"
    # What the loss took the labels for is the adapter's alone
    switch.use("same")
    assert read_labels(model.config) == base and model.num_labels == 5
    wrapper.set_adapter([])
    assert loss(model, torch.eye(5)[:2]).isfinite()
    assert model.config.problem_type == "multi_label_classification"
    switch.use("task")
    assert model.config.problem_type == "single_label_classification"
    assert switch.of("same").problem_type == "multi_label_classification"
    assert switch.of("task").problem_type == "single_label_classification"
    switch.use(None)
    assert read_labels(model.config) == base
    assert loss(model, torch.tensor([2, 1])).isfinite()
    switch.use("task")
    base = switch.of(None)
    assert base.problem_type == "single_label_classification"
    switch.remove("task")
    assert read_labels(model.config) == base and switch.active is None and "task" not in switch.of_adapters


def test_labels_of_a_model_without_any():
    switch = LabelSwitch(nn.Linear(1, 1))
    switch.add("task", BIRDS)
    switch.use("task")
    assert switch.of("task") == BIRDS and switch.of(None) is None


def test_losses_that_weigh_classes():
    model = mask2former()
    switch, before = LabelSwitch(model), copy.deepcopy(model.criterion.empty_weight)
    switch.add("task", Labels.from_names(dict.fromkeys(range(6), "x")))
    switch.use("task")
    assert model.criterion.num_labels == 6
    assert torch.equal(model.criterion.empty_weight, torch.tensor([1.0] * 6 + [float(before[-1])]))
    switch.use(None)
    assert torch.equal(model.criterion.empty_weight, before) and model.criterion.num_labels == 3
