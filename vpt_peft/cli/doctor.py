"""`vpt-peft doctor`."""

from __future__ import annotations

import os
import platform
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..requirements import installed, known_extras, lacks, needed
from ..version import __version__


# What commands need beyond the package's own requirements; those that share it in one line
EXTRAS = {
    "train, evaluate, predict, push": "train",
    "train with boxes and masks": "dense",
    "plot": "plots",
    "sweep, compare": "sweep",
    "export": "export",
    "app": "app",
    "demo": "demo",
    "quantized backbones": "quantized",
}


def run(argv: Sequence[str]) -> int:
    """Print the report; 1 where something that every command needs is missing."""
    ArgumentParser(
        prog="vpt-peft doctor",
        description="Report versions, device, precision, attention kernels, and what is missing for which command: to "
        "paste into a bug report.",
    ).parse_args(list(argv))
    for name, value in report():
        print(f"{name + ':':<33}{value}")
    return 1 if any(map(lacks, needed())) else 0


def report() -> Iterator[tuple[str, str]]:
    """The lines of the report, as name and value."""
    where = Path(__file__).parents[1]
    yield "vpt_peft", f"{__version__} in {where}" + ("" if needed() else ", not installed: pip install -e .")
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    memory = _memory()
    yield "machine", f"{os.cpu_count()} CPU cores{memory}"
    for each in needed():
        found = installed(each.name)
        yield each.name, f"{found or 'missing'}{f', needs {each.specifier}' if lacks(each) else ''}"
    try:
        import torch
    except Exception as error:
        yield "torch", f"cannot be imported: {' '.join(str(error).split())}"
        return
    yield from _devices(torch)
    for commands, extra in EXTRAS.items():
        missing = [each.name + str(each.specifier) for each in needed(extra) if lacks(each)]
        remedy = f"needs {', '.join(missing)}: pip install 'vpt_peft[{extra}]'"
        if extra not in known_extras():
            yield commands, "not known here, as the package was installed before: install it again"
        else:
            yield commands, remedy if missing else "ok"


def _memory() -> str:
    try:
        import psutil
    except ModuleNotFoundError:
        return ""
    memory = psutil.virtual_memory()
    return f", {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory available"


def _devices(torch: Any) -> Iterator[tuple[str, str]]:
    names = ["cpu"]
    yield "device cpu", f"vector instructions: {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"cuda:{index}")
        yield (
            f"device cuda:{index}",
            f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        )
    if torch.backends.mps.is_available():
        names.append("mps")
        yield "device mps", "Apple GPU"
    for name in names:
        works = {
            str(dtype).removeprefix("torch."): _kernels(torch, name, dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        yield f"precision on {name}", ", ".join(dtype for dtype, kernels in works.items() if kernels) or "none works"
        found = "; ".join(f"{dtype}: {', '.join(kernels)}" for dtype, kernels in works.items() if kernels)
        yield f"attention kernels on {name}", found or "none works"


def _kernels(torch: Any, device: str, dtype: Any) -> list[str]:
    """The kernels of scaled dot product attention that run forward and backward, found by running them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found = []
    for kernel in SDPBackend.__members__.values():
        try:
            query = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype, requires_grad=True)
            with sdpa_kernel(kernel):
                torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        except RuntimeError:
            continue
        found.append(kernel.name.removesuffix("_ATTENTION").lower())
    return found
