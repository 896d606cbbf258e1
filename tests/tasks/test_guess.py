"""The task is found from the data where it is clear, and both flags are named where it is not."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from segmentation_data import write_folders

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.images import DataError
from vpt_peft.runs.compare import comparison_of
from vpt_peft.runs.grid import Grid
from vpt_peft.tasks.guess import guess_task
from vpt_peft.training.arguments import parse_args


PICTURE = Image.fromarray(np.zeros((4, 4), np.uint8))
BOXES = {"bbox": [[datasets.Value("float32")]], "category": [datasets.Value("int64")]}
FEATURES = {
    "label": datasets.ClassLabel(names=["a", "b"]), "number": datasets.Value("int64"), "picture": datasets.Image(),
    "objects": BOXES,
}  # fmt: skip
VALUES = {"label": 0, "number": 0, "picture": PICTURE, "objects": {"bbox": [[0, 0, 2, 2]], "category": [0]}}


def write(folder, id2label=None, **columns):
    """A parquet data set of an image and further columns, {name: kind}."""
    kinds = {"image": "picture", **columns}
    features = datasets.Features({name: FEATURES[kind] for name, kind in kinds.items()})
    rows = {name: [VALUES[kind]] * 3 for name, kind in kinds.items()}
    (folder / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "train.parquet")
    if id2label:
        (folder / "id2label.json").write_text(json.dumps(id2label))
    return str(folder)


def guess(folder, tmp_path, **fields):
    return guess_task(DataArguments(str(folder), **fields), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("columns", "id2label", "task"),
    [
        ({"label": "label"}, None, "image-classification"),
        ({"target": "number"}, None, "image-classification"),
        ({"objects": "objects", "image_id": "number"}, None, "object-detection"),
        ({"annotation": "picture"}, {"0": "sky", "1": "road"}, "semantic-segmentation"),
        ({"segmentation": "picture"}, None, "semantic-segmentation"),
        ({"label": "picture"}, None, "semantic-segmentation"),
        ({"instances": "picture"}, None, "instance-segmentation"),
        ({"other": "picture"}, None, "image-classification"),
    ],
)
def test_columns_tell(tmp_path, columns, id2label, task):
    assert guess(write(tmp_path, id2label, **columns), tmp_path) == task


@pytest.mark.parametrize(
    ("columns", "id2label", "tasks"),
    [
        ({"mask": "picture"}, None, ("instance-segmentation", "semantic-segmentation")),
        ({"mask": "picture"}, {"0": "cell"}, ("instance-segmentation", "semantic-segmentation")),
        ({"objects": "objects", "label": "label"}, None, ("object-detection", "image-classification")),
    ],
)
def test_what_is_not_clear_is_refused_with_both_flags(tmp_path, columns, id2label, tasks):
    folder = write(tmp_path, id2label, **columns)
    with pytest.raises(DataError, match="can be for .*; say --task {} or --task {}".format(*tasks)):
        guess(folder, tmp_path)


def test_a_column_that_is_named_decides(tmp_path):
    folder = write(tmp_path, objects="objects", label="label")
    assert guess(folder, tmp_path, label_column_name="label") == "image-classification"
    assert guess(folder, tmp_path, label_column_name="objects") == "object-detection"


@pytest.mark.parametrize("outlined", [False, True])
def test_coco(tmp_path, outlined):
    segmentation = {"segmentation": [[0, 0, 2, 0, 2, 2]]} if outlined else {}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], **segmentation}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    if outlined:
        with pytest.raises(DataError, match="--task object-detection or --task instance-segmentation"):
            guess(tmp_path, tmp_path)
    else:
        assert guess(tmp_path, tmp_path) == "object-detection"


def test_folders(tmp_path):
    write_folders(tmp_path / "pairs", {"train": 1})
    assert guess(tmp_path / "pairs", tmp_path) == "semantic-segmentation"
    for name in "ab":
        (tmp_path / "classes" / name).mkdir(parents=True)
        PICTURE.save(tmp_path / "classes" / name / "0.png")
    assert guess(tmp_path / "classes", tmp_path) == "image-classification"


def test_without_data_it_is_classification(tmp_path):
    assert guess(tmp_path / "none", tmp_path) == guess("digits", tmp_path) == "image-classification"


def test_flags_are_filled_in_and_recorded(tmp_path):
    flags = {"dataset_name": write(tmp_path, objects="objects"), "cache_dir": str(tmp_path / "cache")}
    found = parse_args(flags, find_task=True)
    assert found.model.task == found.record()["task"] == "object-detection"
    assert found.training.metric_for_best_model == "map"
    # Who names a task is right, and nothing is looked at where it is not asked for
    assert parse_args({**flags, "task": "image-classification"}, find_task=True).model.task == "image-classification"
    assert parse_args(flags).model.task == "image-classification"
    assert "task" not in parse_args({"dataset_name": "digits"}, find_task=True).record()


def test_a_comparison_is_of_the_task_of_its_data(tmp_path):
    common = {"dataset_name": write(tmp_path, objects="objects"), "cache_dir": str(tmp_path / "cache")}
    found = comparison_of(Grid({**common, "output_dir": str(tmp_path / "out")}, {}, [0], {}), searched=False)
    assert found.task.pipeline_tag == "object-detection" and found.metric == "map"
