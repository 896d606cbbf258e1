"""The demonstration in small: every row with a few images, its files, its picture, and the proof by reloading."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vpt_peft.cli import demo_runs as demo
from vpt_peft.cli.main import main


FEW = {
    "num_train_epochs": 1,
    "max_train_samples": 64,
    "max_eval_samples": 20,
    "max_predict_samples": 40,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.run_demo(folder, seed=1, flags=FEW), folder


def test_rows_are_those_of_the_table(result):
    rows, _ = result
    head = 128 * 10 + 10
    deep, shallow, gated = 6 * 10 * 128, 10 * 128, 10 * 128 + 5 + 6
    # Counts are one to six
    few = 128 * 6 + 6
    expected = [
        ("digits-count", "embedded", "linear", few),
        ("digits-count", "embedded", "vpt_shallow", few + shallow),
        ("digits-count", "embedded", "vpt", few + deep),
        ("digits-count", "embedded", "full", few + 1_204_608),
        ("digits-count", "embedded-mae", "linear", few),
        ("digits-count", "embedded-mae", "gated_vpt", few + gated),
        ("digits", "embedded", "linear", head),
        ("digits", "embedded", "vpt_shallow", head + shallow),
        ("digits", "embedded", "vpt", head + deep),
        ("digits", "embedded", "full", head + 1_204_608),
    ]
    assert [(row.data, row.backbone, row.method, row.trainable_parameters) for row in rows] == expected
    assert all(0 < row.score <= 1 and row.seconds > 0 for row in rows)
    # Chance is a tenth, and four steps leave it behind on the backbone trained with labels
    assert rows[8].score > 0.25


def test_files(result):
    rows, folder = result
    written = json.loads((folder / "demo.json").read_text())
    assert written["seed"] == 1 and written["rows"][2]["accuracy"] == rows[2].score
    assert (folder / "demo.md").read_text() == demo.as_markdown(rows)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {
        path.name for path in (folder / "digits-count-embedded-vpt").iterdir()
    }
    with Image.open(folder / "demo.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("L").histogram()) == 256
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 100


def test_reload_is_a_proof(result):
    rows, folder = result
    saved = folder / demo.SHOWN.folder
    shown = demo.prove_reload(saved, "digits-count", rows[2].score, max_predict_samples=40)
    assert len(shown) == demo.SHOWN_IMAGES and {item.label for item in shown} <= set("123456")
    assert {item.predicted for item in shown} <= set("123456")
    with pytest.raises(RuntimeError, match="loaded again, the model has accuracy"):
        demo.prove_reload(saved, "digits-count", rows[2].score + 0.1, max_predict_samples=40)


def test_markdown():
    rows = [
        demo.DemoRow("digits-count", "embedded", "vpt", 100, 0.9876, 8970, 12.34),
        demo.DemoRow("digits", "embedded-mae", "linear", 300, 0.5, 10, 1),
    ]
    header, rule, *lines = (line.strip("|").split("|") for line in demo.as_markdown(rows).splitlines())
    assert [cell.strip() for cell in header] == list(demo.HEADINGS) and demo.HEADINGS[4] == "test accuracy"
    assert [cell.endswith(":") for cell in rule] == [False] * 3 + [True] * 4
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["how many digits?", "embedded", "VPT-deep", "100", "98.8%", "8,970", "12.3"],
        ["which digit?", "embedded-mae", "linear probe", "300", "50.0%", "10", "1.0"],
    ]


def test_command(monkeypatch, tmp_path, capsys):
    rows = [
        demo.DemoRow("digits-count", "embedded", "linear", 64, 0.5, 774, 1.0),
        demo.DemoRow("digits-count", "embedded", "vpt", 64, 0.9, 8454, 1.0),
        demo.DemoRow("digits-count", "embedded", "full", 64, 0.95, 845_400, 1.0),
    ]
    asked = {}

    def run(output_dir, seed, flags):
        asked.update(output_dir=output_dir, seed=seed, flags=flags)
        return rows

    monkeypatch.setattr(demo, "run_demo", run)
    assert main(["demo", "--output_dir", str(tmp_path), "--seed", "3", "--num_train_epochs", "2"]) == 0
    assert asked == {"output_dir": str(tmp_path), "seed": 3, "flags": {"num_train_epochs": 2.0}}
    shown = capsys.readouterr().out
    assert "a linear probe on them is right in 50%" in shown and "VPT-deep in 90% and full fine-tuning in 95%" in shown
    assert "prompts train 1.0% of its parameters" in shown
    assert demo.as_markdown(rows) in shown and str(tmp_path / "demo.png") in shown
