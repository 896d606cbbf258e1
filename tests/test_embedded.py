"""The backbones that travel with the package, and the glyphs they were trained on."""

import importlib.util
import json
import sys
import unicodedata
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from vpt_peft.embedded import embedded_path


NAMES = ["embedded", "embedded-mae"]
GLYPHS = Path(__file__).parents[1] / "scripts" / "glyphs.py"


@pytest.fixture(scope="module")
def glyphs() -> ModuleType:
    pytest.importorskip("matplotlib")
    pytest.importorskip("fontTools")
    spec = importlib.util.spec_from_file_location("glyphs", GLYPHS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["glyphs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["glyphs"]


@pytest.fixture(scope="module")
def bank(glyphs):
    return glyphs.build_bank(max_classes=60)


@pytest.fixture(scope="module")
def digits() -> tuple[list[Image.Image], np.ndarray]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    half = slice(None, None, 2)
    return [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in data.images[half]], data.target[half]


@pytest.mark.parametrize("name", ["vit", "Embedded", "", "google/vit-base-patch16-224"])
def test_unknown_name_says_which_there_are(name):
    with pytest.raises(ValueError, match=r"embedded.*embedded-mae"):
        embedded_path(name)


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_small_and_complete(name):
    folder = embedded_path(name)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\n")


@pytest.mark.parametrize(("name", "pretraining"), [("embedded", "supervised"), ("embedded-mae", "mae")])
def test_loads_as_a_float32_vit_of_one_to_two_million_parameters(name, pretraining):
    model, loading = AutoModel.from_pretrained(embedded_path(name), add_pooling_layer=False, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.model_type == "vit" and model.config.pretraining == pretraining
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_classifier_gets_a_fresh_head_and_finite_outputs(name):
    model, loading = AutoModelForImageClassification.from_pretrained(
        embedded_path(name), num_labels=10, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert set(loading["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    output = model(pixel_values=pixels, labels=torch.tensor([0, 1, 2]))
    assert output.logits.shape == (3, 10)
    assert torch.isfinite(output.logits).all() and torch.isfinite(output.loss)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_image_processor_gives_what_the_model_was_trained_on(name, mode):
    processor = AutoImageProcessor.from_pretrained(embedded_path(name))
    pixels = processor(Image.new(mode, (8, 8), "white"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels, torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize(("name", "floor"), [("embedded", 0.0), ("embedded-mae", 0.0)])
def test_linear_probe_on_digits(name, floor, digits):
    linear_model = pytest.importorskip("sklearn.linear_model")
    images, labels = digits
    pixels = AutoImageProcessor.from_pretrained(embedded_path(name))(images, return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(embedded_path(name), add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = torch.cat([model(pixel_values=batch).last_hidden_state[:, 0] for batch in pixels.split(256)])
    features = ((tokens - tokens.mean(0)) / (tokens.std(0) + 1e-6)).numpy()
    test = np.arange(len(labels)) % 5 == 0
    probe = linear_model.LogisticRegression(C=0.03, max_iter=1000).fit(features[~test], labels[~test])
    assert probe.score(features[test], labels[test]) > floor


def test_every_character_of_the_full_bank_is_no_number(glyphs):
    bank = glyphs.build_bank()
    characters = "".join(bank.classes)
    assert len(bank.classes) > 900 and len(set(characters)) == len(characters)
    for character in characters:
        spelled = character + unicodedata.normalize("NFKC", character)
        assert not any(unicodedata.category(part).startswith("N") for part in spelled), character
        assert unicodedata.numeric(character, None) is None, character
    assert {"A", "ж", "λ"} <= set(characters)


@pytest.mark.parametrize("character", [*"0123456789", "٣", "½", "Ⅷ", "²", "⑤", "㎡", "ƻ", "Ƽ", "🂥"])
def test_numbers_are_not_wanted(glyphs, character):
    assert not glyphs.is_wanted(character)


@pytest.mark.parametrize("character", ["a", "Я", "Ω", "ب", "+", "∑"])
def test_letters_and_symbols_are_wanted(glyphs, character):
    assert glyphs.is_wanted(character)


def test_stream_is_in_range_grey_and_labelled(glyphs, bank):
    pixels, labels = next(iter(glyphs.GlyphSampler(bank, batch_size=24)))
    assert pixels.shape == (24, 3, 32, 32) and labels.shape == (24,)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert 0 <= labels.min() and labels.max() < 60
    # Ink must be visible: hardly any image is of one grey.
    assert (pixels.flatten(1).std(dim=1) > 0.05).float().mean() > 0.9


def test_stream_repeats_by_seed_and_only_by_seed(glyphs, bank):
    first, second, other = (
        [pixels for pixels, _ in islice(glyphs.GlyphSampler(bank, batch_size=8, seed=seed), 2)] for seed in (3, 3, 4)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])


def test_held_out_font_is_taken_out(glyphs, bank):
    seen, unseen = bank.split("STIXGeneral.ttf")
    number = bank.font_names.index("STIXGeneral.ttf")
    assert len(seen.images) + len(unseen.images) == len(bank.images) and len(unseen.images) > 0
    assert (unseen.fonts == number).all() and not (seen.fonts == number).any()
    with pytest.raises(ValueError, match="font_name='Arial.ttf'"):
        bank.split("Arial.ttf")


def test_config_says_float32_while_the_file_is_float16():
    for name in NAMES:
        folder = embedded_path(name)
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        header_size = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        header = json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + header_size])
        assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"F16"}
