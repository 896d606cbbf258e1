"""What makes a data set a poor teacher: said before a model learns from it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import datasets

from .errors import DataError


logger = logging.getLogger(__name__)

# From this ratio of the largest class to the smallest on, a model that always names the largest looks good
_UNEVEN = 10


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
        logger.warning(
            "%d of the %d classes have no training image (%s), so the model cannot learn them.",
            len(absent),
            len(names),
            _listed(absent),
        )
    unseen = [names[number] for number in sorted(set(counts) - set(validation))]
    if unseen:
        logger.warning(
            "%d classes have no validation image (%s), so its metrics say nothing about them%s.",
            len(unseen),
            _listed(unseen),
            "; a single class is no measure" if len(set(validation)) < 2 else "",
        )
    (largest, most), (smallest, least) = counts.most_common()[0], counts.most_common()[-1]
    if most >= _UNEVEN * least:
        logger.warning(
            "The classes are uneven: %d of the %d training images are %r, %d are %r. Who always says %r is right in "
            "%.0f %% of them, so compare by macro_f1 (--metric_for_best_model macro_f1).",
            most,
            len(train),
            names[largest],
            least,
            names[smallest],
            names[largest],
            100 * most / len(train),
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
