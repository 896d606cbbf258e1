"""The demonstration: prompts between a linear probe and full fine-tuning, on two tasks, as a table and a picture."""

from __future__ import annotations

import logging
import sys
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
COUNT, NAME = "digits-count", "digits"
QUESTIONS = {COUNT: "how many digits?", NAME: "which digit?"}
NAMES = {
    "linear": "linear probe",
    "vpt_shallow": "VPT-shallow",
    "vpt": "VPT-deep",
    "gated_vpt": "gated prompts",
    "full": "full fine-tuning",
}
TASK = get_task()
METRIC = next(metric for metric in TASK.metrics if metric.name == TASK.best_metric)
HEADINGS = (
    "task",
    "backbone",
    "method",
    "images",
    f"test {METRIC.title.lower()}",
    "trainable parameters",
    "seconds",
)
SHOWN_IMAGES = 20


@dataclass(frozen=True)
class DemoRun:
    """One row of the table: a data set, a backbone, a method, and the flags of `vpt-peft train` that are its own."""

    data: str
    backbone: str
    method: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of the row's output folder."""
        return f"{self.data}-{self.backbone}-{self.method}"


_SHARED = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "overwrite_output_dir": True,
}
# Few images and epochs, so that the whole table takes under two minutes on two cores
_COUNT = {"max_train_samples": 300}
_NAME = {"max_train_samples": 100}
# What is not chosen on validation images needs few of them
_STEPS = {"num_train_epochs": 10, "per_device_train_batch_size": 16, "max_eval_samples": 32}
_PROMPTS = {**_STEPS, "prompt_learning_rate": 0.1, "head_learning_rate": 0.01}
_FULL = {**_STEPS, "learning_rate": 3e-4, "head_learning_rate": 1e-3}
# The paper of gated prompts reads MAE backbones by the mean over patches and prompts, before the norm; its features vary
# little from image to image, so what learns from them takes large steps
_GATED = {
    "num_train_epochs": 10,
    "max_eval_samples": 32,
    "pooling": "image_prompt",
    "pool_before_norm": True,
    "prompt_learning_rate": 0.1,
    "head_learning_rate": 0.1,
}
RUNS = (
    DemoRun(COUNT, SUPERVISED, "linear", _COUNT),
    DemoRun(COUNT, SUPERVISED, "vpt_shallow", {**_COUNT, **_PROMPTS}),
    DemoRun(COUNT, SUPERVISED, "vpt", {**_COUNT, **_PROMPTS}),
    DemoRun(COUNT, SUPERVISED, "full", {**_COUNT, **_FULL}),
    DemoRun(COUNT, MAE, "linear", _COUNT),
    DemoRun(COUNT, MAE, "gated_vpt", {**_COUNT, **_GATED}),
    DemoRun(NAME, SUPERVISED, "linear", _NAME),
    DemoRun(NAME, SUPERVISED, "vpt_shallow", {**_NAME, **_PROMPTS}),
    DemoRun(NAME, SUPERVISED, "vpt", {**_NAME, **_PROMPTS}),
    DemoRun(NAME, SUPERVISED, "full", {**_NAME, **_FULL}),
)
# The two whose answers stand under the images
PROBE, SHOWN = RUNS[0], RUNS[2]


@dataclass(frozen=True)
class DemoRow:
    """The result of one run: training images, score on the test images in [0, 1], trainable parameters, seconds."""

    data: str
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
        question = QUESTIONS[run.data]
        logger.info("[%d/%d] %s %s on %s", number, len(RUNS), question, NAMES[run.method], run.backbone)
        given = {
            "dataset_name": run.data,
            "model_name_or_path": run.backbone,
            "method": run.method,
            "seed": seed,
            "output_dir": str(folder / run.folder),
            "disable_tqdm": not sys.stderr.isatty(),
            **_SHARED,
            **run.flags,
            **(flags or {}),
        }
        if run.method == "linear":
            given["feature_cache_dir"] = str(folder / "features")
        metrics = train(parse_args(given))
        trained = int(metrics["trainable_parameters"])
        images = given["max_train_samples"]
        rows.append(
            DemoRow(
                run.data,
                run.backbone,
                run.method,
                images,
                metrics[f"test_{METRIC.name}"],
                trained,
                metrics["train_runtime"],
            )
        )
    write_json(folder / "demo.json", {"seed": seed, "rows": [row.record() for row in rows]})
    (folder / "demo.md").write_text(as_markdown(rows), encoding="utf-8")
    shown = {
        run.method: prove_reload(folder / run.folder, run.data, rows[RUNS.index(run)].score, **(flags or {}))
        for run in (PROBE, SHOWN)
    }
    draw(rows, shown, folder / "demo.png")
    return rows


def as_markdown(rows: Sequence[DemoRow]) -> str:
    """Return the rows as a markdown table."""
    cells = [
        (
            QUESTIONS[r.data],
            r.backbone,
            NAMES[r.method],
            f"{r.images}",
            f"{r.score:.1%}",
            f"{r.trainable_parameters:,}",
            f"{r.seconds:.1f}",
        )
        for r in rows
    ]
    return markdown_table([dict(zip(HEADINGS, line, strict=True)) for line in cells], left=HEADINGS[:3])


def summary(rows: Sequence[DemoRow]) -> str:
    """Return in one sentence what prompts are worth where frozen features do not hold the answer."""
    linear, prompts, full = (
        next(row for row in rows if (row.data, row.backbone, row.method) == (COUNT, SUPERVISED, method))
        for method in ("linear", "vpt", "full")
    )
    return (
        f"How many digits there are, frozen features do not tell: a linear probe on them is right in "
        f"{linear.score:.0%} of the test images, {NAMES['vpt']} in {prompts.score:.0%} and full fine-tuning in "
        f"{full.score:.0%}; prompts train {prompts.trainable_parameters / full.trainable_parameters:.1%} of its "
        "parameters."
    )


@dataclass(frozen=True)
class Shown:
    """A test image with its class and what the model predicts."""

    image: Any
    label: str
    predicted: str


def prove_reload(folder: Path, data_name: str, score: float, **flags: Any) -> list[Shown]:
    """Load what was saved onto a fresh backbone, evaluate it again, and return its predictions of some test images.

    Raises:
        RuntimeError: the score is not the one measured after training.
    """
    names = DataArguments.__dataclass_fields__
    data = DataArguments(data_name, **{name: value for name, value in flags.items() if name in names})
    model, processor = load_adapter_model(folder)
    found = evaluate_model(model, processor, data, "test", task=TASK)[METRIC.name]
    if abs(found - score) > 1e-9:
        raise RuntimeError(f"{folder}: loaded again, the model has {METRIC.name} {found}, not {score}.")
    test = TASK.read(data)["test"]
    classes, test = TASK.id2label(test), test.select(range(min(SHOWN_IMAGES, len(test))))
    pictures = [to_rgb(picture) for picture in test["image"]]
    predictions = TASK.predict(model, processor, pictures, top_k=1)
    return [
        Shown(picture, classes[label], best["label"])
        for picture, label, (best,) in zip(pictures, test["label"], predictions, strict=True)
    ]


def draw(rows: Sequence[DemoRow], shown: Mapping[str, Sequence[Shown]], path: Path) -> None:
    """Draw the score of every row beside test images with the answers of the linear probe and of prompts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: its state, and the back end it picks, belong to the user
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    left, right = halves
    _draw_bars(left, rows)
    _draw_images(right, shown)
    figure.savefig(path, dpi=120)


_COLOURS = {
    "linear": "#a3adb8",
    "vpt_shallow": "#86b9dd",
    "vpt": "#1f6fb2",
    "gated_vpt": "#1f6fb2",
    "full": "#d9c7a3",
}
_TITLES = {
    (COUNT, SUPERVISED): "How many digits?  Frozen features do not tell",
    (COUNT, MAE): "How many digits?  Self-supervised backbone",
    (NAME, SUPERVISED): "Which digit?  Frozen features nearly tell",
}
_RIGHT, _WRONG = "#2b8a4b", "#d0342c"


def _draw_bars(figure: Any, rows: Sequence[DemoRow]) -> None:
    figure.suptitle(f"Test {METRIC.title.lower()} on a frozen backbone, and with all of it trained", fontsize=12)
    groups = [[row for row in rows if (row.data, row.backbone) == key] for key in _TITLES]
    axes = figure.subplots(len(groups), 1, sharex=True, height_ratios=[len(group) + 0.6 for group in groups])
    for axis, title, group in zip(axes, _TITLES.values(), groups, strict=True):
        labels = [f"{NAMES[row.method]}\n{row.trainable_parameters:,} parameters" for row in group]
        heights = [METRIC.scale * row.score for row in group]
        bars = axis.barh(labels, heights, color=[_COLOURS[row.method] for row in group], height=0.74)
        axis.bar_label(bars, [f"{height:.1f} %" for height in heights], padding=4, fontsize=10)
        axis.set_title(f"{title} ({group[0].images} images)", loc="left", fontsize=10, color="#444444")
        axis.set(xlim=(0, 114), xticks=[])
        axis.invert_yaxis()
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_images(figure: Any, shown: Mapping[str, Sequence[Shown]], columns: int = 5) -> None:
    answers = list(zip(*shown.values(), strict=True))
    first, second = (NAMES[method] for method in shown)
    figure.suptitle(f"How many digits?  Above: {first}, below: {second}", fontsize=12)
    axes = figure.subplots(-(-len(answers) // columns), columns, squeeze=False)
    for axis, (above, below) in zip(axes.flat, answers, strict=True):
        axis.imshow(above.image.convert("L"), cmap="gray_r", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#cccccc")
        axis.set_title(above.predicted, **_as_answer(above), pad=3)
        axis.set_xlabel(below.predicted, **_as_answer(below), labelpad=3)


def _as_answer(item: Shown) -> dict[str, Any]:
    return {"fontsize": 11, "weight": "bold", "color": _RIGHT if item.predicted == item.label else _WRONG}
