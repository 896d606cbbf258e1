"""Images listed in a CSV file."""

import datasets
import pytest
from PIL import Image

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.errors import DataError
from vpt_peft.data.sources import read_source
from vpt_peft.tasks import get_task


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for number in range(6):
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(tmp_path / "img" / f"{number}.png")
    return tmp_path


def write(folder, lines, encoding="utf-8"):
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding=encoding)
    return str(folder / "labels.csv")


def read(name):
    return read_source(name, None, None, None, None)[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_rows_are_images_with_labels(folder, separator, encoding):
    rows = [f"{'käse' if number % 2 else 'None'}{separator}img/{number}.png" for number in range(6)]
    name = write(folder, [f"label{separator}file", *rows], encoding)
    found = get_task().read(DataArguments(dataset_name=name, validation_fraction=0.4))
    assert get_task().id2label(found["train"]) == {0: "None", 1: "käse"}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 4, "validation": 2}
    for row in (row for split in found.values() for row in split):
        assert row["label"] == row["image"].getpixel((0, 0))[0] // 40 % 2


def test_columns_may_name_splits_and_hold_numbers(folder):
    rows = [f"img/{number}.png,{number},{number / 2},{'test' if number > 3 else 'train'}" for number in range(6)]
    found = read(write(folder, ["path,label,size,split", *rows]))
    assert {split: rows["label"][:] for split, rows in found.items()} == {"train": [0, 1, 2, 3], "test": [4, 5]}
    assert found["test"]["size"][:] == [2.0, 2.5]


def test_splits_of_one_kind_of_column(folder):
    """A column that is empty in one split has the type that it has in the others."""
    rows = [
        f"img/{number}.png,{number if number < 4 else ''},{'test' if number > 3 else 'train'}" for number in range(6)
    ]
    found = read(write(folder, ["path,label,split", *rows]))
    assert found["train"].features == found["test"].features
    assert found["train"].features["label"] == datasets.Value("int64") and found["test"]["label"][:] == [None, None]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b", "1,2"], "no column holds image files .*; there is a, b. The first line must name the columns"),
        (
            ["file|label", "img/0.png|a"],
            r"no column holds image files .*; there is file\|label. .* commas, semicolons or",
        ),
        (["img/0.png,a", "img/1.png,b"], "no label column found; there is img/0.png"),
        (
            ["file,label", "img/0.png,a", "img/9.png,b", ",b"],
            r"2 of 3 images in column 'file' .* in line 3: .*img/9.png'",
        ),
        (["file,label", "img/0.png,a,b"], "no column holds image files .*; there is file, label"),
        (
            ["file,label", "img/0.png,a", "img/1.png,a,b"],
            "cannot be read as CSV in UTF-8 .*Expected 2 fields in line 3, saw 3",
        ),
        (["file,label", "img/0.png,a", "img/1.png,"], "1 of 2 labels .* missing or out of range, the first in row 1"),
        (["file,label,split", "img/0.png,a,train", "img/1.png,b,"], "column 'split' is empty in some rows"),
        (["file,label"], r"has column names \(file, label\), but no rows"),
        ([""], "is empty; it needs a line of column names"),
    ],
)
def test_other_tables_are_refused(folder, lines, message):
    with pytest.raises(DataError, match=message):
        get_task().read(DataArguments(dataset_name=write(folder, lines)))


def test_other_encodings_are_refused(folder):
    with pytest.raises(DataError, match="cannot be read as CSV in UTF-8 .*utf-8"):
        read(write(folder, ["file,label", "img/0.png,käse"], "latin-1"))


def test_a_folder_that_holds_a_table_is_told_of_it(folder):
    write(folder, ["file,label", *(f"img/{number}.png,{number}" for number in range(6))])
    with pytest.raises(DataError, match="no label column found.* or a .csv file .*, which is then the dataset_name"):
        get_task().read(DataArguments(dataset_name=str(folder)))
