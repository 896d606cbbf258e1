"""A tiny backbone and short runs on scikit-learn's digits, shared by the tests of training and command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vpt_peft.training.arguments import parse_args
from vpt_peft.training.train import train


@pytest.fixture(scope="session", autouse=True)
def feature_cache(tmp_path_factory: pytest.TempPathFactory):
    """Where features are cached unless a test says otherwise."""
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpt_peft.training.train.default_cache_dir", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random ViT: 3 blocks of width 32, 16 px images, a head of 5 labels, dropout 0.1."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
        hidden_dropout_prob=0.1,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def short_run(backbone: str, output_dir: Path, **given):
    """Arguments of a short run on digits; keywords replace them."""
    return parse_args(
        {
            "model_name_or_path": backbone,
            "dataset_name": "digits",
            "max_train_samples": 96,
            "max_eval_samples": 50,
            "max_predict_samples": 50,
            "per_device_train_batch_size": 32,
            "num_train_epochs": 1,
            "output_dir": str(output_dir),
            "disable_tqdm": True,
            **given,
        }
    )


@pytest.fixture
def make_arguments(tiny_vit: str, tmp_path: Path):
    """`short_run` on the tiny ViT into `tmp_path / "out"`."""
    return lambda **given: short_run(tiny_vit, **{"output_dir": tmp_path / "out", **given})


@pytest.fixture
def run(make_arguments):
    """Train with `make_arguments(**given)` and return (metrics, output folder)."""

    def do(**given):
        arguments = make_arguments(**given)
        return train(arguments), Path(arguments.training.output_dir)

    return do


@pytest.fixture(scope="session")
def finished(tiny_vit: str, tmp_path_factory: pytest.TempPathFactory):
    """(metrics, output folder) of a run that is made once for all tests that ask for it; they only read it."""
    runs: dict[str, tuple[dict[str, float], Path]] = {}

    def get(**given):
        key = json.dumps(given, sort_keys=True)
        if key not in runs:
            folder = tmp_path_factory.mktemp("finished") / "out"
            runs[key] = train(short_run(tiny_vit, folder, **given)), folder
        return runs[key]

    return get


@pytest.fixture
def copied(finished, tmp_path: Path):
    """Likewise, as a copy in `tmp_path / "out"` that a test may change."""

    def get(**given):
        metrics, folder = finished(**given)
        return metrics, Path(shutil.copytree(folder, tmp_path / "out"))

    return get
