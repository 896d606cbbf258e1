"""What makes a data set a poor teacher: said before a model learns from it."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence

import datasets

from .errors import DataError


logger = logging.getLogger(__name__)

# From this ratio of the largest class to the smallest on, a model that always names the largest looks good
_UNEVEN = 10


@functools.cache
def warn_once(text: str) -> None:
    """Warn of a fault of the data; a comparison reads the same data in every run, and says it once."""
    logger.warning("%s", text)


def warn_of_labels(train: Sequence[int], validation: Sequence[int], names: Sequence[str]) -> None:
    """Warn of classes without images, of few images in all, and of strong imbalance.

    Args:
        train: class numbers of the training images.
        validation: class numbers of the validation images.
        names: of the classes.
    """
    counts = Counter(train)
    absent = [name for number, name in enumerate(names) if not counts[number]]
    if absent:
        warn_once(
            f"{len(absent)} of the {len(names)} classes have no training image ({_listed(absent)}), so the model "
            "cannot learn them."
        )
    unseen = [names[number] for number in sorted(set(counts) - set(validation))]
    if unseen:
        single = "; a single class is no measure" if len(set(validation)) < 2 else ""
        warn_once(
            f"{len(unseen)} classes have no validation image ({_listed(unseen)}), so its metrics say nothing about "
            f"them{single}."
        )
    (largest, most), (smallest, least) = counts.most_common()[0], counts.most_common()[-1]
    if most >= _UNEVEN * least:
        warn_once(
            f"The classes are uneven: {most} of the {len(train)} training images are {names[largest]!r}, {least} are "
            f"{names[smallest]!r}. Who always says {names[largest]!r} is right in {100 * most / len(train):.0f} % of "
            "them, so compare by macro_f1 (--metric_for_best_model macro_f1)."
        )


def check_images_differ(train: datasets.Dataset) -> None:
    """Check that the images of a split, column "image", are not all the same; as a rule two are read.

    Raises:
        DataError: they are.
    """
    images = (row["image"] for row in train)
    first = next(images)
    if all(image.size == first.size and image.tobytes() == first.tobytes() for image in images):
        raise DataError(
            f"all {len(train)} training images are the same, so there is nothing to learn. Check image_column_name and "
            "the files."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
