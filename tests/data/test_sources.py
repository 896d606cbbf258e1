from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hub_server import Refusal
from huggingface_hub import HfApi
from PIL import Image
from sklearn.datasets import load_digits

from vpt_peft.data.images import DataError, DataNotFoundError
from vpt_peft.data.splits import dataset_fingerprint


pytest_plugins = ["data_fixtures"]
ROOT = Path(__file__).parents[2]


def write_images(folder, counts):
    """`counts[subfolder]` pictures in each subfolder, numbered through."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name / f"{number:03d}.png")
            number += 1
    return folder


def test_digits(load):
    data = load("digits")
    assert {name: len(split) for name, split in data.items()} == {"train": 1078, "validation": 359, "test": 360}
    assert data["train"].features["label"].names == list("0123456789")
    images = [np.asarray(image) for split in data.values() for image in split["image"]]
    labels = [label for split in data.values() for label in split["label"]]
    assert images[0].shape == (8, 8) and images[0].dtype == np.uint8
    values, targets = load_digits(return_X_y=True)
    expected = Counter(
        (np.rint(value * 255 / 16).astype(np.uint8).tobytes(), int(target))
        for value, target in zip(values, targets, strict=True)
    )
    # every digit is in one split, none twice, none lost
    assert Counter((image.tobytes(), label) for image, label in zip(images, labels, strict=True)) == expected
    shares = {name: np.bincount(split["label"]) / np.bincount(targets) for name, split in data.items()}
    assert np.abs(shares["train"] - 0.6).max() < 0.01 and np.abs(shares["test"] - 0.2).max() < 0.01


def test_digits_split_is_fixed(load):
    assert dataset_fingerprint(load("digits")["train"]) == dataset_fingerprint(load("digits", split_seed=5)["train"])


def test_class_folders(load, tmp_path):
    data = load(write_images(tmp_path / "d", {"cat": 20, "dog": 10}))
    assert list(data) == ["train", "validation"]
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert Counter(data["validation"]["label"]) == {0: 4, 1: 2}


@pytest.mark.parametrize("word", ["validation", "val", "valid", "dev"])
def test_split_folders(load, tmp_path, word):
    counts = {f"{split}/{kind}": n for split, n in (("train", 3), (word, 2), ("test", 1)) for kind in "ab"}
    data = load(write_images(tmp_path / "d", counts))
    assert {name: len(split) for name, split in data.items()} == {"train": 6, "validation": 4, "test": 2}
    assert data["test"]["label"][:] == [0, 1]


@pytest.mark.parametrize("classes", [("airplane", "train"), ("a[b]", "c*"), ("_x", "test", "y z")])
def test_class_folders_named_like_splits_or_patterns(load, tmp_path, classes):
    data = load(write_images(tmp_path / "d", dict.fromkeys(classes, 5)))
    assert data["train"].features["label"].names == sorted(classes)
    assert len(data["train"]) + len(data["validation"]) == 5 * len(classes)


def test_files_named_like_splits_are_all_read(load, tmp_path):
    folder = write_images(tmp_path / "d", {"a": 5, "b": 5})
    (folder / "a" / "000.png").rename(folder / "a" / "test_000.png")
    (folder / "b" / "005.png").rename(folder / "b" / "train_005.png")
    data = load(folder)
    assert set(data) == {"train", "validation"} and len(data["train"]) + len(data["validation"]) == 10


def test_an_edited_folder_is_read_again(load, tmp_path):
    folder = write_images(tmp_path / "d", {"a": 5, "b": 5})
    before = load(folder)
    write_images(folder, {"c": 5})
    after = load(folder)
    assert before["train"].features["label"].num_classes == 2 and after["train"].features["label"].num_classes == 3


@pytest.mark.parametrize("counts", [{"only": 6}, {"train/only": 6}])
def test_a_single_class_folder(load, tmp_path, counts):
    with pytest.raises(DataError, match="needs at least two class folders"):
        load(write_images(tmp_path / "d", counts))


@pytest.mark.parametrize("whole", [True, False])
def test_folder_of_save_to_disk(load, tmp_path, whole):
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": images, "label": ["a", "b"] * 5}, features=features)
    (datasets.DatasetDict({"train": data}) if whole else data).save_to_disk(tmp_path / "d")
    loaded = load(tmp_path / "d")
    assert Counter(loaded["train"]["label"]) == {0: 4, 1: 4}


@pytest.mark.parametrize("other", [datasets.ClassLabel(names=["b", "a"]), datasets.Value("int64"), None])
def test_splits_that_do_not_fit_together(load, tmp_path, other):
    """`save_to_disk` keeps what `load_dataset` would refuse."""

    def split(feature):
        columns = {"image": [Image.new("L", (4, 4), i) for i in range(6)], "label": [0, 1] * 3}
        kinds = {"image": datasets.Image(), "label": feature or datasets.Value("int64")}
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        return data if feature else data.remove_columns("label")

    splits = {"train": split(datasets.ClassLabel(names=["a", "b"])), "test": split(other)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    expected = "split 'test' numbers its classes differently" if other else "column 'label' is missing in split 'test'"
    with pytest.raises(DataError, match=expected):
        load(tmp_path / "d")


@pytest.mark.parametrize("content", [{}, {"train.parquet": b"junk"}, {"notes.xyz": b"1"}, {"a/b.png": b""}])
def test_unreadable_folder(load, tmp_path, content):
    (tmp_path / "d").mkdir()
    for name, data in content.items():
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    with pytest.raises(DataError, match="cannot be read as image data|at least two class folders"):
        load(tmp_path / "d")


def test_label_beyond_a_declared_class_is_named(load, tmp_path):
    # such a file cannot be written through `datasets`, so the features are declared beside it
    import pyarrow as pa
    import pyarrow.parquet as pq

    info = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = pa.table({"image": [{"bytes": b"x", "path": None}] * 3, "label": pa.array([0, 1, 7])})
    table = table.replace_schema_metadata(info.arrow_schema.metadata)
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    with pytest.raises(DataError, match="Class label 7|in row 2: 7"):
        load(tmp_path / "d")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing here", "a/b/c", "..\\d", "a/b.csv"])
def test_a_folder_that_is_not_there(load, name):
    with pytest.raises(
        DataNotFoundError, match="does not exist; give a folder, a .csv file of image files and labels"
    ):
        load(name)


def test_a_file_is_not_a_folder(load, tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file, but not a .csv file"):
        load(tmp_path / "x.zip")


@pytest.mark.parametrize("refusal", [(404, "RepoNotFound"), (401, "RepoNotFound"), (403, "GatedRepo")])
def test_hub_refusals_say_what_was_asked_and_the_ways_on(load, hub, monkeypatch, refusal):
    def refuse(*args):
        raise Refusal(*refusal)

    monkeypatch.setattr(hub, "answer", refuse)
    with pytest.raises(DataNotFoundError, match="^dataset_name='me/data'") as caught:
        load("me/data")
    for way in (hub.url, "Check the id", "HF_TOKEN", "HF_HUB_OFFLINE", "local folder", "digits"):
        assert way in str(caught.value)
    assert ("gated dataset" in str(caught.value)) == (refusal[1] == "GatedRepo")


def test_offline_without_a_cached_copy(load, monkeypatch):
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    with pytest.raises(DataNotFoundError, match="dataset_name='me/data'.*OfflineModeIsEnabled.*local folder"):
        load("me/data")


def test_data_of_the_hub(load, hub, tmp_path):
    classes = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in numbers]
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * (len(numbers) // 2)}, features=features)
        rows.to_parquet(tmp_path / "push" / "data" / f"{split}-00000-of-00001.parquet")
    api = HfApi()
    api.create_repo("user/data", repo_type="dataset", private=True)
    api.upload_folder(repo_id="user/data", repo_type="dataset", folder_path=tmp_path / "push")
    data = load("user/data")
    assert sorted(image.getpixel((0, 0))[0] for image in data["test"]["image"]) == list(range(8, 12))
    assert len(data["train"]) + len(data["validation"]) == 8 and data["train"].features["label"] == classes
    with pytest.raises(DataNotFoundError, match="dataset_name='user/other'"):
        load("user/other")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("Couldn't reach it"), DataNotFoundError),
        (datasets.exceptions.DatasetNotFoundError("no"), DataNotFoundError),
        (ValueError("Config name is missing. Please pick one among: ['a', 'b']"), DataError),
        (OSError(28, "No space left on device"), DataError),
    ],
)
def test_any_hub_error_is_wrapped(load, monkeypatch, error, expected):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(expected) as caught:
        load("me/data", dataset_revision="v2")
    assert caught.value.__cause__ is error and str(error) in str(caught.value)
    assert "dataset_name='me/data' at revision 'v2'" in str(caught.value)
    assert type(caught.value) is expected
