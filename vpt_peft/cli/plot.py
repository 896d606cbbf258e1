"""`vpt-peft plot FOLDER ... [--kind curves]`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .options import need_training


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# kind: what it shows
OF_RUNS = {"curves": "loss and metric over epochs", "tradeoff": "the metric against trainable parameters and seconds"}
OF_ADAPTERS = {
    "gates": "gate openings, their shares and attention temperatures, by block",
    "attention": "what the class token, or a patch, attends to in four blocks, over the image",
    "prompt_attention": "how much each prompt is attended, by block",
    "prompts": "prompts among the tokens of their blocks (PCA)",
}
NEED_IMAGES = ("attention", "prompt_attention", "prompts")


def run(argv: Sequence[str]) -> int:
    """Draw runs or an adapter to a picture and print its path."""
    kinds = {**OF_RUNS, **OF_ADAPTERS}
    parser = ArgumentParser(
        prog="vpt-peft plot",
        description="Draw finished runs (output folders of train, compare or sweep; seeds are averaged), or look into "
        "one adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", help="output folders; for pictures of an adapter its folder or Hub id")
    parser.add_argument(
        "--kind",
        choices=tuple(kinds),
        default="curves",
        help="; ".join(f"{name}: {text}" for name, text in kinds.items()),
    )
    parser.add_argument("--images", nargs="+", help="image files or folders, for pictures that need some")
    parser.add_argument("--patch", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="attention: of this patch")
    parser.add_argument("--output_file", help="picture to write, .png, .pdf or .svg; default: <kind>.png")
    own = parser.parse_args(list(argv))
    if own.kind in NEED_IMAGES and not own.images:
        parser.error(f"--kind {own.kind} needs --images.")
    if own.kind in OF_ADAPTERS and len(own.folders) != 1:
        parser.error(f"--kind {own.kind} takes one adapter, not {len(own.folders)}.")
    for name in ("images", "patch"):
        if getattr(own, name) and own.kind not in (NEED_IMAGES if name == "images" else ("attention",)):
            parser.error(f"--{name} has no effect with --kind {own.kind}; drop it.")

    need_training()
    from ..plots import plot, save_figure

    output_file = own.output_file or f"{own.kind}.png"
    if own.kind in OF_RUNS:
        print(plot(own.folders, output_file, own.kind))
    else:
        print(save_figure(_figure_of_adapter(own), output_file))
    return 0


def _figure_of_adapter(own: Namespace) -> Figure:
    from .. import plots
    from ..data.images import find_images, to_rgb
    from ..training.inference import load_adapter_model

    model, processor = load_adapter_model(own.folders[0])
    if own.kind == "gates":
        return plots.draw_gates(model)
    images = [to_rgb(path) for path in find_images(own.images)]
    if own.kind == "attention":
        images = images[:1]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    if own.kind == "attention":
        return plots.draw_attention(model, pixels, token=tuple(own.patch) if own.patch else "class")
    if own.kind == "prompts":
        return plots.draw_prompts(model, pixels)
    return plots.draw_prompt_attention(model, pixels)
