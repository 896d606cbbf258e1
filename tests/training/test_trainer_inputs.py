"""The recipe for anybody's own Trainer: the README's lines, and the same as the command's."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from PIL import Image
from run_page import blocks_of
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, set_seed

from vpt_peft import VPTConfig, training_recipe
from vpt_peft.embedded import embedded_path
from vpt_peft.methods import MethodOptions
from vpt_peft.methods.apply import apply_method
from vpt_peft.tasks.classification import TASK
from vpt_peft.training.arguments import VPTTrainingArguments
from vpt_peft.training.model import load_image_processor
from vpt_peft.training.optim import split_trainable
from vpt_peft.training.train import train
from vpt_peft.training.trainer_inputs import _START_IMAGES, _sample


pytest_plugins = ["training_fixtures"]
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def vit(tiny_vit):
    """A function that loads the tiny ViT with a head for ten digits."""
    return lambda: AutoModelForImageClassification.from_pretrained(
        tiny_vit, num_labels=10, ignore_mismatched_sizes=True
    )


@pytest.fixture
def splits(make_arguments):
    arguments = make_arguments()
    transform = TASK.transform(load_image_processor(arguments.model))
    return {name: rows.with_transform(transform) for name, rows in TASK.read(arguments.data).items()}


def rates_of(optimizer):
    return {(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups}


def test_the_lines_of_the_readme_train_well(monkeypatch, tmp_path):
    digits = load_digits()
    for index in range(120):
        path = tmp_path / "flowers" / "train" / str(digits.target[index]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(digits.images[index]).save(path)
    for auto_class in (AutoImageProcessor, AutoModelForImageClassification):
        load = auto_class.from_pretrained
        monkeypatch.setattr(
            auto_class, "from_pretrained", lambda name, load=load, **fields: load(embedded_path("embedded"), **fields)
        )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (code,) = [code for language, code, _ in blocks_of(README) if "Trainer(" in code]
    assert len(code.splitlines()) < 20
    namespace: dict = {}
    torch.manual_seed(0)
    exec(code, namespace)
    losses = [entry["eval_loss"] for entry in namespace["trainer"].state.log_history if "eval_loss" in entry]
    # Guessing has a loss of log(10) = 2.3; four steps an epoch
    assert max(losses) < math.log(10) and losses[-1] < 0.6 * math.log(10)
    assert (tmp_path / "my-prompts" / "adapter_model.safetensors").is_file()


def draw(pixels):
    return Image.fromarray((pixels * (255 / 16)).astype("uint8"))


@pytest.mark.parametrize("method", ["vpt", "vpt_shallow", "gated_vpt", "lora"])
def test_a_plain_trainer_ends_where_the_command_does(make_arguments, splits, vit, method, tmp_path):
    arguments = make_arguments(method=method)
    expected = train(arguments)
    set_seed(42)
    model = apply_method(vit(), method, MethodOptions())
    flags = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "disable_tqdm": True}
    recipe = training_recipe(model, splits["train"], splits["validation"], output_dir=tmp_path / "own", **flags)
    assert rates_of(recipe["optimizers"][0]) and not any(
        parameter.any() for name, parameter in split_trainable(model)["head"].items() if name.endswith("weight")
    )
    trainer = Trainer(**recipe)
    set_seed(42)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    assert found["eval_accuracy"] == expected["eval_accuracy"]


def test_flags_change_the_recipe(splits, vit, tmp_path):
    model = get_peft_model(vit(), VPTConfig())
    recipe = training_recipe(
        model,
        splits["train"],
        output_dir=tmp_path,
        num_train_epochs=3,
        prompt_learning_rate=0.5,
        head_learning_rate=0.25,
        head_weight_decay=0.125,
        optim="sgd",
    )
    (optimizer, scheduler), arguments = recipe["optimizers"], recipe["args"]
    assert type(optimizer) is torch.optim.SGD and scheduler is None
    assert rates_of(optimizer) == {("prompts", 0.5, 0.0), ("head", 0.25, 0.125), ("head", 0.25, 0.0)}
    assert arguments.num_train_epochs == 3 and arguments.lr_scheduler_type == "cosine"
    # Without data to evaluate on there is no best epoch
    assert arguments.eval_strategy == "no" and not arguments.load_best_model_at_end


def test_the_start(splits, vit, tmp_path):
    def state(**given):
        model = get_peft_model(base := vit(), VPTConfig())
        base.classifier.modules_to_save["default"].bias.data.fill_(given.pop("bias", 0.0))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        training_recipe(model, splits["train"], output_dir=tmp_path, **given)
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    prompts = {f"base_model.model.vpt_parameters.default.prompts.{index}" for index in range(3)}
    head = {"base_model.model.classifier.modules_to_save.default.weight"}
    changed = state()
    assert head < changed and len(changed - head) == len(prompts)
    assert not state(start=False)
    assert state(init_method="random") == head
    # A head that has learned stays
    assert not state(init_method="random", bias=0.1)


def test_prompts_that_are_no_tokens_start_at_random(splits, vit, tmp_path):
    model = get_peft_model(vit(), VPTConfig(projection_dim=8))
    assert training_recipe(model, splits["train"], output_dir=tmp_path)["optimizers"]


def test_a_large_data_set_is_sampled():
    assert _sample(range(_START_IMAGES), 0) == range(_START_IMAGES)
    sample = _sample(range(5000), 0)
    assert len(sample) == len(set(sample)) == _START_IMAGES and max(sample) > 4900
    assert list(sample) != list(_sample(range(5000), 1))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"num_virtual_tokens": 5}, TypeError, "num_virtual_tokens.*configuration, VPTConfig"),
        ({"learning_rat": 5}, TypeError, "learning_rat;"),
        ({"prompt_learning_rate": -1.0}, ValueError, "prompt_learning_rate=-1.0 must not be negative"),
        ({"train_dataset": []}, ValueError, "train_dataset is empty"),
        ({"config": IA3Config(target_modules=["q_proj"], feedforward_modules=[])}, ValueError, "IA3Config"),
        ({"config": None}, TypeError, "PeftModel, not ViTForImageClassification"),
    ],
)
def test_what_is_refused_changes_nothing(splits, vit, tmp_path, given, error, message):
    config = given.pop("config", VPTConfig())
    model = vit() if config is None else get_peft_model(vit(), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = given.pop("train_dataset", splits["train"])
    with pytest.raises(error, match=message):
        training_recipe(model, rows, output_dir=tmp_path, **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_boxes_over_several_processes_are_refused(splits, vit, tmp_path, monkeypatch):
    monkeypatch.setattr(VPTTrainingArguments, "world_size", property(lambda self: 2))
    model = get_peft_model(vit(), VPTConfig())
    boxes = [{"pixel_values": torch.zeros(3, 16, 16), "labels": {"boxes": torch.zeros(0, 4)}}]
    given = {"output_dir": str(tmp_path), "start": False}
    with pytest.raises(ValueError, match="task='object-detection': Trainer cannot gather the boxes"):
        training_recipe(model, boxes, boxes, task="object-detection", **given)
    training_recipe(model, boxes, task="object-detection", **given)
    training_recipe(model, splits["train"], splits["validation"], **given)


def test_importing_the_package_stays_light():
    code = (
        "import sys, vpt_peft; print([m for m in ('datasets', 'evaluate', 'sklearn', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
