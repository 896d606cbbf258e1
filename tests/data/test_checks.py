"""Warnings about data sets from which little can be learned."""

import logging

import datasets
import pytest
from PIL import Image

from vpt_peft.data.checks import check_images_differ, warn_of_labels
from vpt_peft.data.errors import DataError


NAMES = ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        ([0, 0, 1, 1, 2, 2], [0, 1, 2], []),
        # The ratio of the largest class to the smallest is 9, then 10
        ([0] * 9 + [1] * 9 + [2], [0, 1, 2], []),
        ([0] * 10 + [1] * 9 + [2], [0, 1, 2], ["10 of the 20 training images are 'ant', 1 are 'cat'", "in 50 % of"]),
        ([0, 0, 1, 1], [0, 1], ["1 of the 3 classes have no training image (cat)"]),
        ([0, 0, 1, 2], [0, 0], ["2 classes have no validation image (bee, cat)", "single class is no measure"]),
        ([0, 0, 1, 2], [0, 1], ["1 classes have no validation image (cat), so its metrics say nothing about them."]),
    ],
)
def test_warnings_about_labels(caplog, train, validation, said):
    with caplog.at_level(logging.WARNING):
        warn_of_labels(train, validation, NAMES)
    assert all(text in caplog.text for text in said)
    assert bool(caplog.records) == bool(said)


def test_images_that_are_all_the_same():
    def split(*colours):
        images = [Image.new("RGB", (4, 4), colour) for colour in colours]
        return datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))

    check_images_differ(split("red", "red", "blue"))
    with pytest.raises(DataError, match="all 3 training images are the same"):
        check_images_differ(split("red", "red", "red"))
