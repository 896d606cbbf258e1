"""Which data to read and how to prepare it, as plain fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .errors import DataError


@dataclass
class DataArguments:
    """Which data to read and how to prepare it.

    Raises:
        DataError: a fraction, a limit or the seed is out of range.
    """

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "A data set id on the Hub, a folder (parquet files in Hub layout, or one folder of images per "
            "class), a .csv file of image files and labels, 'digits' for scikit-learn's handwritten digits, or "
            "'digits-count' for how many of them there are."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of the data set, if it has several."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub."}
    )
    train_split: str = field(
        default="train", metadata={"help": "The split to train on; join several with '+', as in train+validation."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "The split to evaluate on. Default: validation, val, valid or dev, else a part of train."},
    )
    test_split: str | None = field(default=None, metadata={"help": "The split to test on. Default: test, if present."})
    validation_fraction: float = field(
        default=0.2,
        metadata={"help": "Share of the training split to evaluate on, in (0, 1), if there is no validation split."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of images. Default: found by its type, then by its name."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "The column of labels. Default: found by its type, then by its name."}
    )
    augmentation: Literal["none", "resize", "resize_crop_flip"] = field(
        default="none",
        metadata={
            "help": "none: the checkpoint's own image processor; resize: straight to the input size (VTAB protocol); "
            "resize_crop_flip: shorter side to 256/224 of the input size, random crop and flip (FGVC protocol)."
        },
    )
    train_on_validation: bool = field(
        default=False,
        metadata={
            "help": "Train on the validation images too, for the number of epochs given, once settings are chosen."
        },
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Boxes and masks: height and width that images are fitted into, in pixels. Default: the image "
            "processor's."
        },
    )
    ignore_index: int = field(default=255, metadata={"help": "Masks: value of pixels that do not count."})
    reduce_labels: bool = field(
        default=False,
        metadata={"help": "Masks: pixels of 0 do not count either, and the first class is written as 1."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many images."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Test on at most this many images."})
    split_seed: int = field(
        default=0, metadata={"help": "Seed for drawing the validation split and the max_*_samples images."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1, as in 0.2.")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise DataError(f"image_size={self.image_size} must be height and width in pixels, as in 480 640.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise DataError(f"{name}={limit} must be 1 or more; leave it out to use all images.")
        if not 0 <= self.split_seed < 2**32:
            raise DataError(f"split_seed={self.split_seed} must lie in 0..{2**32 - 1}.")

    @property
    def limits(self) -> dict[str, int | None]:
        """The most images of each split."""
        return {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_predict_samples,
        }
