"""Adapters with heads of this package: pushed and loaded back; what PEFT's own call does with them."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModel
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vpt_peft.dense.segmenter import ViTForSemanticSegmentation
from vpt_peft.hub import push_adapter
from vpt_peft.tasks import get_task
from vpt_peft.training.arguments import parse_args
from vpt_peft.training.inference import load_adapter_model
from vpt_peft.training.train import train


TASKS = {
    "semantic-segmentation": "vpt_peft.dense.segmenter",
    "object-detection": "vpt_peft.dense.detector",
    "instance-segmentation": "vpt_peft.dense.eomt",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run for a task."""
    place, made = tmp_path_factory.mktemp("loading"), {}
    outline = [4, 4, 20, 4, 20, 20, 4, 20]
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(4)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [4, 4, 16, 16], "segmentation": [outline]}
            for n in range(4)
        ],
        "categories": [{"id": 1, "name": "square"}],
    }
    for kind in ("images", "masks"):
        (place / "masks" / kind).mkdir(parents=True)
    (place / "coco").mkdir()
    for number in range(4):
        mask = np.zeros((32, 32), np.uint8)
        mask[4:20, 4:20] = 1
        for path in (place / "coco", place / "masks" / "images"):
            Image.fromarray(mask * 200).convert("RGB").save(path / f"{number}.png")
        Image.fromarray(mask).save(place / "masks" / "masks" / f"{number}.png")
    (place / "coco" / "annotations.json").write_text(json.dumps(content))
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(place / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(place / "vit")

    def get(task):
        if task not in made:
            made[task] = place / task
            train(
                parse_args(
                    {
                        "task": task,
                        "model_name_or_path": str(place / "vit"),
                        "dataset_name": str(place / ("masks" if task.startswith("semantic") else "coco")),
                        "output_dir": str(place / task),
                        "max_steps": 1,
                        "per_device_train_batch_size": 2,
                        "disable_tqdm": True,
                    }
                )
            )
        return made[task]

    return get


@pytest.mark.parametrize("task", TASKS)
def test_pushed_and_loaded_back(hub, finished, task):
    folder = finished(task)
    push_adapter(folder, "user/dense")
    image = Image.open(folder.parent / "coco" / "0.png")
    found = [
        get_task(task).predict(*load_adapter_model(where), [image], threshold=0.0) for where in (folder, "user/dense")
    ]
    assert found[0] == found[1] and found[0][0]
    card = (folder / "README.md").read_text()
    assert "load_adapter_model(adapter)" in card and "AutoPeftModel" not in card


@pytest.mark.parametrize("task", TASKS)
def test_peft_alone_is_told_what_to_call(finished, task):
    folder = str(finished(task))
    with pytest.raises(ValueError, match=f"import '{TASKS[task]}' which is not in the import allowlist"):
        AutoPeftModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model_type='vit'.*load_adapter_model\(folder\)"):
        AutoPeftModel.from_pretrained(folder, import_allowlist=["vpt_peft"])


def test_a_whole_model_loads_by_the_auto_class(finished, tmp_path):
    base = load_adapter_model(finished("semantic-segmentation"))[0].unload()
    base.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(again) is ViTForSemanticSegmentation
    for name, value in base.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
