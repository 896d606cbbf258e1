import dataclasses
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import HfArgumentParser

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.images import DataError, ImageError
from vpt_peft.data.splits import dataset_fingerprint
from vpt_peft.tasks.classification import TASK


pytest_plugins = ["data_fixtures"]
ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "datasets"


def numbers(split):
    """The numbers of the pictures in a split, in order."""
    return [image.getpixel((0, 0))[0] for image in split["image"]]


def write_parquet(folder, splits, feature=None, image="image", label="label", **more):
    """Splits of labels as parquet files in Hub layout; the pictures of a split are numbered from 0."""
    (folder / "data").mkdir(parents=True)
    for name, labels in splits.items():
        kinds = {image: datasets.Image(), label: feature or datasets.Dataset.from_dict({"x": labels}).features["x"]}
        kinds.update({key: kind for key, (kind, _) in more.items()})
        columns = {image: [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(labels))], label: labels}
        columns.update({key: [value] * len(labels) for key, (_, value) in more.items()})
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        table.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data set"


def test_arguments_parse_and_have_help():
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--dataset_name", "a/b", "--augmentation", "resize_crop_flip", "--max_train_samples", "5"]
    )
    assert args == DataArguments("a/b", augmentation="resize_crop_flip", max_train_samples=5)
    assert DataArguments().dataset_name == "digits"
    assert all(len(item.metadata["help"]) > 10 for item in dataclasses.fields(DataArguments))
    with pytest.raises(SystemExit):
        HfArgumentParser(DataArguments).parse_args_into_dataclasses(["--augmentation", "blur"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("max_train_samples", 0),
        ("max_eval_samples", -1),
        ("max_predict_samples", 0),
        ("split_seed", -1),
    ],
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(DataError, match=f"{name}={value}"):
        DataArguments(**{name: value})


def test_validation_is_taken_stratified_and_disjoint(load, folder):
    labels = ["cat"] * 20 + ["dog"] * 10 + ["eel"] * 5
    write_parquet(folder, {"train": labels, "test": labels})
    data = load(folder)
    assert list(data) == ["train", "validation", "test"] and len(data["test"]) == 35
    assert Counter(data["validation"]["label"]) == {0: 4, 1: 2, 2: 1}
    assert sorted(numbers(data["train"]) + numbers(data["validation"])) == list(range(35))
    names = data["train"].features["label"].names
    assert [names[i] for i in data["train"]["label"]] == [labels[number] for number in numbers(data["train"])]
    assert numbers(load(folder)["validation"]) == numbers(data["validation"])
    assert numbers(load(folder, split_seed=1)["validation"]) != numbers(data["validation"])
    assert Counter(load(folder, validation_fraction=0.4)["validation"]["label"]) == {0: 8, 1: 4, 2: 2}


@pytest.mark.parametrize("seed", range(4))
def test_every_class_stays_in_training_where_stratifying_fails(load, folder, seed):
    write_parquet(folder, {"train": [0, 0, 0, 0, 0, 0, 1, 2, 2, 3]})
    data = load(folder, split_seed=seed)
    assert len(data["validation"]) == 2 and set(data["train"]["label"]) == {0, 1, 2, 3}
    assert sorted(numbers(data["train"]) + numbers(data["validation"])) == list(range(10))


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_validation_split_is_found(load, folder, name):
    data = load(write_parquet(folder, {"train": [0, 1] * 4, name: [1, 0, 1]}))
    assert len(data["train"]) == 8 and data["validation"]["label"][:] == [1, 0, 1]


def test_splits_by_flag(load, folder):
    write_parquet(folder, {"train": [0, 1] * 4, "validation": [0, 1, 1], "test": [1, 0]})
    joined = load(folder, train_split="train+validation", validation_split="test")
    assert len(joined["train"]) == 11 and joined["train"]["label"][8:] == [0, 1, 1]
    assert joined["validation"]["label"][:] == [1, 0]
    # with the found validation split in training, one is taken from both
    taken = load(folder, train_split="train+validation")
    assert (len(taken["train"]), len(taken["validation"])) == (9, 2)
    with pytest.raises(DataError, match=r"train_split='fit': no split 'fit' in .*\['train', 'validation', 'test'\]"):
        load(folder, train_split="fit")
    with pytest.raises(DataError, match="validation_split='train' overlaps"):
        load(folder, validation_split="train")
    with pytest.raises(DataError, match="test_split='validation' overlaps"):
        load(folder, train_split="train+validation", test_split="validation")


@pytest.mark.parametrize(
    ("feature", "raw", "names", "expected"),
    [
        (None, ["b", "a", "c", "b"], ["a", "b", "c"], [1, 0, 2, 1]),
        (None, [0, 1, 2, 1], ["0", "1", "2"], [0, 1, 2, 1]),
        (None, [1, 2, 3, 2], ["1", "2", "3"], [0, 1, 2, 1]),
        (None, [5, 10, 20, 10], ["5", "10", "20"], [0, 1, 2, 1]),
        (None, [True, False, False, True], ["False", "True"], [1, 0, 0, 1]),
        (datasets.Value("uint8"), [0, 1, 1, 0], ["0", "1"], [0, 1, 1, 0]),
        (datasets.Value("large_string"), ["b", "a", "a", "b"], ["a", "b"], [1, 0, 0, 1]),
        (datasets.ClassLabel(names=["z", "y", "x"]), [2, 0, 0, 1], ["z", "y", "x"], [2, 0, 0, 1]),
        (datasets.ClassLabel(num_classes=4), [3, 0, 1, 1], ["0", "1", "2", "3"], [3, 0, 1, 1]),
    ],
)
def test_labels_of_any_kind(load, folder, feature, raw, names, expected):
    data = load(write_parquet(folder, {"train": raw, "validation": raw}, feature))
    for split in data.values():
        assert split.features["label"] == datasets.ClassLabel(names=names)
        assert split["label"][:] == expected and numbers(split) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("feature", "raw", "names", "expected"),
    [
        (None, [0, 2, 0], ["ant", "cat", "dog"], [0, 2, 0]),
        (None, ["dog", "cat", "dog"], ["ant", "cat", "dog"], [2, 1, 2]),
        (None, ["2", "1", "0"], ["ant", "cat", "dog"], [2, 1, 0]),
        (datasets.ClassLabel(names=["1", "2", "0"]), [0, 1, 2], ["ant", "cat", "dog"], [1, 2, 0]),
        (datasets.ClassLabel(names=["cat", "dog", "ant"]), [0, 1, 2], ["ant", "cat", "dog"], [1, 2, 0]),
        (datasets.ClassLabel(names=["x", "y", "z"]), [0, 1, 2], ["x", "y", "z"], [0, 1, 2]),
    ],
)
def test_names_from_id2label(load, folder, feature, raw, names, expected):
    write_parquet(folder, {"train": raw, "validation": raw}, feature)
    (folder / "id2label.json").write_text(json.dumps({"0": "ant", "1": "cat", "2": "dog"}))
    data = load(folder)
    assert data["train"].features["label"].names == names and data["train"]["label"][:] == expected


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "b"}', '{"1": "a", "2": "b"}', '{"0": "a", "1": "a"}'])
def test_bad_id2label(load, folder, text):
    write_parquet(folder, {"train": [0, 1] * 3})
    (folder / "id2label.json").write_text(text)
    with pytest.raises(DataError, match="id2label.json"):
        load(folder)


def test_columns_are_found_renamed_and_reduced(load, folder):
    classes = datasets.ClassLabel(names=["a", "b", "c"])
    more = {"coarse_label": (datasets.ClassLabel(names=["p", "q"]), 1), "author": (datasets.Value("string"), "me")}
    write_parquet(folder, {"train": [0, 1, 2] * 4}, classes, "img", "fine_label", **more)
    data = load(folder)
    assert data["train"].column_names == ["image", "label"]
    assert isinstance(data["train"].features["image"], datasets.Image)
    assert data["train"].features["label"].names == ["a", "b", "c"]
    assert isinstance(data["train"][0]["image"], Image.Image)
    with pytest.raises(DataError, match="training images have the label 'q'"):
        load(folder, label_column_name="coarse_label")


def test_column_errors_list_what_there_is(load, folder):
    write_parquet(folder, {"train": [0, 1] * 4}, image="scan", label="grade", note=(datasets.Value("string"), "n"))
    assert Counter(load(folder, label_column_name="grade")["train"]["label"]) == {0: 3, 1: 3}
    with pytest.raises(DataError, match=r"no label column found; there is scan .*, grade \(int64\), note \(string\)"):
        load(folder)
    with pytest.raises(DataError, match="image_column_name='photo': no such column; there is scan"):
        load(folder, image_column_name="photo", label_column_name="grade")
    with pytest.raises(DataError, match="label_column_name='y': no such column; .*grade"):
        load(folder, label_column_name="y")
    with pytest.raises(DataError, match="both 'grade'"):
        load(folder, image_column_name="grade", label_column_name="grade")
    with pytest.raises(DataError, match="image_column_name='grade' does not hold images"):
        load(folder, image_column_name="grade", label_column_name="note")


def test_several_image_or_label_columns_need_a_flag(load, folder):
    classes = datasets.ClassLabel(names=["a", "b"])
    mask = (datasets.Image(), Image.new("L", (4, 4)))
    write_parquet(folder, {"train": [0, 1] * 4}, classes, "left", "u", right=mask, v=(classes, 0))
    with pytest.raises(DataError, match="several columns may be the image column; there is left .*, right"):
        load(folder)
    with pytest.raises(DataError, match="several columns may be the label column"):
        load(folder, image_column_name="left")
    assert numbers(load(folder, image_column_name="left", label_column_name="u")["train"])[0] in range(8)


@pytest.mark.parametrize(
    ("feature", "train", "test", "message"),
    [
        (None, [0, 1, None, 1], [0, 1], "1 of 4 labels of split 'train' .* in row 2: None"),
        (None, [0, 1, -1, -1], [0, 1], "2 of 4 labels of split 'train' .* in row 2: -1"),
        (None, [0, 1, 1, 0], [1, 2], r"1 of 2 labels of split 'test' .* in row 1: 2\. The 2 classes are 0, 1"),
        (None, ["a", "b", "a", "b"], ["b", "q"], "in row 1: 'q'"),
        (None, ["a", "b", None, "b"], ["b"], "in row 2: None"),
        (datasets.ClassLabel(names=["a", "b"]), [0, 1, -1, 0], [0], "in row 2: -1. The 2 classes are a, b"),
        (datasets.ClassLabel(names=["a", "b"]), [0, None, 1, 0], [0], "in row 1: None"),
        (None, [0.5, 1.0, 0.0, 1.0], [0.5], r"label column 'label' of split 'train' is float64"),
        (None, [[0], [1], [0], [1]], [[0]], r"one integer or string per image"),
    ],
)
def test_labels_out_of_range(load, folder, feature, train, test, message):
    with pytest.raises(DataError, match=message):
        load(write_parquet(folder, {"train": train, "test": test}, feature))


def test_label_beyond_the_names_of_id2label(load, folder):
    write_parquet(folder, {"train": [0, 1, 2, 3]})
    (folder / "id2label.json").write_text('{"0": "a", "1": "b", "2": "c"}')
    with pytest.raises(DataError, match="1 of 4 .* in row 3: 3. The 3 classes are a, b, c"):
        load(folder)


@pytest.mark.parametrize("hidden", [-1, None])
def test_a_test_split_without_labels_is_left_out_unless_asked_for(load, folder, caplog, hidden):
    classes = datasets.ClassLabel(names=["a", "b"])
    write_parquet(folder, {"train": [0, 1] * 4, "test": [hidden] * 3}, classes)
    assert set(load(folder)) == {"train", "validation"}
    assert "test split has no labels" in caplog.text
    with pytest.raises(DataError, match="3 of 3 labels of split 'test'"):
        load(folder, test_split="test")


@pytest.mark.parametrize("empty", ["train", "validation", "test"])
def test_empty_split(load, folder, empty):
    splits = {"train": [0, 1] * 3, "validation": [0, 1], "test": [0, 1], empty: []}
    with pytest.raises(DataError, match=f"the split '{empty}' is empty"):
        load(write_parquet(folder, splits, datasets.ClassLabel(names=["a", "b"])))


@pytest.mark.parametrize("feature", [None, datasets.ClassLabel(names=["0", "1"])])
def test_one_class_only(load, folder, feature):
    write_parquet(folder, {"train": [0] * 4, "validation": [0, 0]}, feature)
    with pytest.raises(DataError, match="all 4 training images have the label '0'"):
        load(folder)


def test_limits_are_stratified_and_apply_after_the_split(load, folder):
    write_parquet(folder, {"train": ["a"] * 40 + ["b"] * 40, "test": ["a"] * 9 + ["b"]})
    data = load(folder, max_train_samples=8, max_eval_samples=4, max_predict_samples=3)
    assert Counter(data["train"]["label"]) == {0: 4, 1: 4}
    assert Counter(data["validation"]["label"]) == {0: 2, 1: 2}
    assert Counter(data["test"]["label"]) == {0: 2, 1: 1}
    assert not set(numbers(data["train"])) & set(numbers(data["validation"]))
    assert len(load(folder, max_train_samples=1000)["train"]) == 64
    with pytest.raises(DataError, match="all 1 training images .* max_train_samples"):
        load(folder, max_train_samples=1)


def test_decoding_errors_name_the_file(load, tmp_path):
    for kind in ("a", "b"):
        (tmp_path / "d" / kind).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "d" / kind / f"{i}.jpg")
    broken = tmp_path / "d" / "b" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:-100])
    data = load(tmp_path / "d")
    with pytest.raises(ImageError, match=r"b/3\.jpg' cannot be read .*[Tt]runcated.*find_corrupt_images"):
        [image.size for split in data.values() for image in split["image"]]


def test_fingerprint_follows_content_only(load, folder, tmp_path):
    write_parquet(folder, {"train": ["a", "b"] * 4})
    train = load(folder)["train"]
    mark = dataset_fingerprint(train)
    assert len(mark) == 32 and int(mark, 16) >= 0
    args = DataArguments(str(folder))
    elsewhere = TASK.read(args, cache_dir=str(tmp_path / "other"))["train"]
    assert dataset_fingerprint(elsewhere) == dataset_fingerprint(train.with_transform(lambda batch: batch)) == mark
    assert dataset_fingerprint(train.select(range(len(train)))) == mark
    named = train.cast_column("label", datasets.ClassLabel(names=["a", "c"]))
    relabelled = train.remove_columns("label").add_column("label", [0] * len(train), feature=train.features["label"])
    repainted = train.map(lambda row: {"image": Image.new("RGB", (4, 4), (0, 0, row["label"]))})
    others = [train.select(range(len(train) - 1)), train.select(range(len(train))[::-1]), named, relabelled, repainted]
    assert len({mark, *map(dataset_fingerprint, others)}) == 6


def test_fingerprint_is_the_same_on_every_machine():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": bytes([number]) * 9, "path": None} for number in range(3)]
    split = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    assert dataset_fingerprint(split) == "22e5d7822d5b5840c906b503c732b53d"


@pytest.mark.parametrize(
    ("name", "classes", "sizes"), [("caltech101", 101, (800, 200, 1500)), ("cifar100", 100, (800, 200, 2000))]
)
def test_real_data(load, name, classes, sizes):
    if not (SHARED / name).is_dir():
        pytest.skip("the shared data sets are not here")
    data = load(SHARED / name)
    assert tuple(len(data[split]) for split in ("train", "validation", "test")) == sizes
    assert data["train"].features["label"].num_classes == classes
    assert np.bincount(data["train"]["label"][:], minlength=classes).min() >= 7
    small = load(SHARED / name, max_train_samples=3 * classes, max_eval_samples=50)
    assert len(small["train"]) == 3 * classes and len(set(small["train"]["label"])) == classes
    assert len(small["validation"]) == 50


def test_real_data_without_labels(load):
    if not (SHARED / "camvid").is_dir():
        pytest.skip("the shared data sets are not here")
    with pytest.raises(DataError, match="no label column found; there is image .*annotation"):
        load(SHARED / "camvid")
