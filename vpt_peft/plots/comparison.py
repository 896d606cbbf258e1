"""What the rows of a comparison reach, against what they train, how long it takes and how much memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from ..reporting import Shown
from ..reporting.statistics import summarize
from .panels import MARKERS, logarithmic, new_panels, save_panels


if TYPE_CHECKING:
    import pandas


def draw_comparison(results: pandas.DataFrame, column: str, show: Shown, rows: Sequence[str], path: Path) -> Path:
    """Draw the mean score over data sets against trainable parameters, seconds of training and memory.

    Bars are the deviation of the mean over draws and seeds. Rows with failed runs are left out.

    Args:
        results: of `read_results`.
        column: the tested score.
        show: its title and scale.
        rows: in the order of the legend.
        path: of the picture; the ending decides the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    table = summarize(results, column).dropna(subset=["mean"])
    table = table.loc[[row for row in rows if row in table.index]]
    figure, axes = new_panels(3, list(table.index))
    for ax in axes[1:]:
        ax.sharey(axes[0])
    for ax, values, title in (
        (axes[0], table["parameters"], "trainable parameters"),
        (axes[1], table["seconds"], "seconds of training"),
        (axes[2], table["memory"], "most memory in use, bytes"),
    ):
        for (row, found), marker in zip(table.iterrows(), cycle(MARKERS), strict=False):
            spread = None if math.isnan(found["std"]) else show.scale * found["std"]
            ax.errorbar(
                [values[row]], [show.scale * found["mean"]], yerr=spread, marker=marker, capsize=3, ls="", label=row
            )
        logarithmic(ax)
        ax.set_xlabel(title)
    axes[0].set_ylabel(show.title)
    return save_panels(figure, axes, path)
