"""The recipe search: its data, its backbone for small images, and how settings are ranked."""

import json

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from benchmarks import recipe_data
from benchmarks.recipe_data import resize_backbone
from benchmarks.recipe_search import ROWS, available_rows, main, rank_settings
from vpt_peft.reporting.results import read_results
from vpt_peft.training.arguments import parse_args


pytest_plugins = ["training_fixtures"]


def result(row, data, settings, score, seconds=36.0):
    return {
        "row": row,
        "data": data,
        "stage": "search",
        "settings": settings,
        "eval_accuracy": score,
        "total_seconds": seconds,
    }


def test_settings_are_ranked_within_method_and_data_set():
    # On "a" everything scores high, on "b" low; the second is best on one and near on the other, the third failed once
    found = rank_settings(
        pandas.DataFrame(
            [
                *(result("vpt", "a", {"lr": lr}, score) for lr, score in ((1, 0.90), (2, 0.95), (3, None))),
                *(result("vpt", "b", {"lr": lr}, score) for lr, score in ((1, 0.10), (2, 0.30), (3, 0.40))),
                *(result("linear", data, {}, 0.2) for data in "ab"),
            ]
        ),
        "eval_accuracy",
    ).set_index("setting")
    assert list(found["row"]) == ["linear", "vpt", "vpt", "vpt"] and list(found.index)[:2] == ["default", "lr=2"]
    assert found["mean_rank"].to_dict() == {"default": 1.0, "lr=2": 1.5, "lr=3": 2.0, "lr=1": 2.5}
    assert found.loc["lr=1", "below_best"] == pytest.approx((0.05 + 0.3) / 2)
    assert found.loc["lr=2", "score"] == pytest.approx(0.625) and found.loc["lr=2", "hours"] == pytest.approx(0.02)
    assert found.loc["lr=3", "sets"] == 2


def test_rows_of_methods_and_flags_that_are_there():
    rows = available_rows()
    assert {"linear", "bias", "lora", "adapter", "partial", "full", "vpt_shallow", "vpt", "gated_vpt"} <= rows.keys()
    assert rows.keys() <= ROWS.keys()
    for row in rows.values():
        parse_args(row)


def test_a_backbone_for_smaller_images_is_the_same_where_its_positions_agree(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    model = ViTForImageClassification(config)
    # Positions that rise evenly from left to right do so on any grid
    ramp = torch.linspace(0, 1, 4).repeat(4).reshape(1, 16, 1).expand(-1, -1, 16)
    model.vit.embeddings.position_embeddings.data[:, 1:] = ramp
    model.save_pretrained(tmp_path / "large")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "large")
    resize_backbone(tmp_path / "large", tmp_path / "small", 16)
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    positions = small.vit.embeddings.position_embeddings.detach()
    assert positions.shape == (1, 5, 16) and torch.equal(positions[0, 1], positions[0, 3])
    assert 0.1 < positions[0, 1, 0] < 0.25
    assert torch.allclose(positions[0, 1] + positions[0, 2], torch.ones(16))
    assert torch.equal(positions[:, :1], model.vit.embeddings.position_embeddings[:, :1])
    assert torch.equal(small.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "small")
    assert processor(images=Image.new("RGB", (40, 40)), return_tensors="pt")["pixel_values"].shape[2:] == (16, 16)


def nuclei(centres):
    """A picture with a nucleus of 3 x 3 pixels at each place; instances are not numbered without gaps."""
    instances = np.zeros((256, 256), np.uint16)
    for number, (row, column) in enumerate(centres):
        instances[row - 1 : row + 2, column - 1 : column + 2] = 2 * number + 1
    return {"image": Image.fromarray((instances > 0).astype(np.uint8) * 255), "instances": Image.fromarray(instances)}


def test_counts_are_of_the_nuclei_with_their_centre_inside():
    # Five in the upper left square; the last has its centre just outside of it
    row = nuclei([(10, 10), (20, 40), (30, 90), (60, 60), (100, 127), (100, 128)])
    found = [(name, np.asarray(image).max() > 0) for image, name in recipe_data._counts([row], None)]
    assert len(found) == 9 and found[0] == ("4-6", True)
    # Columns 64 to 191: (30, 90), (100, 127), (100, 128); columns 128 to 255: the last alone
    assert [name for name, _ in found[1:3]] == ["2-3", "0-1"] and found[8] == ("0-1", False)


def test_patches_are_of_one_class_for_the_most_part(tmp_path):
    (tmp_path / "datasets" / "camvid").mkdir(parents=True)
    (tmp_path / "datasets" / "camvid" / "id2label.json").write_text(json.dumps({"0": "sky", "1": "road"}))
    labels = np.zeros((80, 40), np.uint8)
    labels[32:] = 1
    labels[72:, :] = 255
    image = Image.fromarray(np.stack([labels] * 3, axis=-1))
    found = list(recipe_data._patches([{"image": image, "annotation": Image.fromarray(labels)}], tmp_path))
    # Rows 0-39 are sky by 80 %, 20-59 road by 70 %, 40-79 road by 80 %
    assert [name for _, name in found] == ["sky", "road", "road"] and found[1][0].size == (40, 40)


def test_rare_classes_are_left_out_of_every_split(tmp_path):
    pictures = {
        name: [Image.new("L", (4, 4), value) for value in range(count)] for name, count in (("a", 9), ("b", 2))
    }
    recipe_data._write(pictures, ["a", "c"], tmp_path / "x.parquet", 5)
    (split,) = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "x.parquet"), cache_dir=str(tmp_path)
    ).values()
    assert split["label"][:] == [0] * 5 and split.features["label"].names == ["a", "c"]
    assert len({image.getpixel((0, 0)) for image in split["image"]}) == 5


def test_the_search_gives_every_data_set_the_same_settings(tmp_path, monkeypatch, tiny_vit):
    data, backbones = {"digits": "digits"}, {"supervised": tiny_vit, "mae": tiny_vit}
    monkeypatch.setattr("benchmarks.recipe_search._IMAGES", {"max_train_samples": 40, "max_eval_samples": 20})
    monkeypatch.setattr("benchmarks.recipe_search.prepare", lambda *_: (data, backbones))
    monkeypatch.setattr("benchmarks.recipe_search.ROWS", {"linear": {"method": "linear"}})
    flags = ["--output_dir", str(tmp_path), "--num_trials", "2", "--epochs", "1", "2"]
    main(flags)
    found = read_results(tmp_path / "comparison")
    assert len(found) == 4 and set(found["stage"]) == {"search"} and set(found["seed"]) == {0}
    assert all(settings == {} or settings["num_train_epochs"] in (1, 2) for settings in found["settings"])
    tried = found.groupby("data")["settings"].agg(lambda each: sorted(map(str, each)))
    assert sorted(tried.index) == ["digits-mae", "digits-supervised"]
    assert all(each == tried.iloc[0] for each in tried)
