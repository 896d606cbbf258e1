"""Published rows, for a table of their own beside what was measured: as printed, never mixed with it.

Source: Jia et al. 2022, arXiv 2203.12119, ViT-B/16 pre-trained on ImageNet-21k.
"""

from __future__ import annotations

from ..data.suites import Suite
from ..reporting import markdown_table


# FGVC, then VTAB-1k natural, specialized, structured: means over data sets, in percent
_VPT_PAPER = {
    "full": (88.54, 75.88, 83.36, 47.64),
    "linear": (79.32, 68.93, 77.16, 26.84),
    "partial": (82.63, 69.44, 78.53, 34.17),
    "mlp": (79.80, 67.80, 72.83, 30.62),
    "sidetune": (78.35, 58.21, 68.12, 23.41),
    "bias": (88.41, 73.30, 78.25, 44.09),
    "adapter": (85.66, 70.39, 77.11, 33.43),
    "vpt_shallow": (84.62, 76.81, 79.66, 46.98),
    "vpt": (89.11, 78.48, 82.43, 54.98),
}
# Data sets in the groups of VTAB-1k
_SIZES = (7, 4, 8)


def published_table(suite: Suite) -> str:
    """Return what the VPT paper reports on a suite, with its source."""
    lines = []
    for row, (fgvc, *groups) in _VPT_PAPER.items():
        if suite.name == "fgvc":
            lines.append({"method": row, "mean": f"{fgvc:.2f}"})
        else:
            over_sets = sum(size * mean for size, mean in zip(_SIZES, groups, strict=True)) / sum(_SIZES)
            names = ("natural", "specialized", "structured")
            lines.append(
                {"method": row, "mean": f"{over_sets:.2f}", "mean of groups": f"{sum(groups) / len(groups):.2f}"}
                | {name: f"{mean:.2f}" for name, mean in zip(names, groups, strict=True)}
            )
    return (
        "As published by Jia et al. 2022 (top-1 in %, ViT-B/16 of ImageNet-21k, their own training and search):\n\n"
        + markdown_table(lines, left=["method"])
    )
