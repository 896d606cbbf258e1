"""What is said before a run: counts, memory and time, measured without a trace in the run itself."""

import pytest
import torch

from vpt_peft.tasks.classification import TASK
from vpt_peft.training.model import build_model, check_trainable, load_image_processor
from vpt_peft.training.report import SavedBytes, StepCost, describe_run, measure_step
from vpt_peft.training.trainer import VPTTrainer


pytest_plugins = ["training_fixtures"]


@pytest.fixture
def trainer_of(make_arguments):
    def make(method):
        arguments = make_arguments(method=method)
        rows = TASK.read(arguments.data)["train"]
        rows = rows.with_transform(TASK.transform(load_image_processor(arguments.model)))
        model = build_model(arguments.model, arguments.method, dict(enumerate("abcdefghij")))
        return VPTTrainer(
            method=arguments.method,
            model=model,
            args=arguments.training,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=TASK.collate,
            compute_metrics=TASK.compute_metrics(),
        )

    return make


@pytest.mark.parametrize("method", ["linear", "vpt", "full"])
def test_measuring_leaves_no_trace(trainer_of, method):
    trainer = trainer_of(method)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    random_state = torch.get_rng_state()
    cost = measure_step(trainer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert cost.images == 8 and cost.step_seconds > 0 and cost.load_seconds > 0


def test_activations_are_counted_once_and_parameters_never():
    weight = torch.nn.Parameter(torch.randn(5, 5))
    x = torch.randn(7, 5, requires_grad=True)
    with SavedBytes([weight]) as saved:
        # Keeps x (7 x 5), the product (7 x 5) for exp, and the weight, which is not counted
        hidden = (x @ weight).exp()
        (hidden * hidden).sum()
    assert saved.total == 2 * 7 * 5 * 4


def test_frozen_backbones_keep_less_for_the_backward_pass(trainer_of):
    linear, vpt, full = (measure_step(trainer_of(method)).activation_bytes for method in ("linear", "vpt", "full"))
    assert linear < 0.1 * vpt < 0.1 * full


def test_text_extrapolates_to_batch_and_epoch(trainer_of):
    trainer = trainer_of("vpt")
    counts = check_trainable(trainer.model, "vpt")
    text = describe_run(trainer, counts, StepCost(4, load_seconds=0.25, step_seconds=0.75, activation_bytes=10**9))
    assert f"Trains {counts.trainable:,} of {counts.total:,} parameters" in text
    assert f"{counts.prompts:,} of the method, {counts.head:,} of the head.\n" in text
    # 32 images keep 8 times what 4 keep; the weights are 0.1 MB
    assert "about 8,000 MB" in text
    # 96 images at a quarter of a second each
    assert "and 24 s per epoch of 96, without evaluation" in text
    # 3 batches in each epoch
    assert f"Its {round(3 * trainer.args.num_train_epochs)} steps may be too few" in text
    trainer.args.num_train_epochs = 40
    assert "too few" not in describe_run(trainer, counts, StepCost(4, 0.25, 0.75, 10**9))
