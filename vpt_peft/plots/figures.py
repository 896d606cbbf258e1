"""What pictures share: a canvas without pyplot's global state, and colours that colour-blind people can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
ADAPTER, PROMPTS, PATCHES = COLORS[0], COLORS[5], COLORS[4]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'vpt_peft[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, output_file: str | Path) -> Path:
    """Save a figure and return its path.

    Raises:
        ValueError: matplotlib does not write files of this ending.
    """
    path = Path(output_file)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"output_file={str(path)!r} must end in one of .{', .'.join(sorted(known))}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
