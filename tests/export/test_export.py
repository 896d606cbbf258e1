"""Exported files: equal to PyTorch at any batch size, whole in themselves, and never written half."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_fixtures import build
from peft import PeftModel, get_peft_model
from peft_fixtures import CONFIGS, LABELS, bare_vit, images, logits, lora, randomize
from peft_fixtures import dinov2 as three_blocks_of_dinov2
from peft_fixtures import vit as three_blocks_of_vit
from torch import nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import vpt_peft.export.export as export_module
from vpt_peft import VPTConfig
from vpt_peft.cli.export import run
from vpt_peft.export import export_model
from vpt_peft.export.metadata import _preprocessing
from vpt_peft.tuners.vpt.parameters import find_parameters


pytest_plugins = ["training_fixtures"]
for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)
import onnx  # noqa: E402
import onnxruntime  # noqa: E402


BLOCKS = 2
vit = partial(three_blocks_of_vit, num_hidden_layers=BLOCKS)
dinov2 = partial(three_blocks_of_dinov2, num_hidden_layers=BLOCKS)
POOLED = {"pooled": {}, "pooled_mae": {"pooling": "prompt", "pool_before_norm": True}}
METADATA = {"labels", "preprocessing", "prompt_config", "base_model", "versions"}
# Runs a file in an interpreter in which neither this package nor those it stands on can be imported.
APART = """
import json, sys
import numpy as np
path, images, output, *refused = sys.argv[1:]
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
x = np.load(images)
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"pixel_values": x})[0]
    metadata = session.get_modelmeta().custom_metadata_map
else:
    import torch
    extra = {"metadata.json": ""}
    found = torch.export.load(path, extra_files=extra).module()(torch.from_numpy(x))["logits"].numpy()
    metadata = json.loads(extra["metadata.json"])
np.savez(output, logits=found)
print(json.dumps(metadata))
"""


def attach(name: str, base: nn.Module, **given: Any) -> PeftModel:
    given = {**POOLED.get(name, {}), **given}
    model = get_peft_model(base, CONFIGS["pooled" if name in POOLED else name](**given))
    return randomize(model, 3, trainable_only=True).eval()  # type: ignore[return-value]


def prompted(name: str = "deep", **given: Any) -> PeftModel:
    return attach(name, vit(torch.float32), **given)


def run_apart(path: Path, pixels: torch.Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits and metadata of a file in an interpreter of its own."""
    refused = ["vpt_peft", "peft", "transformers", *(["torch"] if path.suffix == ".onnx" else [])]
    inputs, outputs = path.with_name("images.npy"), path.with_name("logits.npz")
    np.save(inputs, pixels.numpy())
    command = [sys.executable, "-I", "-c", APART, *map(str, (path, inputs, outputs)), *refused]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = {name: json.loads(text) for name, text in json.loads(done.stdout.splitlines()[-1]).items()}
    return np.load(outputs)["logits"], metadata


def onnx_logits(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_rows(run: Callable[[torch.Tensor], torch.Tensor], model: PeftModel) -> None:
    """A file's logits are the model's at batches of 1, 3 and 8, and the prompts have a part in them."""
    for batch in (1, 3, 8):
        pixels = images(batch, torch.float32, seed=batch)
        wanted = logits(model, pixels)
        assert (run(pixels) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with model.disable_adapter():
        assert (logits(model, pixels) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "make", "opset"), [("shallow", vit, 18), ("gated", dinov2, None)])
def test_onnx_is_the_model(name: str, make, opset: int | None, tmp_path):
    model = attach(name, make(torch.float32))
    path = export_model(model, tmp_path / "model", opset=opset, check=False)
    assert path == tmp_path / "model.onnx"
    check_rows(lambda pixels: onnx_logits(path, pixels), model)
    written = onnx.load(path)
    assert opset is None or {entry.domain: entry.version for entry in written.opset_import}[""] == opset
    (first,) = written.graph.input
    shape = [dim.dim_param or dim.dim_value for dim in first.type.tensor_type.shape.dim]
    assert first.name == "pixel_values" and shape == ["batch", 3, 32, 32]


@pytest.mark.parametrize(
    ("name", "make"),
    [("gated_elementwise", vit), ("pooled_mae", vit), ("channel", vit)],
)
def test_torch_is_the_model(name: str, make, tmp_path):
    model = attach(name, make(torch.float32))
    path = export_model(model, tmp_path, "torch", check=False)
    assert path == tmp_path / "model.pt2"
    program = torch.export.load(path).module()
    check_rows(lambda pixels: program(pixels)["logits"], model)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_runs_without_the_package_and_knows_itself(format: str, tmp_path):
    base = vit(torch.float32)
    base.config.id2label = {index: f"bird {index}" for index in range(LABELS)}
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3, image_std=[0.3] * 3)
    model, pixels = attach("deep", base), images(4, torch.float32)
    path = export_model(model, tmp_path / "out" / "birds", format, image_processor=processor)  # type: ignore[arg-type]
    found, metadata = run_apart(path, pixels)
    assert np.abs(found - logits(model, pixels).numpy()).max() < 1e-5
    assert set(metadata) == METADATA and metadata["labels"]["3"] == "bird 3" and len(metadata["labels"]) == LABELS
    preprocessing = metadata["preprocessing"]
    assert preprocessing["image_mean"] == [0.1] * 3 and preprocessing["image_std"] == [0.3] * 3
    assert preprocessing["rescale_factor"] == pytest.approx(1 / 255)
    assert preprocessing["size"] == {"height": 32, "width": 32}
    assert metadata["prompt_config"]["num_virtual_tokens"] == 4 and metadata["prompt_config"]["peft_type"] == "VPT"
    assert metadata["base_model"]["model_type"] == "vit"
    assert metadata["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "images.npy", "logits.npz"])


def test_deep_prompts_are_constants(tmp_path):
    """Neither a norm nor a map runs on the prompts in the file."""
    counts = {}
    for name in ("deep", "deep_tokens"):
        graph = torch.export.load(export_model(prompted(name), tmp_path / name, "torch", check=False)).graph
        rows = [node.meta["val"].shape for node in graph.nodes if "linear" in str(node.target)]
        counts[name] = len(rows), {shape[1] for shape in rows if len(shape) == 3}
    assert counts == {"deep": (6 * BLOCKS + 1, {17}), "deep_tokens": (6 * BLOCKS + 1, {17 + 4})}


def test_the_model_is_left_alone(tmp_path):
    model, pixels = attach("deep", vit(torch.float32)).train(), images(2, torch.float32)
    modes = [module.training for module in model.modules()]
    before, implementation = state(model), model.config._attn_implementation
    export_model(model, tmp_path / "a.pt2", "torch", check=False)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    after = state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert not find_parameters(model).layers[0].merged_adapters  # type: ignore[union-attr]
    assert all(p.grad is None for p in model.parameters())
    assert model(pixel_values=pixels).logits.requires_grad


def test_merged_already(tmp_path):
    model, pixels = prompted(), images(3, torch.float32)
    model.merge_adapter()
    path = export_model(model, tmp_path / "a", "torch", check=False)
    assert (torch.export.load(path).module()(pixels)["logits"] - logits(model, pixels)).abs().max() < 1e-5
    assert find_parameters(model).layers[0].merged_adapters == ["default"]  # type: ignore[union-attr]


def test_half_precision_is_exported_in_float32(tmp_path):
    model = attach("deep", vit(torch.bfloat16))
    path = export_model(model, tmp_path / "a", "torch", check=False)
    found = torch.export.load(path).module()(images(2, torch.float32))["logits"]
    assert found.dtype == torch.float32
    assert (found - logits(model, images(2, torch.bfloat16)).float()).abs().max() < 0.1


def test_several_adapters(tmp_path):
    model, pixels = prompted("deep"), images(2, torch.float32)
    model.add_adapter("other", CONFIGS["shallow"](modules_to_save=[]))
    randomize(model, 4, trainable_only=True)
    model.base_model.set_adapter(["default", "other"])
    before = logits(model, pixels)
    with pytest.raises(ValueError, match="default.*other"):
        export_model(model, tmp_path / "a", "torch")
    assert torch.equal(logits(model, pixels), before) and not list(tmp_path.iterdir())
    model.set_adapter("other")
    path = export_model(model, tmp_path / "a", "torch", check=False)
    assert (torch.export.load(path).module()(pixels)["logits"] - logits(model, pixels)).abs().max() < 1e-5


def test_other_methods_below(tmp_path):
    """LoRA in the backbone goes into its weights."""
    pixels = images(2, torch.float32)
    inner = get_peft_model(vit(torch.float32), lora(), "below")
    model = attach("deep", inner.base_model.model)
    assert (logits(model, pixels) - logits(prompted(), pixels)).abs().max() > 1e-2
    path = export_model(model, tmp_path / "a", "torch", check=False)
    program = torch.export.load(path)
    assert (program.module()(pixels)["logits"] - logits(model, pixels)).abs().max() < 1e-5
    assert sum("linear" in str(node.target) for node in program.graph.nodes) == 6 * BLOCKS + 1


@pytest.mark.parametrize(("name", "format"), [("beit", "onnx"), ("swin", "torch")])
def test_other_encoders(name: str, format: str, tmp_path):
    """Biases among the masks, and windows with intercepted attention; the comparison is part of the export."""
    model = randomize(get_peft_model(build(name, dtype=torch.float32), VPTConfig(num_virtual_tokens=2)), 3, True)
    assert export_model(model, tmp_path / "a", format).is_file()  # type: ignore[arg-type]


def test_bare_backbone_has_no_labels(tmp_path):
    model = attach("deep", bare_vit(torch.float32), modules_to_save=[])
    extra = {"metadata.json": ""}
    program = torch.export.load(export_model(model, tmp_path / "a", "torch", check=False), extra_files=extra).module()
    assert list(program(images(2, torch.float32))) == ["last_hidden_state"]
    assert json.loads(json.loads(extra["metadata.json"])["labels"]) == {}


def test_image_size(tmp_path):
    model, pixels = prompted(), images(3, torch.float32, size=48)
    path = export_model(model, tmp_path / "a", "torch", image_size=(48, 48), check=False)
    found = torch.export.load(path).module()(pixels)["logits"]
    assert (found - logits(model, pixels, interpolate_pos_encoding=True)).abs().max() < 1e-5


CROPPING = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 28}}


def test_size_comes_from_the_processor(tmp_path):
    """DINOv2 says 518 in its configuration and crops 224: the processor decides."""
    model = attach("deep", dinov2(torch.float32))
    path = export_model(model, tmp_path / "a", "torch", image_processor=ViTImageProcessorPil(**CROPPING), check=False)
    assert torch.export.load(path).module()(images(2, torch.float32, size=24))["logits"].shape == (2, LABELS)


@pytest.mark.parametrize(
    ("options", "augmentation", "size", "resized", "cropped"),
    [
        ({"size": {"height": 32, "width": 32}}, "none", (48, 32), {"height": 48, "width": 32}, None),
        ({"size": {"shortest_edge": 32}}, "none", (32, 32), {"height": 32, "width": 32}, None),
        (CROPPING, "none", (24, 24), {"shortest_edge": 28}, 24),
        (CROPPING, "none", (48, 48), {"shortest_edge": 56}, 48),
        (CROPPING, "resize", (24, 24), {"height": 24, "width": 24}, None),
        ({}, "resize_crop_flip", (224, 224), {"shortest_edge": 256}, 224),
    ],
)
def test_preprocessing_gives_the_size_of_the_file(options, augmentation, size, resized, cropped):
    settings = _preprocessing(ViTImageProcessorPil(**options), size, augmentation)
    assert settings["size"] == resized and bool(settings["do_center_crop"]) == (cropped is not None)
    assert cropped is None or settings["crop_size"] == {"height": cropped, "width": cropped}


def test_adapter_folder_and_command(run_training, tmp_path, capsys):
    from vpt_peft.training.inference import load_adapter_model

    _, folder = run_training(method="vpt", num_virtual_tokens=3, augmentation="resize_crop_flip")
    capsys.readouterr()
    assert run([str(folder), str(tmp_path / "digits"), "--format", "torch"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "digits.pt2"
    pixels, extra = images(4, torch.float32, size=16), {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    metadata = {name: json.loads(text) for name, text in json.loads(extra["metadata.json"]).items()}
    model, _ = load_adapter_model(folder)
    assert (program(pixels)["logits"] - logits(model, pixels)).abs().max() < 1e-4
    assert metadata["labels"] == {str(digit): str(digit) for digit in range(10)}
    shown = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}
    assert shown.items() <= metadata["preprocessing"].items()


def test_the_command_checks_the_target_before_it_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("vpt_peft.training.inference.local_folder", lambda *_: pytest.fail("looked for the adapter"))
    for flags, message in (
        (["--format", "torch", "--opset", "18"], "opset=18.*torch"),
        (["--image_size", "0"], "image_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(["user/adapter", str(tmp_path / "a"), *flags])


@pytest.fixture
def run_training(make_arguments):
    from vpt_peft.training.train import train

    def do(**given):
        arguments = make_arguments(**given)
        return train(arguments), Path(arguments.training.output_dir)

    return do


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"format": "tflite"}, ValueError, "tflite.*onnx, torch"),
        ({"output": "model.pt2"}, ValueError, "model.pt2.*.onnx"),
        ({"opset": 5}, ValueError, "opset=5.*18"),
        ({"opset": 900}, ValueError, "opset=900"),
        ({"opset": "18"}, TypeError, "opset='18'"),
        ({"opset": 18, "format": "torch"}, ValueError, "opset=18.*torch"),
        ({"image_size": 0}, ValueError, "image_size=0"),
        ({"image_size": (32, 32, 3)}, ValueError, "image_size"),
        ({"image_size": 32.5}, TypeError, "image_size=32.5"),
        ({"image_size": 4}, ValueError, "image_size"),
        ({"model": nn.Linear(2, 2)}, TypeError, "Linear"),
        ({"model": "out/adapter"}, TypeError, "model is a str.*`vpt-peft export` takes the folder"),
        ({"output": "file/model"}, NotADirectoryError, "'file' is a file"),
        ({"output": "file/deeper/model"}, NotADirectoryError, "'file' is a file"),
    ],
    ids=str,
)
def test_bad_input(given: dict[str, Any], error: type[Exception], message: str, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(error, match=message):
        export_model(**{"model": prompted(), "output": "model", **given})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_prompts(tmp_path):
    model = prompted()
    with pytest.raises(ValueError, match="none"):
        export_model(vit(torch.float32), tmp_path / "a")
    with model.disable_adapter(), pytest.raises(ValueError, match="no prompt adapter is active.*default"):
        export_model(model, tmp_path / "a")


@pytest.mark.parametrize(("missing", "check"), [("onnxscript", False), ("onnxruntime", True)])
def test_missing_extra(missing: str, check: bool, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}.*pip install vpt_peft\[export\]"):
        export_model(prompted(), tmp_path / "a", check=check)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_file_that_differs_is_not_kept(format: str, tmp_path, monkeypatch):
    """The earlier file stays when a new one fails its comparison; neither scratch files nor new folders are left."""
    kept = tmp_path / ("a.onnx" if format == "onnx" else "a.pt2")
    kept.write_bytes(b"earlier")
    output = kept if format == "onnx" else tmp_path / "new" / "folder" / "a"
    merge = export_module.merge_prompts

    def spoil(model, adapter):
        merge(model, adapter)
        randomize(model, 9)

    monkeypatch.setattr(export_module, "merge_prompts", spoil)
    with pytest.raises(RuntimeError, match="differ from PyTorch's"):
        export_model(prompted(), output, format)  # type: ignore[arg-type]
    assert kept.read_bytes() == b"earlier" and [path.name for path in tmp_path.iterdir()] == [kept.name]
