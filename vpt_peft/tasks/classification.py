"""Image classification: one class per image."""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from ..data.arguments import DataArguments
from ..data.checks import check_images_differ, warn_of_labels, warn_once
from ..data.images import DataError
from ..data.sources import read_source
from ..data.splits import as_checked_images, choose_splits, divide, find_column
from ..data.transforms import ImageTransform, build_transform
from ..methods.structure import find_head
from .accuracy import ClassificationMetrics
from .base import DEFAULT_TASK, Metric
from .loading import load_pretrained


logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "images", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category")
_LABEL_DTYPES = ("int", "uint", "string", "large_string", "bool")


@dataclass(frozen=True)
class LabelledImages:
    """A transform of {"image", "label"} to {"pixel_values", "labels"}; "label" may be absent."""

    images: ImageTransform

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        output = self.images(batch)
        if "label" in batch:
            output["labels"] = list(batch["label"])
        return output


class ImageClassification:
    """One class per image, named by the label column of the data."""

    pipeline_tag = hub_tag = DEFAULT_TASK
    auto_class = AutoModelForImageClassification
    metrics = (Metric("accuracy", "Accuracy", "accuracy"), Metric("macro_f1", "Macro F1", "f1"))
    best_metric = "accuracy"
    higher_is_better = True
    label_names = ("labels",)
    has_cached_features = True
    finds_many = False
    decoders = ()
    refused_methods = ()
    example = (
        'logits = model(**processor(images=image, return_tensors="pt")).logits\n'
        "print(model.config.id2label[logits.argmax(-1).item()])"
    )
    limits = "The model knows only the classes above and gives every image one of them."

    def read(
        self,
        data: DataArguments,
        token: str | None = None,
        cache_dir: str | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> datasets.DatasetDict:
        """Read a data set with the columns "image" and "label".

        Classes are those of the `ClassLabel` feature, else of an `id2label.json` in the data folder ({"0": "cat",
        ...}), else the sorted distinct labels of the training split. Without a validation split, one is drawn from
        the training split, stratified by label. A test split that was found, not asked for, and has no labels is left
        out with a warning.

        Args:
            data: what to read.
            token: Hub token; default: `HF_TOKEN` or the stored login.
            cache_dir: where `datasets` keeps its files; default: `HF_DATASETS_CACHE`.
            id2label: the classes of a model; labels are then numbered as the model numbers them, matched by name.

        Returns:
            "train", "validation" and, if there is one, "test", with columns "image" (an Image feature; decoding errors
            are `ImageError`s that name the file) and "label" (`ClassLabel`; with `id2label` plain integers).

        Raises:
            DataNotFoundError: there is no such folder or Hub id, or it cannot be reached.
            DataError: a split or column is missing, a split is empty, the training split has one class only, or a
                label is missing, out of range or unknown to the model.
        """
        source, named = read_source(
            data.dataset_name, data.dataset_config_name, data.dataset_revision, token, cache_dir
        )
        splits = choose_splits(source, data)
        features = splits["train"].features
        image_column = find_column(features, data.image_column_name, "image", datasets.Image, _IMAGE_NAMES)
        label_column = find_column(features, data.label_column_name, "label", datasets.ClassLabel, _LABEL_NAMES)
        _check_columns(splits, image_column, label_column)
        logger.info("Images from column %r, labels from column %r.", image_column, label_column)

        labels = {name: _labels_of(split, label_column, name) for name, split in splits.items()}
        hidden = all(value is None or value == -1 for value in labels.get("test", ()))
        if data.test_split is None and "test" in labels and hidden:
            warn_once("The test split has no labels and is left out; with --test_split that is an error.")
            splits.pop("test")
            labels.pop("test")
        names, lookup = _find_classes(features[label_column], labels["train"], named)
        prepared = {
            name: _two_columns(
                split, image_column, label_column, _encode(labels[name], lookup, names, name, label_column), names
            )
            for name, split in splits.items()
        }

        if "validation" not in prepared:
            train = prepared["train"]
            count = min(max(1, round(len(train) * data.validation_fraction)), len(train) - 1)
            kept, held = divide(train["label"][:], count, data.split_seed)
            prepared |= {"train": train.select(kept), "validation": train.select(held)}
            logger.info("Took %d of the %d training images for validation.", len(held), len(train))
        for name, limit in data.limits.items():
            if limit is not None and name in prepared and limit < len(prepared[name]):
                split = prepared[name]
                kept, _ = divide(split["label"][:], len(split) - limit, data.split_seed)
                prepared[name] = split.select(kept)
        _check_two_classes(prepared["train"], names, label_column)
        if id2label is None:
            check_images_differ(prepared["train"])
            warn_of_labels(prepared["train"]["label"][:], prepared["validation"]["label"][:], names)
        if id2label is not None:
            prepared = {name: _renumber(split, names, id2label) for name, split in prepared.items()}
        return datasets.DatasetDict({name: prepared[name] for name in data.limits if name in prepared})

    def load_model(
        self,
        path: str,
        id2label: Mapping[int, str],
        source: Mapping[str, Any],
        image_processor: Any = None,
        decoder: str | None = None,
    ) -> PreTrainedModel:
        """Load a classifier; a head of another size starts at zero.

        MAE checkpoints are read as ViTs, as transformers has no classifier for them.
        """
        config = AutoConfig.from_pretrained(path, **source)
        loader: Any = AutoModelForImageClassification
        if config.model_type == "vit_mae":
            config, loader = ViTConfig.from_dict({**config.to_dict(), "model_type": "vit"}), ViTForImageClassification
        model, drawn = load_pretrained(loader, path, config, id2label, source)
        _start_at_zero(model, drawn)
        return model

    def prepare_processor(self, image_processor: Any, data: DataArguments) -> Any:
        """Return the image processor as it is: a classifier has one size.

        Raises:
            DataError: another one is asked for.
        """
        if data.image_size is not None:
            raise DataError(
                f"image_size={data.image_size} is for boxes and masks; a classifier has a size of its own."
            )
        return image_processor

    def measurable(self, model: Any, predictions: Any, labels: Any) -> Any:
        """Return the predictions as they are."""
        return predictions

    def id2label(self, split: datasets.Dataset) -> dict[int, str]:
        """Return the classes of a split by their numbers."""
        return dict(enumerate(split.features["label"].names))

    def targets(self, split: datasets.Dataset) -> list[dict[str, Any]]:
        """Return [{"labels": class number}, ...] without reading the images."""
        return [{"labels": label} for label in split["label"]]

    def transform(
        self, image_processor: Any, augmentation: str = "none", train: bool = False, seed: int = 0
    ) -> LabelledImages:
        """Return a transform of {"image", "label"} to {"pixel_values", "labels"}; see `build_transform`."""
        return LabelledImages(build_transform(image_processor, augmentation, train, seed))

    def rows(
        self,
        split: datasets.Dataset,
        image_processor: Any,
        augmentation: str = "none",
        train: bool = False,
        seed: int = 0,
    ) -> datasets.Dataset:
        """Return a split whose rows are model input, one for each image."""
        return split.with_transform(self.transform(image_processor, augmentation, train, seed))

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """Stack examples: "pixel_values" `(batch, 3, height, width)` and, if given, "labels" `(batch,)` int64."""
        return default_data_collator(examples)

    def compute_metrics(self) -> ClassificationMetrics:
        """Return a fresh function for `Trainer(compute_metrics=...)` with `batch_eval_metrics`."""
        return ClassificationMetrics()

    @torch.no_grad()
    def predict(
        self,
        model: Any,
        image_processor: Any,
        images: Sequence[Image.Image],
        augmentation: str = "none",
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Return [{"label", "probability"}, ...] for each RGB image, the likeliest first."""
        pixels = build_transform(image_processor, augmentation)({"image": list(images)})["pixel_values"]
        logits = model(pixel_values=pixels.to(next(model.parameters()).device)).logits
        count = logits.shape[-1]
        best = logits.float().softmax(-1).topk(count if top_k is None else min(top_k, count))
        names = {int(index): name for index, name in model.config.id2label.items()}
        return [
            [
                {"label": names[i], "probability": value}
                for i, value in zip(indices, values, strict=True)
                if threshold is None or value >= threshold
            ]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def draw(self, image: Image.Image, findings: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Image.Image:
        """A class has no place in the image.

        Raises:
            ValueError: always.
        """
        raise ValueError("a class of the whole image cannot be drawn over it.")


TASK = ImageClassification()


def _start_at_zero(model: PreTrainedModel, drawn: Collection[str]) -> None:
    """Let output layers that the checkpoint does not hold start at zero.

    All classes are alike then. Random layers send their noise into the prompts, which hurts where images are few.
    """
    for path, head in find_head(model).items():
        linears = [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Linear)]
        # A norm in front of the output layer may be a part of the head too
        for name, output_layer in linears[-1:]:
            if ".".join(filter(None, (path, name, "weight"))) in drawn:
                for parameter in output_layer.parameters():
                    nn.init.zeros_(parameter)


def _check_columns(splits: Mapping[str, datasets.Dataset], image_column: str, label_column: str) -> None:
    if image_column == label_column:
        raise DataError(f"image_column_name and label_column_name are both {image_column!r}; they must differ.")
    for name, split in splits.items():
        for column in (image_column, label_column):
            if column not in split.column_names:
                raise DataError(f"column {column!r} is missing in split {name!r}, which has {split.column_names}.")
        ours, theirs = (getattr(each.features[label_column], "names", None) for each in (splits["train"], split))
        if ours != theirs:
            raise DataError(
                f"split {name!r} numbers its classes differently from the training split: "
                f"{_shorten(theirs or ['none'])} against {_shorten(ours or ['none'])}. Give all splits one ClassLabel."
            )


def _labels_of(split: datasets.Dataset, column: str, name: str) -> list:
    feature = split.features.get(column)
    dtype = getattr(feature, "dtype", type(feature).__name__)
    scalar = isinstance(feature, datasets.Value) and dtype.startswith(_LABEL_DTYPES)
    if not scalar and not isinstance(feature, datasets.ClassLabel):
        raise DataError(
            f"label column {column!r} of split {name!r} is {dtype}; it must hold one integer or string per image."
        )
    return split.with_format(None).select_columns([column])[:][column]


def _find_classes(
    feature: Any, train_labels: Sequence, id2label: Mapping[int, str] | None
) -> tuple[list[str], dict[Hashable, int]]:
    """Return the class names in order, and the class number of each label as it stands in the data."""
    by_file: dict[Hashable, int] = {}
    if id2label is not None:
        for number, name in id2label.items():
            by_file.update({name: number, str(number): number, number: number})
    own = list(getattr(feature, "names", None) or [])
    if own and not all(name in by_file for name in own):
        return own, {number: number for number in range(len(own))}
    if id2label is not None:
        names = [id2label[number] for number in range(len(id2label))]
        return names, {number: by_file[name] for number, name in enumerate(own)} if own else by_file
    # Negative numbers mean "no label" by convention
    distinct = sorted({v for v in train_labels if v is not None and not (isinstance(v, int) and v < 0)})
    if distinct and isinstance(distinct[0], int) and distinct != list(range(len(distinct))):
        warn_once(f"The labels {_shorten(distinct)} are renumbered from 0; the numbers stay as names.")
    return [str(value) for value in distinct], {value: number for number, value in enumerate(distinct)}


def _encode(labels: Sequence, lookup: dict[Hashable, int], names: list[str], split: str, column: str) -> list[int]:
    wrong = [row for row, value in enumerate(labels) if value is None or value not in lookup]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(labels)} labels of split {split!r} (column {column!r}) are missing or out of "
            f"range, the first in row {wrong[0]}: {labels[wrong[0]]!r}. The {len(names)} classes are "
            f"{_shorten(names)}. Remove or correct these rows, or name all classes in an id2label.json beside the "
            "data."
        )
    return [lookup[value] for value in labels]


def _shorten(values: Sequence) -> str:
    shown = ", ".join(map(str, values[:10]))
    return f"{shown}, ... {values[-1]}" if len(values) > 10 else shown


def _two_columns(
    split: datasets.Dataset, image_column: str, label_column: str, labels: list[int], names: list[str]
) -> datasets.Dataset:
    feature = datasets.ClassLabel(names=names)
    same = split.features[label_column] == feature
    split = split.with_format(None).select_columns([image_column, label_column] if same else [image_column])
    split = as_checked_images(split, image_column)
    renamed = {column: name for column, name in ((image_column, "image"), (label_column, "label")) if column != name}
    split = split.rename_columns({column: name for column, name in renamed.items() if column in split.column_names})
    return split if same else split.add_column("label", labels, feature=feature)


def _check_two_classes(train: datasets.Dataset, names: list[str], column: str) -> None:
    present = sorted(set(train["label"][:]))
    if len(present) < 2:
        raise DataError(
            f"all {len(train)} training images have the label {names[present[0]]!r} (column {column!r}); a classifier "
            "needs two classes or more. Check label_column_name, max_train_samples and validation_fraction."
        )


def _renumber(split: datasets.Dataset, names: Sequence[str], id2label: Mapping[int, str]) -> datasets.Dataset:
    """Number the labels as a model does; plain integers, as its names need not be unique."""
    known = {name: int(number) for number, name in id2label.items()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"the model does not know the labels {', '.join(map(repr, unknown[:5]))}; it knows "
            f"{', '.join(map(repr, list(known)[:5]))}{' ...' if len(known) > 5 else ''}. Evaluate on data of its classes."
        )
    labels = [known[names[label]] for label in split["label"][:]]
    return split.remove_columns("label").add_column("label", labels, feature=datasets.Value("int64"))
