"""Read checkpoint files without running any code they may hold."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import ConversionError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a `.npz`, `.safetensors` or PyTorch file into a dict, with tensors on the CPU.

    Pickled code never runs: PyTorch files are read with `weights_only=True` (`argparse.Namespace`, which MAE and DINO
    store beside their weights, is the only class let through) and numpy files with `allow_pickle=False`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ConversionError: `path` is a folder, is damaged, holds pickled code, or does not hold a dict.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint={str(path)!r} does not exist.")
    if not path.is_file():
        raise ConversionError(
            f"checkpoint={str(path)!r} is not a file; give the checkpoint file itself (.pth, .pth.tar, .pt, .bin, "
            ".safetensors or .npz)."
        )
    suffix = path.suffix.lower()
    try:
        if suffix == ".npz":
            content: Any = _read_npz(path)
        elif suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or hostile file can fail anywhere in the three readers, so no narrower list would be complete.
        raise ConversionError(
            f"checkpoint={str(path)!r} cannot be read as weights: it is damaged, is not a {_kind(suffix)} file, or "
            "holds pickled objects, which are refused because they can run code (none has run). Download it again, "
            f"or ask its publisher for plain weights. The reader said: {_first_lines(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"checkpoint={str(path)!r} holds a {type(content).__name__} instead of a dict of named tensors."
        )
    return {str(name): value for name, value in content.items()}


def _read_npz(path: Path) -> dict[str, Tensor]:
    # Raises on purpose for a plain .npy array renamed to .npz.
    with np.load(path, allow_pickle=False) as archive:
        return {name: _to_tensor(archive[name]) for name in archive.files}


def _to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        # numpy has no bfloat16: JAX stores it as two raw bytes.
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _kind(suffix: str) -> str:
    return {".npz": "numpy .npz", ".safetensors": "safetensors"}.get(suffix, "PyTorch")


def _first_lines(error: Exception, limit: int = 400) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."
