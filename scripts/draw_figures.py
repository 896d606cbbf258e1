"""Draw the figures of README and docs: the method, and its cost from the benchmark's results.

python scripts/draw_figures.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
COST = ROOT / "benchmarks/results/p100_200/cpu_vit_base_float32_eager_batch8.json"

# Okabe and Ito's colours, which colour-blind readers can tell apart
PROMPT, CLASS, PATCH, FROZEN, INK = "#E69F00", "#56B4E9", "#BBD7EA", "#ECECEC", "#222222"
OURS, TOKENS, LORA, FULL = "#0072B2", "#E69F00", "#009E73", "#555555"


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 9) -> None:
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.06", fc=color, ec=INK, lw=0.8)
    ax.add_patch(shape)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, lw=1.1))


def tokens(ax: Axes, x: float, y: float, prompts: bool, faded: bool = False) -> None:
    """A row of tokens: class, prompts where they run among the others, patches."""
    names = [("x", CLASS)] + [("P", PROMPT)] * (3 if prompts else 0) + [("E", PATCH)] * 5
    for index, (name, color) in enumerate(names):
        gone = faded and name == "P"
        box(ax, x + 0.42 * index, y, 0.36, 0.36, "" if gone else name, "#FFFFFF" if gone else color, 8)
        if gone:
            ax.plot(
                [x + 0.42 * index, x + 0.42 * index + 0.36],
                [y, y + 0.36],
                color=PROMPT,
                lw=1.2,
                solid_capstyle="round",
            )


def draw_method() -> Figure:
    """A deep block: prompts as tokens, and the same function with prompts as keys and values."""
    figure = Figure(figsize=(9.2, 4.1), facecolor="white")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.02, wspace=0.03)
    for ax in (left, right):
        ax.set(xlim=(0, 5), ylim=(-0.1, 4.6), aspect="equal")
        ax.axis("off")

    left.set_title("the papers: prompts are tokens", fontsize=11, color=INK)
    tokens(left, 0.6, 0.0, prompts=True)
    arrow(left, (2.45, 0.42), (2.45, 0.76))
    box(left, 0.6, 0.8, 3.72, 0.4, "norm", FROZEN)
    arrow(left, (2.45, 1.2), (2.45, 1.52))
    box(left, 0.6, 1.55, 1.16, 0.42, "Q of all", FROZEN)
    box(left, 1.88, 1.55, 1.16, 0.42, "K of all", FROZEN)
    box(left, 3.16, 1.55, 1.16, 0.42, "V of all", FROZEN)
    arrow(left, (2.45, 1.97), (2.45, 2.28))
    box(left, 0.6, 2.3, 3.72, 0.4, "attention, output projection", FROZEN)
    arrow(left, (2.45, 2.7), (2.45, 3.02))
    box(left, 0.6, 3.05, 3.72, 0.4, "norm, MLP", FROZEN)
    arrow(left, (2.45, 3.45), (2.45, 3.77))
    tokens(left, 0.6, 3.8, prompts=True, faded=True)
    left.text(2.45, 4.42, "outputs of prompts are thrown away", ha="center", fontsize=8.5, color="#8a5a00")

    right.set_title("here: keys and values, the same outputs", fontsize=11, color=INK)
    tokens(right, 2.1, 0.0, prompts=False)
    for index in range(3):
        box(right, 0.35 + 0.42 * index, 0.0, 0.36, 0.36, "P", PROMPT, 8)
    arrow(right, (3.3, 0.42), (3.3, 0.76))
    arrow(right, (0.95, 0.42), (0.95, 0.76), "#b87a00")
    box(right, 2.1, 0.8, 2.46, 0.4, "norm", FROZEN)
    box(right, 0.35, 0.8, 1.2, 0.4, "norm", FROZEN)
    arrow(right, (3.3, 1.2), (3.3, 1.52))
    arrow(right, (0.95, 1.2), (0.95, 1.52), "#b87a00")
    for index, name in enumerate("QKV"):
        box(right, 2.1 + 0.84 * index, 1.55, 0.78, 0.42, name, FROZEN)
    box(right, 0.35, 1.55, 0.57, 0.42, "K", PROMPT)
    box(right, 0.98, 1.55, 0.57, 0.42, "V", PROMPT)
    arrow(right, (3.3, 1.97), (3.3, 2.28))
    arrow(right, (0.95, 1.97), (2.05, 2.45), "#b87a00")
    box(right, 2.1, 2.3, 2.46, 0.4, "attention, projection", FROZEN)
    arrow(right, (3.3, 2.7), (3.3, 3.02))
    box(right, 2.1, 3.05, 2.46, 0.4, "norm, MLP", FROZEN)
    arrow(right, (3.3, 3.45), (3.3, 3.77))
    tokens(right, 2.1, 3.8, prompts=False)
    right.text(0.98, 2.75, "once per block,\nnot per image", ha="center", fontsize=8.5, color="#8a5a00")
    return figure


def draw_cost() -> Figure:
    """Training step and memory against the number of prompts, as ratios to the backbone without prompts."""
    rows = json.loads(COST.read_text(encoding="utf-8"))["rows"]
    figure = Figure(figsize=(9.2, 3.3), facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    panels = {"step": "training step", "inference": "inference", "memory": "memory of a step"}
    for ax, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for method, label, color, marker in (
            ("deep_kv", "VPT-deep, here", OURS, "o"),
            ("deep_token", "VPT-deep as tokens", TOKENS, "s"),
        ):
            points = sorted((row["prompts"], ratio(row, key)) for row in rows if row["method"] == method)
            ax.plot(
                [0, *(p for p, _ in points)], [1.0, *(r for _, r in points)], color=color, marker=marker, label=label
            )
        for method, label, color, style in (("lora", "LoRA r=8", LORA, "--"), ("full", "full fine-tuning", FULL, ":")):
            (value,) = (ratio(row, key) for row in rows if row["method"] == method)
            ax.axhline(value, color=color, ls=style, label=label)
        ax.set(title=title, xlabel="prompts per block", ylim=(0.9, None), xticks=[0, 100, 200])
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ratio to no prompts")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def ratio(row: dict, key: str) -> float:
    """A ratio's median, or the number itself."""
    value = row[key]
    return value["median"] if isinstance(value, dict) else value


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "vpt_peft"
    for name, figure in (("method", draw_method()), ("cost", draw_cost())):
        # Without a date, so that drawing again changes nothing
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
