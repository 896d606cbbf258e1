"""Training from stored features of frozen blocks: the same result, and features that are never mixed up."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from vpt_peft import VPTConfig
from vpt_peft.tasks.classification import TASK
from vpt_peft.training.feature_cache import CachedFeatures, FeatureCache
from vpt_peft.training.features import FEATURES, CachedForward, find_split_point
from vpt_peft.training.model import build_model, load_image_processor


pytest_plugins = ["training_fixtures"]
LATE = {"method": "vpt", "layers_to_transform": [1, 2]}


@pytest.fixture
def start(make_arguments):
    """Model and split_point of a method."""

    def do(**given):
        arguments = make_arguments(**given)
        torch.manual_seed(0)
        model = build_model(arguments.model, arguments.method, dict(enumerate("abcdefghij")))
        return model, find_split_point(model, arguments.method, arguments.data.augmentation)

    return do


@pytest.mark.parametrize(
    "given",
    [
        {"method": "linear"},
        {"method": "mlp"},
        {"method": "partial"},
        {"method": "partial", "partial_blocks": 2, "augmentation": "resize"},
        LATE,
        {**LATE, "layers_to_transform": [2], "prompt_dropout": 0.1, "gradient_accumulation_steps": 2},
        {**LATE, "pooling": "image_prompt"},
        {"method": "vpt_shallow", "layers_to_transform": [2]},
    ],
    ids=str,
)
def test_result_is_the_same_as_without(run, tmp_path, given):
    results = []
    # AdamW divides gradients by their size, and so makes rounding as large as its steps where they are close to zero
    given = {**given, "optim": "sgd", "learning_rate": 0.3, "num_train_epochs": 3}
    for flags in ({"cache_features": False}, {"feature_cache_dir": str(tmp_path / "cache")}):
        out = tmp_path / f"out{len(results)}"
        metrics, _ = run(output_dir=str(out), **given, **flags)
        (path,) = out.glob("*.safetensors")
        results.append((load_file(path), metrics))
    (plain, expected), (cached, found) = results
    assert plain.keys() == cached.keys()
    assert max((plain[name] - cached[name]).abs().max().item() for name in plain) <= 1e-6
    for name in ("train_loss", "eval_loss", "test_loss", "eval_accuracy", "test_accuracy"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    # One entry per split, and nothing half-written
    entries = list((tmp_path / "cache").iterdir())
    assert len(entries) == 3 and all({p.name for p in e.iterdir()} == {"features.npy", "key.json"} for e in entries)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "vpt"},
        {"method": "gated_vpt"},
        {"method": "bias"},
        {"method": "lora"},
        {"method": "adapter"},
        {"method": "full"},
        {"method": "sidetune"},
        {"method": "partial", "partial_blocks": 3},
        {"method": "vpt_shallow", "prompt_location": "pad", "num_virtual_tokens": 2},
        {"method": "linear", "augmentation": "resize_crop_flip"},
    ],
    ids=str,
)
def test_nothing_is_cached_where_features_change(start, given):
    assert start(**given)[1] is None


def test_what_a_trainable_parameter_lies_in_decides(start, make_arguments):
    model, split_point = start(method="partial")
    assert split_point.name == "block 2" and split_point.module is model.vit.layers[2]
    model.vit.layers[1].mlp.fc1.bias.requires_grad_(True)
    method = make_arguments(method="partial").method
    assert find_split_point(model, method, "none").name == "block 1"
    model.vit.embeddings.cls_token.requires_grad_(True)
    assert find_split_point(model, method, "none") is None


def test_biases_that_train_in_all_blocks_leave_nothing_to_cache(start, make_arguments):
    _, split_point = start(**LATE)
    assert split_point.name == "block 1"
    arguments = make_arguments(**LATE)
    base = build_model(make_arguments(method="full").model, make_arguments(method="full").method, {0: "a", 1: "b"})
    model = get_peft_model(base, VPTConfig(layers_to_transform=[1, 2], bias=["value"]))
    assert find_split_point(model, arguments.method, "none") is None


@pytest.mark.parametrize("flags", [{"cache_features": False}, {"gradient_checkpointing": True}], ids=str)
def test_features_are_left_out_where_asked_or_where_blocks_run_twice(run, tmp_path, flags):
    run(method="linear", feature_cache_dir=str(tmp_path / "cache"), **flags)
    assert not (tmp_path / "cache").exists()


def test_half_precision_starts_from_features_too(run, tmp_path):
    given = {"method": "linear", "bf16": True, "use_cpu": True}
    plain, _ = run(**given, cache_features=False)
    cached, _ = run(**given, feature_cache_dir=str(tmp_path / "cache"), overwrite_output_dir=True)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert cached["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-3)


def test_features_that_are_not_exact_are_not_used(run, tmp_path, monkeypatch, caplog):
    given = {"method": "linear", "feature_cache_dir": str(tmp_path / "cache")}
    expected, _ = run(**given, cache_features=False)
    take = CachedFeatures.__getitem__

    def wrong(self, index):
        example = take(self, index)
        return {**example, FEATURES: example[FEATURES] + 1}

    monkeypatch.setattr(CachedFeatures, "__getitem__", wrong)
    found, _ = run(**given, overwrite_output_dir=True)
    assert found["test_loss"] == expected["test_loss"] and "would not be exact" in caplog.text


@pytest.mark.parametrize(("given", "shape"), [({"method": "linear"}, (32,)), (LATE, (17, 32))], ids=str)
def test_features_are_the_inputs_of_the_cut(start, make_arguments, tmp_path, given, shape):
    model, split_point = start(**given)
    arguments = make_arguments(**given)
    split = TASK.read(arguments.data)["validation"]
    rows = split.with_transform(TASK.transform(load_image_processor(arguments.model)))
    stored = FeatureCache(model, split_point, {}, tmp_path, 10**9).store(split, rows, TASK)
    assert stored.features.shape == (50, *shape) and stored.features.dtype == np.float32
    assert isinstance(stored.features, np.memmap)
    images = TASK.collate([rows[index] for index in range(50)])
    with torch.no_grad():
        hidden = model.eval()(pixel_values=images["pixel_values"], output_hidden_states=True).hidden_states
    vit = (model.get_base_model() if "layers_to_transform" in given else model).vit
    expected = vit.layernorm(hidden[-1])[:, 0] if given["method"] == "linear" else hidden[1]
    assert torch.allclose(torch.from_numpy(np.array(stored.features)), expected, atol=1e-6)
    batch = TASK.collate([stored[index] for index in range(50)])
    assert torch.equal(batch["labels"], images["labels"])


def test_feed_skips_the_blocks_and_leaves_the_model_as_it_was(start):
    model, split_point = start(**LATE)
    base = model.get_base_model()
    images = torch.randn(2, 3, 16, 16)
    caught, runs = [], []
    base.vit.layers[1].register_forward_pre_hook(lambda module, args: caught.append(args[0]), prepend=True)
    base.vit.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
        with CachedForward(model, split_point, (3, 16, 16)) as forward:
            assert torch.equal(model(pixel_values=images).logits, expected)
            assert forward.is_exact(images, caught[0])
            ran = len(runs)
            assert torch.allclose(model(**{FEATURES: caught[0]}).logits, expected, atol=1e-6)
            assert len(runs) == ran
            assert torch.equal(model(pixel_values=images).logits, expected)
            assert not forward.is_exact(images, torch.randn_like(caught[0]))
        assert torch.equal(model(pixel_values=images).logits, expected)
        with pytest.raises((TypeError, AttributeError)):
            model(**{FEATURES: caught[0]})
    assert "forward" not in vars(base.vit.layers[0])


class Key:
    """Names of the entries that settings lead to."""

    def __init__(self, start, make_arguments, folder):
        self.start, self.make_arguments, self.folder = start, make_arguments, folder

    def __call__(self, change=None, preprocessing="p", autocast=None, **given):
        model, split_point = self.start(**{**LATE, **given})
        if change is not None:
            change(model)
        arguments = self.make_arguments(**{**LATE, **given})
        split = TASK.read(arguments.data)["validation"]
        rows = split.with_transform(TASK.transform(load_image_processor(arguments.model)))
        cache = FeatureCache(model, split_point, {"x": preprocessing}, self.folder, 10**9, autocast)
        before = set(self.folder.iterdir()) if self.folder.exists() else set()
        cache.store(split, rows, TASK)
        return len(set(self.folder.iterdir()) - before)


def test_entries_are_told_apart_by_all_they_depend_on(start, make_arguments, tmp_path):
    new_entries = Key(start, make_arguments, tmp_path / "cache")

    def nudge(model):
        model.get_base_model().vit.embeddings.cls_token.data[0, 0, 0] += 1e-3

    def other_epsilon(model):
        model.config.layer_norm_eps = 1e-5

    assert new_entries() == 1
    assert new_entries() == 0
    # What lies above the split_point does not matter
    assert new_entries(num_virtual_tokens=3) == 0
    assert new_entries(nudge) == 1
    assert new_entries(other_epsilon) == 1
    assert new_entries(preprocessing="q") == 1
    assert new_entries(autocast=torch.bfloat16) == 1
    assert new_entries(layers_to_transform=[2]) == 1
    assert new_entries(max_eval_samples=40) == 1
    assert new_entries(split_seed=3) == 1


def test_a_collision_is_an_error(run, tmp_path):
    given = {"method": "linear", "feature_cache_dir": str(tmp_path / "cache")}
    run(**given)
    for key in (tmp_path / "cache").glob("*/key.json"):
        key.write_text(json.dumps({"model": "another"}))
    with pytest.raises(OSError, match="belong to another run"):
        run(overwrite_output_dir=True, **given)


def test_what_does_not_fit_is_trained_from_images(run, tmp_path, monkeypatch, caplog):
    given = {"feature_cache_dir": str(tmp_path / "cache"), "overwrite_output_dir": True, **LATE}
    expected, _ = run(**given, cache_features=False)
    # 96 images of 17 x 32 float32 values are 209 kB
    found, _ = run(feature_cache_limit_gb=0.0002, **given)
    assert "need 0.000209 GB, and feature_cache_limit_gb allows 0.0002 GB" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    again, _ = run(**given)
    assert "1e-06 GB free" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []
    assert found["test_loss"] == again["test_loss"] == expected["test_loss"]


def test_the_features_used_longest_ago_make_room(start, make_arguments, tmp_path):
    model, split_point = start(**LATE)
    arguments = make_arguments(**LATE)
    split = TASK.read(arguments.data)["validation"]
    rows = split.with_transform(TASK.transform(load_image_processor(arguments.model)))

    def store(name):
        # One entry is 50 images of 17 x 32 float32 values and a key: two fit
        FeatureCache(model, split_point, {"x": name}, tmp_path, 250_000).store(split, rows, TASK)
        return {json.loads((entry / "key.json").read_text())["preprocessing"]["x"] for entry in tmp_path.iterdir()}

    for name, held in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
        time.sleep(0.02)
        assert store(name) == set(held)
