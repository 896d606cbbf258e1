"""Every program in `examples/` runs on small models and data, and what it saves loads again."""

from __future__ import annotations

import json
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
from segmentation_data import write_coco, write_folders
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VitPoseImageProcessor,
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


@pytest.mark.parametrize(
    ("name", "write", "word"),
    [
        ("semantic_segmentation.py", write_folders, r"mean IoU ([\d.]+)"),
        ("object_detection.py", write_coco, r"mAP ([\d.]+)"),
    ],
)
def test_dense_tasks(name, write, word, place):
    data = write(place / name.removesuffix(".py"), {"train": 8, "val": 3}, height=32, width=64)
    said = start(
        name, "--model_name_or_path", "vit", "--dataset_name", data.name, "--output_dir", f"{data.name}-out",
        "--image_size", "32", "64", "--epochs", "30", "--batch_size", "4", cwd=place,
    )  # fmt: skip
    # Squares of black and white on grey; what never learns them gets a third and nothing
    assert float(re.findall(word, said)[-1]) > (0.4 if "IoU" in word else 0.1)
    assert (place / f"{data.name}-out" / "adapter_model.safetensors").is_file()


def test_video(place):
    draws = np.random.default_rng(0)
    for hue, name in enumerate(("jump", "run")):
        for clip in range(4):
            folder = place / "clips" / name / str(clip)
            folder.mkdir(parents=True)
            for frame in range(6):
                pixels = draws.integers(0, 120, (32, 32, 3))
                pixels[..., hue] += 120
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{frame:02}.png")
    config = VideoMAEConfig(**TOWER, num_frames=4, tubelet_size=2)
    VideoMAEForVideoClassification(config).save_pretrained(place / "videomae")
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    VideoMAEImageProcessorPil(size=size[0], crop_size=size[1]).save_pretrained(place / "videomae")
    said = start(
        "video_classification.py", "--model_name_or_path", "videomae", "--clips", "clips", "--output_dir", "video",
        "--epochs", "8", cwd=place,
    )  # fmt: skip
    assert losses(said)[-1] < losses(said)[0] and float(said.split("accuracy")[-1]) == 1.0
    saved = json.loads((place / "video" / "adapter_config.json").read_text())
    assert saved["id2label"] == {"0": "jump", "1": "run"}


def test_depth(place):
    for kind in ("images", "depths"):
        (place / "rooms" / kind).mkdir(parents=True)
    draws = np.random.default_rng(0)
    for index in range(4):
        near = draws.integers(0, 200, (40, 48, 3)).astype("uint8")
        Image.fromarray(near).save(place / "rooms" / "images" / f"{index}.png")
        Image.fromarray(1000 + 4 * near[..., 0].astype("uint16")).save(place / "rooms" / "depths" / f"{index}.png")
    # Wide enough for the last rectifier not to give nothing but zeros
    backbone = Dinov2Config(**TOWER, out_indices=[1, 2], reshape_hidden_states=False, initializer_range=0.3)
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=32, reassemble_factors=[2, 1], neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8, head_hidden_size=8, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    DepthAnythingForDepthEstimation(config).save_pretrained(place / "depth")
    DPTImageProcessor(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(place / "depth")
    said = start(
        "depth_estimation.py", "--model_name_or_path", "depth", "--images", "rooms/images", "--depths",
        "rooms/depths", "--scale", "0.001", "--output_dir", "depths", "--epochs", "8", cwd=place,
    )  # fmt: skip
    assert losses(said)[-1] < losses(said)[0]
    assert (place / "depths" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def vitpose(place):
    backbone = VitPoseBackboneConfig(
        image_size=(64, 48), patch_size=(16, 16), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        mlp_ratio=2,
    )  # fmt: skip
    torch.manual_seed(0)
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=3)).save_pretrained(place / "pose")
    processor = VitPoseImageProcessor(size={"height": 64, "width": 48})
    processor.save_pretrained(place / "pose")
    return processor


PEOPLE = [
    {"id": index, "image_id": index, "category_id": 1, "bbox": [10.0 + index, 5.0, 20.0, 30.0],
     "keypoints": [20 + index, 10, 2, 14 + index, 20, 2, 0, 0, 0]}
    for index in range(4)
]  # fmt: skip


def test_pose(place, vitpose):
    draws = np.random.default_rng(0)
    (place / "people").mkdir()
    for index in range(4):
        Image.fromarray(draws.integers(0, 255, (48, 40, 3)).astype("uint8")).save(place / f"people/{index}.png")
    images = [{"id": index, "file_name": f"{index}.png"} for index in range(4)]
    (place / "people.json").write_text(json.dumps({"images": images, "annotations": PEOPLE}))
    said = start(
        "pose_estimation.py", "--model_name_or_path", "pose", "--images", "people", "--annotations", "people.json",
        "--output_dir", "poses", "--epochs", "8", "--batch_size", "2", cwd=place,
    )  # fmt: skip
    assert losses(said)[-1] < losses(said)[0]
    assert (place / "poses" / "adapter_model.safetensors").is_file()


def test_targets_of_pose_are_where_the_processor_reads_them(vitpose):
    import runpy

    heatmaps = runpy.run_path(str(EXAMPLES / "pose_estimation.py"))["heatmaps"]
    person = PEOPLE[0]
    # The box, as wide as high as the model's image and a quarter larger
    cut = torch.tensor([22.5, 30.0]) * 1.25
    points = (torch.tensor([[20.0, 10.0], [14.0, 20.0]]) - torch.tensor([20.0, 20.0])) / cut + 0.5
    output = type("Output", (), {"heatmaps": heatmaps(points[None], 64, 48)})
    found = vitpose.post_process_pose_estimation(output, boxes=[[person["bbox"]]])[0][0]["keypoints"]
    assert torch.allclose(found, torch.tensor([[20.0, 10.0], [14.0, 20.0]]), atol=0.05)
