"""The demonstration: a linear probe and three kinds of prompts on the embedded backbones, as a table and a picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .arguments import parse_args
from .data import load_image_dataset
from .inference import evaluate_model, load_adapter_model
from .output import write_json
from .train import train


logger = logging.getLogger(__name__)

SUPERVISED, MAE = "embedded", "embedded-mae"
ROWS = (
    (SUPERVISED, "linear"),
    (SUPERVISED, "vpt_shallow"),
    (SUPERVISED, "vpt"),
    (MAE, "linear"),
    (MAE, "vpt_shallow"),
    (MAE, "gated_vpt"),
)
NAMES = {"linear": "linear probe", "vpt_shallow": "VPT-shallow", "vpt": "VPT-deep", "gated_vpt": "gated prompts"}
SHOWN = (SUPERVISED, "vpt")
HEADINGS = ("backbone", "method", "test accuracy", "trained values", "seconds")


@dataclass
class DemoRow:
    """What one run came to: accuracy on the test images in [0, 1], trained values, seconds of training."""

    backbone: str
    method: str
    accuracy: float
    trained_values: int
    seconds: float


def run_demo(
    output_dir: str | Path, epochs: float | None = None, seed: int = 42, extra: Sequence[str] = ()
) -> list[DemoRow]:
    """Train every row of the demonstration on the handwritten digits and write table, picture and adapters.

    Args:
        output_dir: Gets one folder per row, `demo.json`, `demo.md` and `demo.png`.
        epochs: Epochs per row; by default those of the default recipe.
        seed: Of initial values and the order of images; the split of the data is fixed.
        extra: More flags of `vpt-peft train` for every row.

    Raises:
        RuntimeError: The saved adapter, loaded again, does not give the accuracy it had.
    """
    folder = Path(output_dir)
    rows = []
    for backbone, method in ROWS:
        flags = ["--model_name_or_path", backbone, "--dataset_name", "digits", "--method", method]
        flags += ["--output_dir", str(folder / f"{backbone}-{method}"), "--seed", str(seed), "--overwrite_output_dir"]
        flags += ["--num_train_epochs", str(epochs)] if epochs is not None else []
        arguments = parse_args([*flags, *extra])
        metrics = train(arguments)
        trained = int(metrics["trainable_parameters"])
        rows.append(DemoRow(backbone, method, metrics["test_accuracy"], trained, metrics["train_runtime"]))
    write_json(folder / "demo.json", {"seed": seed, "rows": [asdict(row) for row in rows]})
    (folder / "demo.md").write_text(as_markdown(rows), encoding="utf-8")
    prove_reload(folder, next(row for row in rows if (row.backbone, row.method) == SHOWN))
    draw(rows, folder)
    return rows


def as_markdown(rows: Sequence[DemoRow]) -> str:
    """The rows as a markdown table."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|---:|---:|---:|"]
    for row in rows:
        cells = (
            row.backbone,
            NAMES[row.method],
            f"{row.accuracy:.1%}",
            f"{row.trained_values:,}",
            f"{row.seconds:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def prove_reload(folder: Path, row: DemoRow) -> None:
    """Load the saved adapter onto a fresh backbone and evaluate it again.

    Raises:
        RuntimeError: The accuracy is not the one measured after training.
    """
    saved = folder / "-".join(SHOWN)
    model, processor = load_adapter_model(saved)
    data = parse_args(["--dataset_name", "digits", "--output_dir", str(saved)]).data
    accuracy = evaluate_model(model, processor, data, "test")["accuracy"]
    if abs(accuracy - row.accuracy) > 1e-9:
        raise RuntimeError(f"{saved}: reloaded, the adapter has accuracy {accuracy}, not {row.accuracy}")


def draw(rows: Sequence[DemoRow], folder: Path) -> Path:
    """Accuracy of every row beside sixteen test images with what the reloaded adapter says of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    model, processor = load_adapter_model(folder / "-".join(SHOWN))
    data = parse_args(["--dataset_name", "digits", "--output_dir", str(folder)]).data
    test = load_image_dataset(data)["test"].select(range(16))
    images = [example["image"] for example in test]
    with torch.no_grad():
        pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        said = model.eval()(pixel_values=pixels).logits.argmax(-1).tolist()
    figure, (bars, grid) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.5, 1], layout="constrained")
    labels = [f"{NAMES[row.method]}\n({row.backbone})" for row in rows]
    colours = [
        "#9aa5b1" if row.method == "linear" else "#7fb3d5" if row.method == "vpt_shallow" else "#1f6fb2"
        for row in rows
    ]
    heights = [100 * row.accuracy for row in rows]
    drawn = bars.barh(labels, heights, color=colours)
    bars.bar_label(drawn, [f"{height:.1f} %" for height in heights], padding=3)
    bars.set(xlabel="accuracy on the test images, %", xlim=(max(0.0, min(heights) - 8), 101.5))
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title("Handwritten digits on frozen glyph backbones")
    canvas = torch.zeros(4 * 10, 4 * 10)
    for index, image in enumerate(images):
        top, left = 10 * (index // 4), 10 * (index % 4)
        digit = torch.tensor(list(image.convert("L").getdata()), dtype=torch.float32).view(8, 8)
        canvas[top + 1 : top + 9, left + 1 : left + 9] = digit
        colour = "#7bd88f" if said[index] == test[index]["label"] else "#ff6b6b"
        grid.text(left + 8.6, top + 2.2, str(said[index]), color=colour, fontsize=11, ha="center", weight="bold")
    grid.imshow(canvas, cmap="gray")
    grid.set_axis_off()
    grid.set_title("What VPT-deep says (green: right)")
    path = folder / "demo.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
