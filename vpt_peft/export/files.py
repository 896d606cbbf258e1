"""Write the files, and run them again for comparison."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from torch.export import ExportedProgram

METADATA_FILE = "metadata.json"
TOLERANCE = 1e-4

Tensors = dict[str, torch.Tensor]


def write_onnx(
    program: ExportedProgram,
    path: Path,
    argument: str,
    names: Sequence[str],
    metadata: dict[str, str],
    opset: int | None,
) -> None:
    """Write an ONNX file with the input `argument`, the outputs `names` and a first dimension called "batch"."""
    with _quiet("torch.onnx"):
        converted: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[argument],
            output_names=list(names),
            opset_version=opset,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    converted.model.metadata_props.update(metadata)
    converted.save(path)


def write_torch(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Write a file for `torch.export.load`, the metadata in an extra file."""
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def compare(path: Path, format: str, batches: Sequence[torch.Tensor], expected: Sequence[Tensors]) -> None:
    """Run a written file on `batches` and compare with the `expected` outputs.

    Raises:
        RuntimeError: An output differs by more than 1e-4 plus 1e-4 of its value.
    """
    run = _onnx_runner(path) if format == "onnx" else torch.export.load(path).module()
    for batch, wanted in zip(batches, expected, strict=True):
        with torch.no_grad():
            found = run(batch)
        for name, value in wanted.items():
            if not torch.allclose(found[name], value, rtol=TOLERANCE, atol=TOLERANCE):
                difference = float((found[name] - value).abs().max())
                raise RuntimeError(
                    f"the exported file's {name} differ from PyTorch's by {difference:.1e} at batch {len(batch)}, so it was "
                    "not kept; does the model draw random numbers in its forward pass? check=False writes it."
                )


def _onnx_runner(path: Path) -> Callable[[torch.Tensor], Tensors]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names, argument = [value.name for value in session.get_outputs()], session.get_inputs()[0].name

    def run(images: torch.Tensor) -> Tensors:
        outputs = session.run(names, {argument: images.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

    return run


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep back warnings about packages that the exporter knows and the model does not need."""
    named = logging.getLogger(name)
    level = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(level)
