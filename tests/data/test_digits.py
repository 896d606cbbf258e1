"""Tasks made of the handwritten digits."""

from __future__ import annotations

import numpy as np
import pytest

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.digits import make_task, read_digits
from vpt_peft.data.splits import dataset_fingerprint
from vpt_peft.tasks.classification import TASK


def cells_of(image):
    """The 16 cells (8 x 8 pixels) of a picture of 32 x 32."""
    return np.asarray(image).reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)


@pytest.fixture(scope="module")
def splits():
    return TASK.read(DataArguments("digits-count"))


def test_the_class_is_the_number_of_digits(splits):
    assert {name: len(split) for name, split in splits.items()} == {"train": 400, "validation": 300, "test": 300}
    for split in splits.values():
        names = split.features["label"].names
        assert names == list("123456")
        for image, label in zip(split["image"], split["label"], strict=True):
            assert (cells_of(image).max(1) > 0).sum() == int(names[label])
        assert np.bincount(split["label"]).min() > len(split) / 12


def test_no_digit_is_in_two_splits(splits):
    seen = {}
    for name, split in splits.items():
        cells = np.concatenate([cells_of(image) for image in split["image"]])
        seen[name] = {cell.tobytes() for cell in cells if cell.max() > 0}
    own = {name: {np.asarray(image).tobytes() for image in split["image"]} for name, split in read_digits().items()}
    assert all(seen[name] <= own[name] for name in seen)
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]


def test_a_task_is_always_alike():
    def draw(digits):
        image, value = digits.draw((3, 7))
        return digits.paste((image, int(digits.rng.integers(24)), 0)), str(value)

    first, second = make_task(draw), make_task(draw)
    assert first["train"].features["label"].names == ["3", "7"]
    assert [dataset_fingerprint(first[name]) == dataset_fingerprint(second[name]) for name in first] == [True] * 3
