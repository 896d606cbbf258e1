"""Instance segmentation from the command line, on a plain ViT that becomes an EoMT."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vpt_peft.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Grey pictures of 32x24 pixels with two bright squares each, whose id masks have 16 bits."""
    folder, draws = tmp_path_factory.mktemp("instances"), np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "instances": datasets.Image()})
    (folder / "data").mkdir()
    for split, count in (("train", 8), ("validation", 3), ("test", 3)):
        images, masks = [], []
        for _ in range(count):
            pixels, ids = np.full((24, 32, 3), 100, np.uint8), np.zeros((24, 32), np.uint16)
            for number, left in ((1, 0), (300, 16)):
                x, y = left + int(draws.integers(0, 8)), int(draws.integers(0, 16))
                pixels[y : y + 8, x : x + 8], ids[y : y + 8, x : x + 8] = 255, number
            images.append(Image.fromarray(pixels))
            masks.append(Image.fromarray(ids))
        columns = {"image": images, "instances": masks}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return folder


def train(place, out, *more):
    """Train on data whose column says that it is for instances."""
    return main(
        [
            "train",
            "--model_name_or_path",
            str(place / "vit"),
            "--dataset_name",
            str(place / "data"),
            "--cache_dir",
            str(place / "cache"),
            "--output_dir",
            str(out),
            "--max_steps",
            "2",
            "--per_device_train_batch_size",
            "4",
            "--per_device_eval_batch_size",
            "2",
            "--learning_rate",
            "1e-3",
            "--image_size",
            "48",
            "48",
            "--disable_tqdm",
            "True",
            *more,
        ]  # fmt: skip
    )


@pytest.mark.parametrize("method", ["vpt", "linear", "full"])
def test_trained_evaluated_predicted(place, tmp_path, capsys, method):
    out = tmp_path / "out"
    assert train(place, out, "--method", method) == 0
    results = json.loads((out / "all_results.json").read_text())
    assert 0 <= results["eval_map"] <= results["eval_map_50"] <= 1 and results["test_samples"] == 3
    names = {"vpt": "adapter_model", "linear": "vpt_peft_baseline", "full": "model"}
    assert (out / f"{names[method]}.safetensors").is_file()
    capsys.readouterr()
    assert main(["evaluate", str(out), "--split", "validation", "--batch_size", "3"]) == 0
    again = json.loads(capsys.readouterr().out)
    for name in ("map", "map_50", "mar_100"):
        assert again[name] == pytest.approx(results[f"eval_{name}"], abs=1e-6)

    Image.new("RGB", (40, 20), "white").save(tmp_path / "a.png")
    drawn = ["--pictures", str(tmp_path / "drawn"), "--threshold", "0.0", "--format", "coco"]
    assert main(["predict", str(out), str(tmp_path / "a.png"), *drawn]) == 0
    coco = json.loads(capsys.readouterr().out)
    assert coco["images"][0]["width"] == 40 and coco["categories"] == [{"id": 1, "name": "object"}]
    assert (tmp_path / "drawn" / "a.png").is_file()
    for annotation in coco["annotations"]:
        assert annotation["segmentation"]["size"] == [20, 40]
        x, y, width, height = annotation["bbox"]
        assert 0 < annotation["area"] <= width * height and x + width <= 40 and y + height <= 20


def test_it_takes_squares(place, tmp_path, capsys):
    assert train(place, tmp_path / "no", "--image_size", "48", "64") != 0
    assert "image_size=[48, 64]: EoMT takes squares" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
