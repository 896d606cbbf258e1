"""Checkpoints and arguments that do not fit are refused by name, no stored code runs, nothing is left half done."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from conversion_samples import GRID, HEADS, HIDDEN, LABELS, WIDE, check_equal, npz_arrays, save, timm_weights
from transformers import ViTModel

from vpt_peft.conversion import SOURCES, ConversionError, convert_checkpoint


class Hostile:
    """Unpickling an instance makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "bare", "args", "npz"])
def test_pickled_code_never_runs(kind, tmp_path):
    trap = tmp_path / "ran"
    path = tmp_path / ("w.npz" if kind == "npz" else "w.pth")
    if kind == "npz":
        np.savez(path, **npz_arrays(timm_weights()), extra=np.array([Hostile(trap)], dtype=object))
    elif kind == "bare":
        path.write_bytes(pickle.dumps({"model": Hostile(trap)}))
    elif kind == "args":
        torch.save({"model": timm_weights(), "args": argparse.Namespace(output=Hostile(trap))}, path)
    else:
        torch.save({"model": timm_weights(), "extra": Hostile(trap)}, path)
    with pytest.raises(ConversionError, match="none has run"):
        convert_checkpoint(path, tmp_path / "vit", num_heads=HEADS)
    assert not trap.exists()
    assert not (tmp_path / "vit").exists()
    # The trap is a real one: without the guard it springs.
    if kind == "npz":
        np.load(path, allow_pickle=True)["extra"]
    elif kind == "bare":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_files(suffix, damage, tmp_path):
    weights = npz_arrays(timm_weights()) if suffix == ".npz" else timm_weights()
    path = save(tmp_path / f"w{suffix}", weights)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"<html>404 Not Found</html>", "empty": b""}[damage]
    )
    with pytest.raises(ConversionError, match="cannot be read as weights"):
        convert_checkpoint(path, tmp_path / "vit", num_heads=HEADS)
    assert os.listdir(tmp_path) == [path.name]


def without(name):
    return lambda w: w.pop(name)


def with_value(name, value):
    return lambda w: w.__setitem__(name, value)


NAN = torch.full((HIDDEN,), float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("norm.bias"), "missing: norm.bias"),
        (without("blocks.1.attn.qkv.bias"), "missing: blocks.1.attn.qkv.bias"),
        (without("patch_embed.proj.weight"), "Missing: patch_embed.proj.weight"),
        (without("pos_embed"), "Missing: pos_embed"),
        (with_value("blocks.0.ls1.gamma", torch.ones(HIDDEN)), "unexpected: blocks.0.ls1.gamma"),
        (with_value("blocks.7.norm1.weight", torch.ones(HIDDEN)), "missing: blocks.3.norm1.weight"),
        (with_value("dist_token", torch.ones(1, 1, HIDDEN)), "unexpected: dist_token"),
        (with_value("head.weight", torch.ones(LABELS, HIDDEN)), "missing: head.bias"),
        (with_value("cls_token", torch.ones(1, HIDDEN)), r"misshapen: cls_token is \(1, 32\), expected \(1, 1, 32\)"),
        (with_value("blocks.2.mlp.fc2.weight", torch.ones(WIDE, HIDDEN)), "misshapen: blocks.2.mlp.fc2.weight"),
        (with_value("pos_embed", torch.ones(1, GRID**2, HIDDEN)), "position embedding has 9 tokens"),
        (with_value("patch_embed.proj.weight", torch.ones(HIDDEN, 3, 4, 2)), "patches are 4x2"),
        (with_value("patch_embed.proj.weight", torch.ones(HIDDEN, 1, 4, 4)), "reads 1 channels"),
        (with_value("patch_embed.proj.weight", torch.ones(HIDDEN, 48)), "Misshapen: patch_embed.proj.weight"),
        (with_value("norm.weight", torch.ones(HIDDEN, dtype=torch.int64)), "no floating point numbers: norm.weight"),
        (with_value("norm.weight", NAN), "not finite: norm.weight"),
    ],
)
def test_weights_that_do_not_fit(change, message, tmp_path):
    weights = timm_weights()
    change(weights)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(save(tmp_path / "w.pth", weights), tmp_path / "vit", num_heads=HEADS)
    assert os.listdir(tmp_path) == ["w.pth"]


def test_a_misshapen_npz_names_its_own_tensor(tmp_path):
    arrays = npz_arrays(timm_weights())
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/out/kernel"
    arrays[name] = arrays[name].reshape(HIDDEN, HIDDEN)
    with pytest.raises(ConversionError, match=rf"misshapen: {name} is \(32, 32\), expected \(4, 8, 32\)"):
        convert_checkpoint(save(tmp_path / "w.npz", arrays), tmp_path / "vit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "clip"}, "source='clip' is unknown"),
        ({"source": "npz"}, "source='npz' does not fit"),
        ({"normalization": "inception"}, "normalization='inception'"),
        ({"num_heads": None}, "pass num_heads"),
        ({"num_heads": 5}, "num_heads=5 does not divide"),
        ({"num_heads": 0}, "num_heads=0 does not divide"),
        ({"image_size": 224}, "image_size=224 makes 56 patches"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, tmp_path):
    path = save(tmp_path / "w.pth", timm_weights())
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(path, tmp_path / "vit", **({"num_heads": HEADS} | arguments))
    assert os.listdir(tmp_path) == ["w.pth"]


@pytest.mark.parametrize("content", [{"model": {"a": 1}}, {}, [torch.ones(1)]], ids=["numbers", "empty", "list"])
@pytest.mark.parametrize("source", ["auto", *SOURCES])
def test_files_without_tensors(source, content, tmp_path):
    with pytest.raises(ConversionError, match="no tensors found|instead of a dict"):
        convert_checkpoint(save(tmp_path / "w.pth", content), tmp_path / "vit", source)


def test_paths_that_do_not_fit(tmp_path):
    path = save(tmp_path / "w.pth", timm_weights())
    with pytest.raises(FileNotFoundError, match="no.pth"):
        convert_checkpoint(tmp_path / "no.pth", tmp_path / "vit")
    with pytest.raises(ConversionError, match="is not a file"):
        convert_checkpoint(tmp_path, tmp_path / "vit")
    with pytest.raises(FileExistsError, match="is a file"):
        convert_checkpoint(path, path)


def test_existing_folders(tmp_path):
    """Only an empty folder or, on demand, an earlier conversion is replaced."""
    first, second = timm_weights(), timm_weights(head=True, seed=3)
    path, other = save(tmp_path / "a.pth", first), save(tmp_path / "b.pth", second)
    folder = tmp_path / "deep" / "vit"
    folder.mkdir(parents=True)
    convert_checkpoint(path, folder, num_heads=HEADS)
    with pytest.raises(FileExistsError, match="overwrite=True to replace"):
        convert_checkpoint(other, folder, num_heads=HEADS)
    check_equal(folder, first)
    convert_checkpoint(other, folder, num_heads=HEADS, overwrite=True)
    check_equal(folder, second)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        convert_checkpoint(path, folder, num_heads=HEADS, overwrite=True)
    check_equal(folder, second)
    assert os.listdir(folder.parent) == ["vit"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_write_that_fails_leaves_nothing(existing, tmp_path, monkeypatch):
    weights = timm_weights()
    path, folder = save(tmp_path / "w.pth", weights), tmp_path / "vit"
    if existing:
        convert_checkpoint(path, folder, num_heads=HEADS)
    before = sorted(os.listdir(tmp_path))

    def full(self, where, **_):
        (where / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ViTModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(path, folder, num_heads=HEADS, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == before
    if existing:
        check_equal(folder, weights)
