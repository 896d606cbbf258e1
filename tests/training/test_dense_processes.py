"""Boxes and masks are measured in two processes as in one, with a last batch that is uneven."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from training_workers import launch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vpt_peft.training.arguments import parse_args
from vpt_peft.training.train import train


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed training")
TASKS = ("object-detection", "instance-segmentation")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """COCO data whose pictures have from none to four squares, and a ViT."""
    folder, draws = tmp_path_factory.mktemp("dense"), np.random.default_rng(0)
    for split, count in (("train", 6), ("valid", 5)):
        (folder / "data" / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            pixels = np.full((32, 32, 3), 100, np.uint8)
            for _ in range(number % 5):
                x, y = (int(place) for place in draws.integers(0, 20, 2))
                side = int(draws.integers(8, 12))
                pixels[y : y + side, x : x + side] = 255
                outline = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "category_id": 1,
                        "bbox": [x, y, side, side],
                        "segmentation": [outline],
                    }
                )
            Image.fromarray(pixels).save(folder / "data" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png"})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (folder / "data" / split / "_annotations.coco.json").write_text(json.dumps(content))
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    # Masks that are found, so that there is something to count
    long = {"method": "full", "max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 6}
    train(parse_args({**flags(folder, TASKS[1], 1), **long, "output_dir": str(folder / "eomt")}))
    return folder


def flags(place, task, processes):
    trained = place / "eomt"
    return {
        "task": task,
        "model_name_or_path": str(trained if task == TASKS[1] and trained.is_dir() else place / "vit"), "dataset_name": str(place / "data"),
        "cache_dir": str(place / "cache"), "output_dir": str(place / f"{task}_{processes}"), "max_steps": 1,
        "per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 4 // processes,
        "disable_tqdm": True,
        # Losses are a mean over the objects of a process, so weights would differ a little
        "learning_rate": 1e-12,
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(place):
    """What two processes found, by task."""
    (place / "launched").mkdir()
    return launch({task: flags(place, task, 2) for task in TASKS}, place / "launched", 150)


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_measure_what_one_does(place, two, task):
    assert "error" not in two[task], two[task]["error"]
    assert two[task]["processes"] == 2 and two[task]["wrapper"] == "DistributedDataParallel"
    ours, theirs = two[task]["metrics"], train(parse_args(flags(place, task, 1)))
    assert ours["eval_samples"] == theirs["eval_samples"] == 5
    for name in ("eval_map", "eval_map_50", "eval_mar_100"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert theirs["eval_mar_100"] > 0
