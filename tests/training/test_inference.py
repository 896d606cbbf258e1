"""Reading adapters back, evaluating splits, predicting images to tables, and the way over the Hub."""

import csv
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification

import vpt_peft.hub as hub_module
from vpt_peft.cli.main import main
from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.images import DataError, find_images
from vpt_peft.files import write_whole
from vpt_peft.hub import push_adapter
from vpt_peft.reporting.predictions import as_table
from vpt_peft.tasks import get_task
from vpt_peft.training.arguments import from_record
from vpt_peft.training.evaluation import evaluate_model, predict_images
from vpt_peft.training.inference import load_adapter_model, read_record


pytest_plugins = ["training_fixtures"]


@pytest.fixture(scope="module")
def trained(finished):
    metrics, out = finished(method="vpt", num_virtual_tokens=3)
    return metrics, out, *load_adapter_model(out)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for index, picture in enumerate(load_digits().images[:3]):
        path = folder / ("more" if index == 2 else "") / f"{index}.png"
        Image.fromarray((picture * 15).astype(np.uint8)).save(path)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_predictions_are_the_models(trained, pictures):
    _, _, model, processor = trained
    paths = find_images([pictures])
    assert [path.name for path in paths] == ["0.png", "1.png", "broken.jpg", "2.png"]
    rows = predict_images(model, processor, paths, top_k=10, batch_size=2)
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    assert rows[2]["predictions"] == [] and "broken.jpg" in rows[2]["error"]
    for row in (rows[0], rows[1], rows[3]):
        pixels = processor(images=Image.open(row["image"]).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            expected = model(**pixels).logits[0].softmax(-1)
        values = [p["probability"] for p in row["predictions"]]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=1e-5)
        for prediction in row["predictions"]:
            assert prediction["probability"] == pytest.approx(expected[int(prediction["label"])].item(), abs=1e-5)
    assert [len(row["predictions"]) for row in predict_images(model, processor, paths[:1], top_k=2)] == [2]


def test_tables(trained, pictures):
    rows = predict_images(*trained[2:], find_images([pictures]), top_k=2)
    assert json.loads(as_table(rows, "json")) == rows
    header, *lines = csv.reader(io.StringIO(as_table(rows, "csv")))
    assert header == ["image", "label_1", "probability_1", "label_2", "probability_2", "error"]
    assert lines[0][1] == rows[0]["predictions"][0]["label"]
    assert float(lines[0][2]) == pytest.approx(rows[0]["predictions"][0]["probability"], abs=1e-6)
    assert lines[2][1:5] == [""] * 4 and "broken.jpg" in lines[2][5]
    with pytest.raises(ValueError, match="format='xml'"):
        as_table(rows, "xml")


def test_predict_refusals(trained, tmp_path):
    with pytest.raises(ValueError, match="top_k=0"):
        predict_images(*trained[2:], [], top_k=0)
    with pytest.raises(FileNotFoundError, match="missing"):
        find_images([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        find_images([tmp_path / "empty"])


@pytest.mark.parametrize(("split", "prefix"), [("validation", "eval"), ("test", "test")])
def test_evaluate_gives_the_trainings_numbers(trained, split, prefix):
    metrics, out, model, processor = trained
    found = evaluate_model(model, processor, from_record(DataArguments, read_record(out)), split, batch_size=7)
    assert found["samples"] == 50
    for name in ("accuracy", "macro_f1"):
        assert found[name] == pytest.approx(metrics[f"{prefix}_{name}"])
    assert found["loss"] == pytest.approx(metrics[f"{prefix}_loss"], rel=1e-5)


def image_folder(root, names):
    for position, name in enumerate(names):
        for split in ("train", "test"):
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                Image.fromarray(np.full((16, 16), 60 * position + index, np.uint8)).save(
                    root / split / name / f"{index}.png"
                )
    return root


def test_labels_are_matched_by_name(trained, tmp_path):
    model, processor = load_adapter_model(trained[1])
    model.config.id2label = {**model.config.id2label, 0: "cat", 3: "dog"}
    data = DataArguments(dataset_name=str(image_folder(tmp_path / "pets", ["cat", "dog"])))
    found = evaluate_model(model, processor, data)
    rows = [
        (path.parent.name, predict_images(model, processor, [path], top_k=1)[0]["predictions"][0]["label"])
        for path in find_images([tmp_path / "pets" / "test"])
    ]
    assert found["accuracy"] == sum(label == predicted for label, predicted in rows) / 8
    other = DataArguments(dataset_name=str(image_folder(tmp_path / "farm", ["cat", "cow"])))
    with pytest.raises(DataError, match="does not know the labels 'cow'"):
        evaluate_model(model, processor, other)
    with pytest.raises(DataError, match="dev"):
        evaluate_model(model, processor, data, split="dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no adapter_config.json"),
        ({"vpt_peft_baseline.json": {"method": "linear"}}, "vpt_peft_baseline.json"),
    ],
)
def test_folders_that_hold_no_adapter(tmp_path, content, message):
    for name, values in content.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_adapter_model(tmp_path)


def test_weights_of_another_shape_are_refused(copied):
    _, out = copied(method="linear")
    note = json.loads((out / "config.json").read_text())
    note["id2label"] = dict(list(note["id2label"].items())[:4])
    (out / "config.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="names or shapes differ at classifier"):
        load_adapter_model(out)


def test_push_and_load_back(hub, trained, tmp_path):
    _, out, model, _ = trained
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    url = push_adapter(out, "user/digits-vpt")
    assert "user/digits-vpt" in url
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    files = set(HfApi().list_repo_files("user/digits-vpt"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "preprocessor_config.json"} <= files
    assert not any(name.startswith("checkpoint") or name.endswith((".bin", ".pt")) for name in files)
    card = ModelCard.load("user/digits-vpt")
    card.validate()
    assert 'adapter = "user/digits-vpt"' in card.content and card.data.library_name == "peft"
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        loaded, processor = load_adapter_model("user/digits-vpt")
        assert torch.equal(loaded(pixel_values=images).logits, expected)
        assert loaded.config.id2label == model.config.id2label
        base = AutoModelForImageClassification.from_pretrained(
            read_record(out)["model_name_or_path"], num_labels=10, ignore_mismatched_sizes=True
        )
        assert torch.equal(
            PeftModel.from_pretrained(base, "user/digits-vpt").eval()(pixel_values=images).logits, expected
        )
        code = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)[0]
        found: dict = {"print": lambda label: None}
        exec(code, found)
        assert found["logits"].shape == (1, 10)


def test_private_repositories_revisions_and_the_offline_cache(hub, trained, monkeypatch):
    _, out, model, _ = trained
    push_adapter(out, "user/secret", token=hub.token, private=True)
    push_adapter(out, "user/secret", token=hub.token, revision="second")
    assert HfApi().model_info("user/secret").private
    for revision in (None, "second"):
        load_adapter_model("user/secret", revision=revision, token=hub.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded, _ = load_adapter_model("user/secret", token=hub.token)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=images).logits, model(pixel_values=images).logits)


def test_failed_upload_says_how_to_go_on(hub, trained, monkeypatch):
    _, out, _, _ = trained
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="(?s)user/digits.*local files are whole.*vpt-peft push"):
        push_adapter(out, "user/digits", token="hf_wrong")

    def no_network(*args, **kwargs):
        raise hub_module.HTTPError("connection refused")

    monkeypatch.setattr(hub_module.HfApi, "create_commit", no_network)
    with pytest.raises(OSError, match="connection refused.*vpt-peft push"):
        push_adapter(out, "user/digits", token=hub.token)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(FileNotFoundError, match="holds no trained adapter"):
        push_adapter(out / "checkpoint-none", "user/digits")


def test_training_pushes_the_finished_adapter(hub, tiny_vit, tmp_path, capsys):
    flags = {
        "model_name_or_path": tiny_vit,
        "output_dir": tmp_path / "out",
        "method": "linear",
        "max_steps": 1,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": "user/pushed",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    assert "user/pushed" in capsys.readouterr().out.splitlines()[-1]
    files = set(HfApi().list_repo_files("user/pushed"))
    assert {"vpt_peft_baseline.safetensors", "vpt_peft_baseline.json", "config.json", "README.md"} <= files
    loaded, _ = load_adapter_model("user/pushed")
    local = load_file(tmp_path / "out" / "vpt_peft_baseline.safetensors")
    assert torch.equal(loaded.classifier.weight, local["classifier.weight"])
    assert hub.token not in (tmp_path / "out" / "training_config.json").read_text()


def test_a_name_that_is_not_utf8(trained, pictures, tmp_path):
    source = find_images([pictures])[0]
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    odd.write_bytes(source.read_bytes())
    rows = predict_images(*trained[2:], [source, odd])
    assert rows[1]["predictions"] == rows[0]["predictions"] and rows[1]["image"].endswith("caf\\xe9.png")
    for kind in ("csv", "json"):
        write_whole(tmp_path / f"table.{kind}", as_table(rows, kind))


def test_a_batch_of_large_images_is_run_in_parts(trained, pictures, monkeypatch):
    """What is held decoded has few pixels; the predictions are those of a whole batch."""
    paths = [path for path in find_images([pictures]) if "broken" not in path.name] * 2
    expected = predict_images(*trained[2:], paths)
    counts = []
    task = get_task()
    whole = type(task).predict
    monkeypatch.setattr(
        type(task), "predict", lambda self, m, p, images, *rest: counts.append(len(images)) or whole(self, m, p, images, *rest)
    )  # fmt: skip
    with Image.open(paths[0]) as image:
        monkeypatch.setattr("vpt_peft.training.evaluation._MOST_PIXELS", image.width * image.height - 1)
    found = predict_images(*trained[2:], paths)
    assert counts[0] == 1 and sum(counts) == len(paths)
    for one, other in zip(found, expected, strict=True):
        assert [p["label"] for p in one["predictions"]] == [p["label"] for p in other["predictions"]]
