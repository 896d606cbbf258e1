"""The demonstration: a linear probe and three kinds of prompts on the embedded backbones, as a table and a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments
from ..data.images import to_rgb
from ..files import write_json
from ..reporting import markdown_table
from ..tasks import get_task
from ..training.arguments import parse_args
from ..training.evaluation import evaluate_model
from ..training.inference import load_adapter_model
from ..training.train import train


logger = logging.getLogger(__name__)

SUPERVISED, MAE = "embedded", "embedded-mae"
NAMES = {"linear": "linear probe", "vpt_shallow": "VPT-shallow", "vpt": "VPT-deep", "gated_vpt": "gated prompts"}
TASK = get_task()
METRIC = next(metric for metric in TASK.metrics if metric.name == TASK.best_metric)
HEADINGS = ("backbone", "method", "images", f"test {METRIC.title.lower()}", "trainable parameters", "seconds")
SHOWN_IMAGES = 30


@dataclass(frozen=True)
class DemoRun:
    """One row of the table: a backbone, a method, and the flags of `vpt-peft train` that are its own."""

    backbone: str
    method: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of the row's output folder."""
        return f"{self.backbone}-{self.method}"


_SHARED = {
    "dataset_name": "digits",
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "overwrite_output_dir": True,
}
# Few images, so that the whole table takes under two minutes on two cores. The backbone that was trained with labels
# gets only ten of every digit: with thirty, a linear probe already names digits as well as prompts do
_SUPERVISED = {"max_train_samples": 100, "num_train_epochs": 30, "head_learning_rate": 0.005}
# MAE features vary little from image to image, so what learns from them takes large steps. The paper of gated prompts
# reads MAE backbones by the mean over patches and prompts, before the norm
_MAE = {"max_train_samples": 300, "num_train_epochs": 10}
_MAE_PROMPTS = {
    **_MAE,
    "pooling": "image_prompt",
    "pool_before_norm": True,
    "prompt_learning_rate": 0.1,
    "head_learning_rate": 0.1,
}
# A head on cached features costs next to nothing, so it trains until it stops getting better
_LINEAR = {"cache_features": True, "num_train_epochs": 100}
SHOWN = DemoRun(
    SUPERVISED,
    "vpt",
    {
        **_SUPERVISED,
        "prompt_learning_rate": 0.005,
        "head_learning_rate": 0.01,
        "prompt_dropout": 0.1,
        "init_method": "random",
    },
)
RUNS = (
    DemoRun(SUPERVISED, "linear", {**_SUPERVISED, **_LINEAR, "learning_rate": 0.01, "head_learning_rate": 0.01}),
    DemoRun(SUPERVISED, "vpt_shallow", {**_SUPERVISED, "prompt_learning_rate": 0.03}),
    SHOWN,
    DemoRun(MAE, "linear", {**_MAE, **_LINEAR, "learning_rate": 0.5}),
    DemoRun(MAE, "vpt_shallow", _MAE_PROMPTS),
    DemoRun(MAE, "gated_vpt", _MAE_PROMPTS),
)


@dataclass(frozen=True)
class DemoRow:
    """The result of one run: training images, score on the test images in [0, 1], trainable parameters, seconds."""

    backbone: str
    method: str
    images: int
    score: float
    trainable_parameters: int
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return the row with the score under the metric's name."""
        return {METRIC.name if name == "score" else name: value for name, value in asdict(self).items()}


def run_demo(output_dir: str | Path, seed: int = 0, flags: Mapping[str, Any] | None = None) -> list[DemoRow]:
    """Train every row of the demonstration on the handwritten digits and write table, picture and adapters.

    Args:
        output_dir: gets one folder per row, `demo.json`, `demo.md` and `demo.png`.
        seed: of initial values and the order of images; the split of the data is fixed.
        flags: flags of `vpt-peft train` that replace those of every row.

    Raises:
        RuntimeError: the saved adapter, loaded again, does not give the score it had.
    """
    folder = Path(output_dir)
    rows = []
    for number, run in enumerate(RUNS, start=1):
        logger.info("[%d/%d] %s on %s", number, len(RUNS), NAMES[run.method], run.backbone)
        given = {
            "model_name_or_path": run.backbone,
            "method": run.method,
            "seed": seed,
            "output_dir": str(folder / run.folder),
            **_SHARED,
            **run.flags,
            **(flags or {}),
        }
        if run.flags.get("cache_features"):
            given["feature_cache_dir"] = str(folder / "features")
        metrics = train(parse_args(given))
        trained = int(metrics["trainable_parameters"])
        images = given["max_train_samples"]
        rows.append(
            DemoRow(
                run.backbone, run.method, images, metrics[f"test_{METRIC.name}"], trained, metrics["train_runtime"]
            )
        )
    write_json(folder / "demo.json", {"seed": seed, "rows": [row.record() for row in rows]})
    (folder / "demo.md").write_text(as_markdown(rows), encoding="utf-8")
    shown = prove_reload(folder / SHOWN.folder, rows[RUNS.index(SHOWN)].score, **(flags or {}))
    draw(rows, shown, folder / "demo.png")
    return rows


def as_markdown(rows: Sequence[DemoRow]) -> str:
    """Return the rows as a markdown table."""
    cells = [
        (
            r.backbone,
            NAMES[r.method],
            f"{r.images}",
            f"{r.score:.1%}",
            f"{r.trainable_parameters:,}",
            f"{r.seconds:.1f}",
        )
        for r in rows
    ]
    return markdown_table([dict(zip(HEADINGS, line, strict=True)) for line in cells], left=HEADINGS[:2])


@dataclass(frozen=True)
class Shown:
    """A test image with its label and what the model predicts."""

    image: Any
    label: int
    predicted: int


def prove_reload(folder: Path, score: float, **flags: Any) -> list[Shown]:
    """Load the saved adapter onto a fresh backbone, evaluate it again, and return its predictions of some test images.

    Raises:
        RuntimeError: the score is not the one measured after training.
    """
    names = DataArguments.__dataclass_fields__
    data = DataArguments("digits", **{name: value for name, value in flags.items() if name in names})
    model, processor = load_adapter_model(folder)
    found = evaluate_model(model, processor, data, "test", task=TASK)[METRIC.name]
    if abs(found - score) > 1e-9:
        raise RuntimeError(f"{folder}: loaded again, the adapter has {METRIC.name} {found}, not {score}.")
    test = TASK.read(data)["test"]
    test = test.select(range(min(SHOWN_IMAGES, len(test))))
    pictures = [to_rgb(picture) for picture in test["image"]]
    predictions = TASK.predict(model, processor, pictures, top_k=1)
    return [
        Shown(picture, label, int(best["label"]))
        for picture, label, (best,) in zip(pictures, test["label"], predictions, strict=True)
    ]


def draw(rows: Sequence[DemoRow], shown: Sequence[Shown], path: Path) -> None:
    """Draw the score of every row beside test images with the predictions of the reloaded adapter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: its state, and the back end it picks, belong to the user
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    left, right = halves
    _draw_bars(left, rows)
    _draw_images(right, shown)
    figure.savefig(path, dpi=120)


_COLOURS = {"linear": "#a3adb8", "vpt_shallow": "#86b9dd", "vpt": "#1f6fb2", "gated_vpt": "#1f6fb2"}
_TITLES = {SUPERVISED: "backbone trained with labels", MAE: "backbone trained without (MAE)"}
_RIGHT, _WRONG = "#2b8a4b", "#d0342c"


def _draw_bars(figure: Any, rows: Sequence[DemoRow]) -> None:
    figure.suptitle(f"Handwritten digits on frozen glyph backbones: test {METRIC.title.lower()}", fontsize=12)
    for axis, backbone in zip(figure.subplots(2, 1, sharex=True), (SUPERVISED, MAE), strict=True):
        own = [row for row in rows if row.backbone == backbone]
        labels = [f"{NAMES[row.method]}\n{row.trainable_parameters:,} parameters" for row in own]
        heights = [METRIC.scale * row.score for row in own]
        bars = axis.barh(labels, heights, color=[_COLOURS[row.method] for row in own], height=0.72)
        axis.bar_label(bars, [f"{height:.1f} %" for height in heights], padding=4, fontsize=10)
        axis.set_title(
            f"{_TITLES[backbone]}, {own[0].images} images to learn from", loc="left", fontsize=10, color="#444444"
        )
        axis.set(xlim=(0, 114), xticks=[])
        axis.invert_yaxis()
        axis.tick_params(axis="y", length=0, labelsize=9)
        axis.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_images(figure: Any, shown: Sequence[Shown], columns: int = 6) -> None:
    figure.suptitle(f"What {NAMES[SHOWN.method]} predicts for the first {len(shown)} test images", fontsize=12)
    axes = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, item in zip(axes.flat, shown, strict=False):
        right = item.predicted == item.label
        axis.imshow(item.image.convert("L"), cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(
            f"{item.predicted}" if right else f"{item.predicted}, is {item.label}",
            fontsize=10,
            color=_RIGHT if right else _WRONG,
            weight="bold",
            pad=3,
        )
