"""The interface of a task, and the registry that finds tasks by their pipeline tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ..data.arguments import DataArguments


if TYPE_CHECKING:
    import datasets
    from PIL import Image
    from transformers import PreTrainedModel


DEFAULT_TASK = "image-classification"
# pipeline tag: module of this package that holds its `TASK`
_TASKS = {
    DEFAULT_TASK: "classification",
    "semantic-segmentation": "segmentation",
    "object-detection": "detection",
    "instance-segmentation": "instance",
}


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation measures.

    Args:
        name: key among the metrics, without a prefix.
        title: as cards show it.
        kind: the metric's id on the Hub.
        higher_is_better: whether a larger value is a better one.
        percent: shown as a percentage.
    """

    name: str
    title: str
    kind: str
    higher_is_better: bool = True
    percent: bool = True

    @property
    def label(self) -> str:
        """The name in words, for tables and axes."""
        return f"{self.title[0].lower()}{self.title[1:]}{' (%)' if self.percent else ''}"

    @property
    def scale(self) -> float:
        """What a value is multiplied by where it is shown."""
        return 100.0 if self.percent else 1.0

    def format(self, value: float) -> str:
        """Return the value as text: "93.75 %"."""
        return f"{self.scale * value:.2f} %" if self.percent else f"{value:.4g}"


class Task(Protocol):
    """What training, evaluation, prediction, cards and plots ask of a task.

    Targets may be class numbers, masks or boxes; only the task looks into them.

    Attributes:
        pipeline_tag: name of the task.
        hub_tag: name on the Hub and in `transformers.pipeline`, where several tasks may have one.
        auto_class: class of transformers that loads models for the task.
        metrics: what an evaluation measures beside the loss.
        best_metric: the metric that chooses the best weights.
        label_names: keys of the targets in a batch, as `TrainingArguments.label_names`.
        has_cached_features: an image is seen in one way where it is not augmented, and its targets are read without it.
        finds_many: an image has any number of findings with a place, which can be drawn.
        decoders: heads to choose among for an encoder that has none.
        refused_methods: methods of training that make no sense here.
        limits: what a card says such a model cannot do.
        example: code of a card that prints what `model` and `processor` make of `image`.
    """

    pipeline_tag: str
    hub_tag: str
    auto_class: Any
    metrics: tuple[Metric, ...]
    best_metric: str
    label_names: tuple[str, ...]
    has_cached_features: bool
    finds_many: bool
    decoders: tuple[str, ...]
    refused_methods: tuple[str, ...]
    limits: str
    example: str

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger `best_metric` is a better one."""
        ...

    def read(
        self,
        data: DataArguments,
        token: str | None = None,
        cache_dir: str | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> datasets.DatasetDict:
        """Read, check, split and label a data set.

        Args:
            data: what to read.
            token: Hub token.
            cache_dir: where `datasets` keeps its files.
            id2label: the classes of a model; targets are then numbered as the model numbers them. Classes are matched
                by name.

        Returns:
            "train", "validation" and, where there is one, "test".

        Raises:
            DataError: the data does not fit the task; the message says what to change.
        """
        ...

    def load_model(
        self,
        path: str,
        id2label: Mapping[int, str],
        source: Mapping[str, Any],
        image_processor: Any = None,
        decoder: str | None = None,
    ) -> PreTrainedModel:
        """Return a model for the task in float32: a checkpoint's own, or an encoder with a head of this package.

        Args:
            path: Hub id or folder.
            id2label: the classes of the head.
            source: `revision`, `token` and `cache_dir`, as of `from_pretrained`.
            image_processor: of the run; a model that is built for one size takes it from there.
            decoder: one of `decoders`, the head of an encoder; default: the task's choice.

        Raises:
            ValueError: the checkpoint lacks weights, or cannot do the task, or there is no such decoder.
            OSError: there is no such model.
        """
        ...

    def prepare_processor(self, image_processor: Any, data: DataArguments) -> Any:
        """Return the image processor of a run, made from that of the backbone; it is saved with the run."""
        ...

    def id2label(self, split: datasets.Dataset) -> dict[int, str]:
        """Return the classes of a split by their numbers."""
        ...

    def targets(self, split: datasets.Dataset) -> list[dict[str, Any]]:
        """Return the targets of a split as `transform` gives them, without the images: for cached features."""
        ...

    def transform(
        self, image_processor: Any, augmentation: str = "none", train: bool = False, seed: int = 0
    ) -> Callable[[dict[str, list]], dict[str, Any]]:
        """Return a transform for `Dataset.with_transform`: images and targets together to model input."""
        ...

    def rows(
        self,
        split: datasets.Dataset,
        image_processor: Any,
        augmentation: str = "none",
        train: bool = False,
        seed: int = 0,
    ) -> Any:
        """Return a split of `read` as a data set whose rows are model input; an image may have several in evaluation."""
        ...

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """Return transformed examples, or cached features of them, as one batch."""
        ...

    def measurable(self, model: Any, predictions: Any, labels: Any) -> Any:
        """Return what `compute_metrics` takes as predictions: tensors of one batch, gathered as they are.

        Args:
            model: what predicted.
            predictions: all it returned but the loss.
            labels: the targets of the batch.
        """
        ...

    def compute_metrics(self) -> Callable[..., dict[str, float]]:
        """Return a fresh function for `Trainer(compute_metrics=...)` with `batch_eval_metrics`.

        It takes the `EvalPrediction` of one batch and `compute_result`; with the last batch it returns the metrics of
        all batches since the last result.
        """
        ...

    def predict(
        self,
        model: Any,
        image_processor: Any,
        images: Sequence[Image.Image],
        augmentation: str = "none",
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Return what the model finds in each RGB image, the likeliest first, as plain values.

        Args:
            model: in eval mode.
            image_processor: prepares the images and, where the task needs it, processes the outputs.
            images: one batch.
            augmentation: as in training; its evaluation form is used.
            top_k: most findings per image; default: all.
            threshold: lowest score of a finding; default: the task's own.
        """
        ...

    def draw(self, image: Image.Image, findings: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Image.Image:
        """Return an image with its findings drawn over it.

        Args:
            image: RGB.
            findings: of `predict`.
            names: the classes by number; a class has the same colour in every image.
        """
        ...


def task_names() -> tuple[str, ...]:
    """The pipeline tags of all tasks."""
    return tuple(_TASKS)


def get_task(pipeline_tag: str = DEFAULT_TASK) -> Task:
    """Return the task of a pipeline tag.

    Raises:
        ValueError: there is no such task.
    """
    if pipeline_tag not in _TASKS:
        raise ValueError(f"task={pipeline_tag!r} is unknown; choose one of {', '.join(_TASKS)}.")
    return import_module(f"{__package__}.{_TASKS[pipeline_tag]}").TASK
