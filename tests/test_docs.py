"""Every code block of README and docs runs, against a Hub in memory that holds small models of the names in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, Repo
from run_page import blocks_of


pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [page for page in PAGES if blocks_of(page)]

SIZES = {"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 48}
BACKBONES = {
    "google/vit-base-patch16-224-in21k": ("ViTModel", SIZES),
    "facebook/vit-mae-base": (
        "ViTMAEForPreTraining",
        SIZES
        | {
            "decoder_hidden_size": 12,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 3,
            "decoder_intermediate_size": 24,
        },
    ),
    "facebook/dinov2-base": ("Dinov2Model", SIZES | {"image_size": 224}),
    "MCG-NJU/videomae-base": ("VideoMAEModel", SIZES),
    "openai/clip-vit-base-patch32": (
        "CLIPModel",
        {
            "vision_config": SIZES,
            "text_config": SIZES | {"vocab_size": 20, "eos_token_id": 2, "num_hidden_layers": 2},
            "projection_dim": 16,
        },
    ),
    "Intel/dpt-large": (
        "DPTForDepthEstimation",
        SIZES | {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [2, 5, 8, 11]},
    ),
    "usyd-community/vitpose-base-simple": (
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 48,
            },
            "num_labels": 17,
        },
    ),
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def put(hub: Hub, repo_id: str, folder: Path) -> None:
    repo = hub.repos["models", repo_id] = Repo(private=False)
    repo.commit("main", files_of(folder))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    import torch
    import transformers
    from peft import get_peft_model

    from vpt_peft import VPTConfig

    hub, folder = Hub(), tmp_path_factory.mktemp("hub")
    for repo_id, (name, fields) in BACKBONES.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**fields))
        path = folder / repo_id
        model.save_pretrained(path)
        transformers.ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(path)
        put(hub, repo_id, path)
    base = folder / "google/vit-base-patch16-224-in21k"
    for task, labels in {"birds": ["finch", "robin", "wren"], "cars": ["coupe", "estate"]}.items():
        vit = transformers.AutoModelForImageClassification.from_pretrained(base)
        vit.config._name_or_path = "google/vit-base-patch16-224-in21k"
        config = VPTConfig(num_virtual_tokens=4, id2label=dict(enumerate(labels)))
        model = get_peft_model(vit, config)
        config.base_model_name_or_path = "google/vit-base-patch16-224-in21k"
        model.save_pretrained(folder / task)
        put(hub, f"user/{task}", folder / task)
    bin_folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        **hub.environment(str(tmp_path_factory.mktemp("home"))),
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with what the pages speak of: `flowers/` with two classes, and `photos/`, `streets/`, `cells/`."""
    import numpy as np
    import torch
    from PIL import Image
    from segmentation_data import write_coco, write_folders

    rng = np.random.default_rng(0)

    def draw(path: Path, hue: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (48, 64, 3))
        pixels[..., hue] += 120
        Image.fromarray(pixels.astype("uint8")).save(path)

    for split, count in (("train", 8), ("test", 4)):
        for hue, name in enumerate(("daisy", "tulip")):
            for index in range(count):
                draw(tmp_path / "flowers" / split / name / f"{index:03}.png", hue)
    for index in range(3):
        draw(tmp_path / "photos" / f"{index}.png", index % 2)
    # As the official code saves prompts: ten for each of twelve blocks
    arrays = {"shallow_prompt": (1, 10, 24), "deep_prompt": (11, 10, 24)}
    torch.save({name: rng.random(shape, np.float32) for name, shape in arrays.items()}, tmp_path / "prompt_ep100.pth")
    write_folders(tmp_path / "streets", {"train": 4, "validation": 2}, height=48, width=64)
    write_coco(tmp_path / "cells", {"train": 4, "valid": 2}, height=48, width=64)
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page, environment, workplace):
    command = [sys.executable, str(ROOT / "tests/run_page.py"), str(page)]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_a_block_that_fails_is_found(tmp_path, environment):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```bash\ntrue\nfalse\n```\n")
    command = [sys.executable, str(ROOT / "tests/run_page.py"), str(page)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0
