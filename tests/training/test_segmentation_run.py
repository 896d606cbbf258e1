"""Semantic segmentation from the command line: trained, measured, evaluated again, predicted and drawn."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_data import NAMES, write_folders
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vpt_peft.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation")
    write_folders(folder / "data", {"train": 12, "val": 5, "test": 3})
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    # Only a backbone of transformers takes UperNet
    Dinov2Model(Dinov2Config(**{**config.to_dict(), "model_type": "dinov2"})).save_pretrained(folder / "dinov2")
    for name in ("vit", "dinov2"):
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / name)
    return folder


def flags(place, out, *more):
    return [
        "--task", "semantic-segmentation", "--model_name_or_path", str(place / "vit"),
        "--dataset_name", str(place / "data"), "--cache_dir", str(place / "cache"), "--output_dir", str(out),
        "--per_device_train_batch_size", "6", "--per_device_eval_batch_size", "4", "--learning_rate", "1e-2",
        "--disable_tqdm", "True", *more,
    ]  # fmt: skip


SHORT = ("--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "False")


@pytest.fixture(scope="module")
def run(place):
    more = ["--augmentation", "resize_crop_flip", "--num_train_epochs", "12", "--num_virtual_tokens", "3"]
    assert main(["train", *flags(place, place / "out", *more)]) == 0
    return place / "out"


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_what_a_run_leaves(run):
    found = results(run)
    assert {"eval_mean_iou", "eval_mean_accuracy", "test_mean_iou", "test_pixel_accuracy", "test_loss"} <= set(found)
    assert found["test_samples"] == 3 and found["eval_samples"] == 5
    # Batch norm and a 1x1 convolution, beside three prompts in four blocks
    assert found["head_parameters"] == 2 * 16 + 16 * 3 + 3
    assert found["trainable_parameters"] - found["head_parameters"] == 4 * 3 * 16
    # Grey, black and white are told apart at once; the ground alone would give 0.2
    assert found["test_mean_iou"] > 0.5
    card = (run / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "| test | Mean IoU |" in card
    assert json.loads((run / "preprocessor_config.json").read_text())["size"] == {"height": 16, "width": 16}
    assert json.loads((run / "adapter_config.json").read_text())["id2label"] == {str(n): v for n, v in NAMES.items()}


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "vpt", "--decoder", "linear_4"],
        ["--method", "linear", "--decoder", "setr_pup"],
        ["--method", "full"],
        ["--method", "lora", "--augmentation", "resize"],
        ["--method", "vpt+bias", "--image_size", "20", "28"],
        ["--method", "vpt", "--decoder", "dpt"],
        ["--method", "vpt", "--decoder", "upernet"],
        ["--method", "linear", "--decoder", "upernet"],
    ],
    ids=lambda more: "-".join(part for part in more if not part.startswith("--")),
)
def test_evaluated_again_it_measures_the_same(place, more, tmp_path, capsys):
    if "upernet" in more:
        more = [*more, "--model_name_or_path", str(place / "dinov2")]
    assert main(["train", *flags(place, tmp_path / "out", *more, *SHORT)]) == 0
    capsys.readouterr()
    # Another number of windows in a batch than in training
    assert main(["evaluate", str(tmp_path / "out"), "--split", "validation", "--batch_size", "3"]) == 0
    again, before = json.loads(capsys.readouterr().out), results(tmp_path / "out")
    for name in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        assert again[name] == pytest.approx(before[f"eval_{name}"], abs=1e-6)
    assert again["samples"] == 5 and again["loss"] == pytest.approx(before["eval_loss"], rel=0.05)


def test_predicted_and_drawn(place, run, tmp_path, capsys):
    images, table = place / "data" / "test" / "images", tmp_path / "table.csv"
    assert (
        main(["predict", str(run), str(images), "--pictures", str(tmp_path / "p"), "--output_file", str(table)]) == 0
    )
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "image label score xmin ymin xmax ymax share area error".split()
    shares = [float(row["share"]) for row in rows if row["image"] == rows[0]["image"]]
    assert sum(shares) == pytest.approx(1, abs=1e-4) and shares == sorted(shares, reverse=True)
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["0.png", "1.png", "2.png"]
    with Image.open(tmp_path / "p" / "1.png") as picture:
        assert picture.size == (640, 480)
    capsys.readouterr()
    assert main(["predict", str(run), str(images / "0.png"), "--format", "coco"]) == 0
    coco = json.loads(capsys.readouterr().out)
    first = coco["annotations"][0]
    assert first["segmentation"]["size"] == [24, 32] and first["category_id"] in (1, 2, 3)
    assert sum(each["area"] for each in coco["annotations"]) == 24 * 32


def test_it_says_what_it_sees(place, run):
    """The three classes lie where they are in the picture."""
    from vpt_peft.tasks import get_task
    from vpt_peft.training.inference import load_adapter_model

    model, processor = load_adapter_model(run)
    image = Image.open(place / "data" / "test" / "images" / "0.png")
    mask = np.asarray(Image.open(place / "data" / "test" / "masks" / "0.png"))
    found = get_task("semantic-segmentation").probabilities(model, processor, image).argmax(0).numpy()
    counted = mask != 255
    assert (found == mask)[counted].mean() > 0.7


def test_what_makes_no_sense_is_refused(place, tmp_path, capsys):
    for more, message in (
        (["--method", "mlp"], "method='mlp' is for classifiers"),
        (["--decoder", "unet"], "decoder='unet' is not for task='semantic-segmentation'; choose one of linear,"),
        (["--decoder", "upernet"], "decoder='upernet' needs a backbone of transformers"),
        (["--image_size", "3", "16"], "image_size=[3, 16]: a patch has 4x4 pixels; give at least that."),
        (["--metric_for_best_model", "accuracy"], "choose one of mean_iou"),
    ):
        assert main(["train", *flags(place, tmp_path / "no", *more)]) != 0
        assert message in capsys.readouterr().err
    assert main(["train", "--task", "image-classification", "--decoder", "linear"]) != 0
    assert "decoder='linear' is not for task='image-classification'; drop it" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_cost_plot_and_export(place, run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    common = ["cost", "--model_name_or_path", str(place / "vit"), "--format", "json", "--num_labels", "3"]
    found = {}
    for decoder in ("linear", "linear_4"):
        capsys.readouterr()
        assert main([*common, "--task", "semantic-segmentation", "--decoder", decoder]) == 0
        rows = json.loads(capsys.readouterr().out)
        found[decoder] = {row["method"]: row["trainable_values"] for row in rows}
    assert "mlp" not in found["linear"] and "vpt+bias" in found["linear"]
    # The run's own numbers, with ten prompts in place of three
    assert found["linear"]["linear"] == results(run)["head_parameters"]
    assert found["linear"]["vpt"] - found["linear"]["linear"] == 4 * 10 * 16
    assert found["linear_4"]["linear"] == 4 * (2 * 16 + 16 * 3) + 3

    assert main(["plot", str(run), "--output_file", str(tmp_path / "curves.png")]) == 0
    assert main(["export", str(run), str(tmp_path / "model")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000 and list(tmp_path.glob("model*.onnx"))
