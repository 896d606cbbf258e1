"""Parameter groups and the papers' presets."""

import pytest
import torch
from torch import nn

from vpt_peft.training.model import build_model
from vpt_peft.training.optim import parameter_groups, split_trainable
from vpt_peft.training.recipes import recipe_defaults
from vpt_peft.training.trainer import VPTTrainer


pytest_plugins = ["training_fixtures"]
LABELS = {0: "a", 1: "b", 2: "c"}


def build(arguments):
    return build_model(arguments.model, arguments.method, LABELS)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # name of group, learning rate, weight decay, number of values
        ("linear", {("head", 0.3, 0.2, 96), ("head", 0.3, 0.0, 3)}),
        ("lora", {("prompts", 0.4, 0.1, 3 * 4 * 8 * 32), ("head", 0.3, 0.2, 96), ("head", 0.3, 0.0, 3)}),
        ("vpt", {("prompts", 0.4, 0.1, 3 * 10 * 32), ("head", 0.3, 0.2, 96), ("head", 0.3, 0.0, 3)}),
        (
            "gated_vpt",
            # 2 gates and 3 temperatures are not decayed
            {("prompts", 0.4, 0.1, 320), ("prompts", 0.4, 0.0, 5), ("head", 0.3, 0.2, 96), ("head", 0.3, 0.0, 3)},
        ),
    ],
)
def test_groups_have_their_own_rates_and_decays(make_arguments, method, expected):
    of_prompts = {"prompt_learning_rate": 0.4, "prompt_weight_decay": 0.1} if method != "linear" else {}
    arguments = make_arguments(
        method=method,
        learning_rate=0.5,
        weight_decay=0.6,
        **of_prompts,
        head_learning_rate=0.3,
        head_weight_decay=0.2,
    )
    groups = parameter_groups(build(arguments), arguments.method, arguments.training)
    found = {(g["name"], g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups}
    assert found == expected


def test_groups_fall_back_to_the_common_rate(make_arguments):
    arguments = make_arguments(method="full", learning_rate=0.5, weight_decay=0.6)
    model = build(arguments)
    groups = parameter_groups(model, arguments.method, arguments.training)
    # The recipe's ratio: the head's rate is ten times that of the backbone
    assert {g["lr"] for g in groups} == {0.5, 5.0}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.6}
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    assert all((p.ndim < 2) == (g["weight_decay"] == 0) for g in groups for p in g["params"])


def test_head_and_rest_are_told_apart(make_arguments):
    arguments = make_arguments(method="bias")
    split = split_trainable(build(arguments))
    assert set(split["head"]) == {"classifier.weight", "classifier.bias"}
    assert split["rest"] and all(name.endswith("bias") for name in split["rest"]) and not split["prompts"]


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        # base rate 1 times images per step over 256
        ({"recipe": "vpt_paper"}, 128 / 256),
        ({"recipe": "vpt_paper", "num_virtual_tokens": 100}, 64 / 256),
        ({"recipe": "vpt_paper", "base_learning_rate": 10, "gradient_accumulation_steps": 3}, 10 * 3 * 128 / 256),
        ({"recipe": "vpt_paper", "learning_rate": 0.125}, 0.125),
        # raw, not scaled
        ({"recipe": "gpt_paper", "method": "gated_vpt", "num_virtual_tokens": 100}, 0.5),
    ],
)
def test_paper_rates(make_arguments, given, rate):
    arguments = make_arguments(per_device_train_batch_size=None, num_train_epochs=None, **given)
    assert arguments.training.learning_rate == pytest.approx(rate)
    assert arguments.training.num_train_epochs == 100
    assert arguments.training.get_warmup_steps(100) == 10
    assert arguments.training.lr_scheduler_type == "cosine"
    assert arguments.method.prompt_dropout == 0.1


def test_paper_optimizer_is_sgd_with_momentum(make_arguments):
    arguments = make_arguments(recipe="gpt_paper", method="linear")
    model = build(arguments)
    trainer = VPTTrainer(method=arguments.method, model=model, args=arguments.training, eval_dataset=[{}])
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert {(g["momentum"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups} == {(0.9, 0.0, 0.5)}


def test_recipe_adds_and_never_replaces():
    given = {"method": "vpt", "optim": "adafactor", "weight_decay": 0.5}
    added = recipe_defaults(given)
    assert not set(added) & set(given)
    assert added["prompt_weight_decay"] == 0.0 and added["prompt_learning_rate"] > 0


def test_groups_leave_frozen_parameters_out(make_arguments):
    arguments = make_arguments(method="partial", partial_blocks=2)
    model = build(arguments)
    grouped = {id(p) for g in parameter_groups(model, arguments.method, arguments.training) for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(isinstance(m, nn.Conv2d) and id(m.weight) in grouped for m in model.modules())
