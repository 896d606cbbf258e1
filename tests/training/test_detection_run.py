"""Object detection from the command line: trained, measured, evaluated again, predicted and drawn."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vpt_peft.cli.main import main
from vpt_peft.data.images import DataError
from vpt_peft.tasks import get_task, task_names
from vpt_peft.training.arguments import parse_args


CATEGORIES = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]


def write_data(folder):
    """COCO splits of grey pictures with squares in them, darker or brighter."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 5), ("test", 3)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            pixels = np.full((48, 64, 3), 128, np.uint8)
            for kind in (1, 2):
                x, y = int(draws.integers(0, 16)) + 32 * (kind - 1), int(draws.integers(0, 30))
                pixels[y : y + 16, x : x + 16] = 255 if kind == 2 else 0
                annotations.append(
                    {"id": len(annotations), "image_id": number, "category_id": kind, "bbox": [x, y, 16, 16]}
                )
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png"})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    write_data(folder / "data")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return folder


def flags(place, out, *more):
    return [
        "--task", "object-detection", "--model_name_or_path", str(place / "vit"), "--dataset_name", str(place / "data"),
        "--cache_dir", str(place / "cache"), "--image_size", "48", "64", "--output_dir", str(out),
        "--per_device_train_batch_size", "6", "--per_device_eval_batch_size", "3", "--learning_rate", "3e-3",
        "--augmentation", "resize_crop_flip", "--disable_tqdm", "True", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(place):
    assert main(["train", *flags(place, place / "out", "--num_train_epochs", "2", "--num_virtual_tokens", "3")]) == 0
    return place / "out"


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_what_a_run_leaves(run):
    found = results(run)
    assert {"eval_map", "eval_map_50", "eval_map_75", "eval_map_small", "test_map", "test_loss"} <= set(found)
    assert found["head_parameters"] > 500_000 and found["test_samples"] == 3
    assert found["trainable_parameters"] - found["head_parameters"] == 2 * 3 * 16
    card = (run / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "| test | Mean average precision (IoU 0.50) |" in card
    assert json.loads((run / "preprocessor_config.json").read_text())["size"] == {"height": 48, "width": 64}
    assert json.loads((run / "adapter_config.json").read_text())["id2label"] == {"0": "dark", "1": "bright"}


@pytest.mark.parametrize("method", ["vpt", "linear", "full", "lora", "vpt+lora"])
def test_evaluated_again_it_measures_the_same(place, run, method, tmp_path, capsys):
    folder = run
    if method != "vpt":
        folder = tmp_path / method
        more = ["--method", method, "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
        assert main(["train", *flags(place, folder, *more, "--load_best_model_at_end", "False")]) == 0
    capsys.readouterr()
    # Another number of images in the last batch than in training
    assert main(["evaluate", str(folder), "--split", "validation", "--batch_size", "2"]) == 0
    again, before = json.loads(capsys.readouterr().out), results(folder)
    assert again["map_50"] == pytest.approx(before["eval_map_50"], abs=1e-6)
    assert again["mar_100"] == pytest.approx(before["eval_mar_100"], abs=1e-6)
    assert again["samples"] == 5


def test_predicted_and_drawn(place, run, tmp_path, capsys):
    images, table = place / "data" / "test", tmp_path / "table.csv"
    broken = tmp_path / "0.png"
    broken.write_bytes(b"none")
    common = [str(run), str(images), str(images / "0.png"), str(broken), "--threshold", "0.02"]
    drawn = ["--pictures", str(tmp_path / "drawn")]
    assert main(["predict", *common, *drawn, "--output_file", str(table)]) == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "score", "xmin", "ymin", "xmax", "ymax", "error"]
    assert len([row for row in rows if row["label"]]) > 5 and "cannot be read" in rows[-1]["error"]
    assert {row["label"] for row in rows} <= {"dark", "bright", ""}
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0-2.png", "0.png", "1.png", "2.png"]
    with Image.open(tmp_path / "drawn" / "1.png") as picture:
        assert picture.size == (640, 480)

    capsys.readouterr()
    assert main(["predict", *common, "--format", "coco"]) == 0
    coco = json.loads(capsys.readouterr().out)
    assert coco["categories"] == [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
    assert [image["width"] for image in coco["images"]] == [64] * 4
    assert len(coco["annotations"]) == len([row for row in rows if row["label"]])
    first = coco["annotations"][0]
    assert first["bbox"][2] == pytest.approx(float(rows[0]["xmax"]) - float(rows[0]["xmin"]), abs=1e-4)

    # Nothing is found above the threshold, and that is no failure
    assert main(["predict", str(run), str(images), "--threshold", "1.0", "--format", "json"]) == 0
    assert all(row["predictions"] == [] for row in json.loads(capsys.readouterr().out))


def test_what_makes_no_sense_is_refused(place, tmp_path, capsys):
    assert task_names()[:1] == ("image-classification",) and "object-detection" in task_names()
    for more, message in (
        (["--method", "mlp"], "method='mlp' is for classifiers"),
        (["--image_size", "0", "5"], "image_size=[0, 5]"),
        (["--image_size", "48", "4"], "image_size=[48, 4]: a patch has 8x8 pixels; give at least that."),
    ):
        assert main(["train", *flags(place, tmp_path / "no", *more)]) != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    arguments = parse_args(["--task", "object-detection"])
    assert arguments.training.metric_for_best_model == "map"
    with pytest.raises(DataError, match="image_size"):
        get_task().prepare_processor(None, parse_args(["--image_size", "5", "5"]).data)
