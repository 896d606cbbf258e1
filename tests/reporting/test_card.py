"""The card: metadata that the Hub accepts, a snippet that runs as it stands, and numbers that are the run's."""

import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from vpt_peft.reporting.card import retarget
from vpt_peft.training.inference import load_adapter_model


pytest_plugins = ["training_fixtures"]


def snippet(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize(("method", "library"), [("vpt", "peft"), ("lora", "peft"), ("linear", "transformers")])
def test_metadata(finished, tiny_vit, method, library):
    metrics, out = finished(method=method)
    card = ModelCard.load(out / "README.md")
    validate_repo_id(card.data.base_model)
    data = card.data
    assert data.library_name == library and data.pipeline_tag == "image-classification"
    # A folder's path is nobody's business
    assert data.base_model == "tiny-vit" and tiny_vit not in card.content.split("## Use")[0]
    assert {method, "vpt_peft", "image-classification"} <= set(data.tags)
    assert ("peft" in data.tags) == (library == "peft")
    assert data.metrics == ["accuracy", "f1"] and data.model_name == "out"
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    expected = {
        (split, kind): round(metrics[f"{prefix}_{name}"], 4)
        for prefix, split in (("eval", "validation"), ("test", "test"))
        for name, kind in (("accuracy", "accuracy"), ("macro_f1", "f1"))
    }
    assert results == pytest.approx(expected)


def test_text_tells_the_protocol(finished):
    metrics, out = finished(method="vpt", num_virtual_tokens=3, seed=7, learning_rate=0.0125)
    text = (out / "README.md").read_text()
    trained = 3 * 3 * 32 + 330
    for told in (
        "96 train, 50 validation, 50 test images",
        "size 16 x 16, mean (0.5, 0.5, 0.5)",
        "Seed 7; the weights with the best validation accuracy are kept",
        f"Trained parameters: {trained:,} of",
        "330 in the head",
        "| `learning_rate` | 0.0125 |",
        "| `num_virtual_tokens` | 3 |",
        "Classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.",
        f"| test | Accuracy | {100 * metrics['test_accuracy']:.2f} % |",
    ):
        assert told in text, told


@pytest.mark.parametrize("method", ["vpt", "lora", "bias"])
def test_snippet_runs_as_it_stands(finished, method):
    _, out = finished(method=method)
    code = snippet((out / "README.md").read_text())
    model, processor = load_adapter_model(out)
    with torch.no_grad():
        pixels = processor(images=Image.new("RGB", (224, 224)), return_tensors="pt")
        expected = model(**pixels).logits
    found: dict = {"print": lambda label: found.update(label=label)}
    exec(code, found)
    assert torch.equal(found["logits"], expected)
    assert found["label"] == model.config.id2label[expected.argmax().item()]


def test_snippet_imports_what_it_needs(finished, tmp_path):
    """In a process of its own nothing else has registered the method."""
    _, out = finished(method="vpt")
    (tmp_path / "snippet.py").write_text(snippet((out / "README.md").read_text()))
    done = subprocess.run([sys.executable, str(tmp_path / "snippet.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in set("0123456789")


def test_retarget_changes_the_adapter_only(finished):
    _, out = finished(method="vpt")
    card = (out / "README.md").read_text()
    moved = retarget(card, 'user/na"me')
    changed = [(old, new) for old, new in zip(card.splitlines(), moved.splitlines(), strict=True) if old != new]
    assert [new for _, new in changed] == ['adapter = "user/na\\"me"  # this folder or its Hub id']
    assert retarget(moved, str(out)) == card


@pytest.mark.parametrize(("method", "told"), [("vpt", True), ("lora", False), ("linear", False)])
def test_other_ways_of_loading(finished, method, told):
    """A snippet in a sentence: `pipeline` with the image processor that was used."""
    _, out = finished(method=method)
    text = (out / "README.md").read_text()
    assert ("`AutoModelForImageClassification.from_pretrained(adapter)` loads it too" in text) == told
    assert ('`pipeline("image-classification", adapter, image_processor=adapter)`' in text) == told
    assert "On the machine" not in text
