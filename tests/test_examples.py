"""Every program in `examples/` runs on small models and data, and what it saves loads again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import vpt_peft  # noqa: F401  (loading needs it)


pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
WORDS = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "a", "photo", "of", "daisy", "tulip", "what", "is", "this", "."]


def start(name: str, *arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"], environment["CUDA_VISIBLE_DEVICES"] = "true", ""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def draw_folder(folder: Path, names: tuple[str, ...], count: int = 8) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("test", 4)):
        for hue, name in enumerate(names):
            path = folder / split / name
            path.mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 120, (32, 32, 3))
                pixels[..., hue % 3] += 120
                Image.fromarray(pixels.astype("uint8")).save(path / f"{index}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    draw_folder(folder / "flowers", ("daisy", "tulip"))
    draw_folder(folder / "birds", ("finch", "robin", "wren"))
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TOWER)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text |= {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=16)).save_pretrained(folder / "clip")
    CLIPProcessor(pictures, words).save_pretrained(folder / "clip")
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**text),
        image_token_index=3,
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(llava).save_pretrained(folder / "llava")
    LlavaProcessor(
        pictures, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder / "llava")
    return folder


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)", text)]


def test_all_are_run():
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_loop_of_ones_own(place):
    said = start(
        "image_classification_no_trainer.py", "--model_name_or_path", "vit", "--dataset_name", "flowers",
        "--output_dir", "loop", "--epochs", "6", "--batch_size", "4", cwd=place,
    )  # fmt: skip
    assert losses(said)[-1] < losses(said)[0] and float(said.split("accuracy")[-1]) == 1.0
    vit = AutoModelForImageClassification.from_pretrained(place / "vit")
    model = PeftModel.from_pretrained(vit, place / "loop")
    assert model.peft_config["default"].id2label == {0: "daisy", 1: "tulip"}


def test_zero_shot(place):
    said = start(
        "zero_shot_clip.py", "--model_name_or_path", "clip", "--dataset_name", "flowers", "--output_dir", "zero",
        "--epochs", "8", "--batch_size", "4", cwd=place,
    )  # fmt: skip
    assert losses(said)[-1] < losses(said)[0]
    assert (place / "zero" / "adapter_model.safetensors").is_file()


def test_tower_of_a_vlm(place):
    said = start(
        "vlm_tower.py", "--model_name_or_path", "llava", "--image", "flowers/test/daisy/0.png", "--backbone",
        "model.vision_tower", "--prompt", "<image> what is this", "--answer", " a daisy .", "--output_dir", "vlm",
        "--steps", "12", cwd=place,
    )  # fmt: skip
    assert losses(said)[-1] < losses(said)[0]
    assert (place / "vlm" / "adapter_model.safetensors").is_file()


def test_many_tasks(place):
    said = start(
        "many_tasks.py", "--model_name_or_path", "vit", "--dataset_name", "flowers", "birds", "--output_dir", "many",
        "--epochs", "6", "--batch_size", "4", cwd=place,
    )  # fmt: skip
    answers = said.splitlines()[-4:]
    assert [line.split(": ")[0] for line in answers] == ["flowers"] * 2 + ["birds"] * 2
    assert all(line.split(": ")[1] in ("daisy", "tulip") for line in answers[:2])
    assert all(line.split(": ")[1] in ("finch", "robin", "wren") for line in answers[2:])
