"""VTAB-1k and FGVC in the layouts in circulation, made small: lists, classes, and what is not the suite."""

import hashlib
import json
import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image

from vpt_peft.data import suites
from vpt_peft.data.images import DataError, DataNotFoundError
from vpt_peft.data.suites import SUITES, Suite, SuiteData, suite_folders


pytest_plugins = ["data_fixtures"]
SMALL = Suite(
    "vtab-1k", (SuiteData("cifar", "natural", 3, 4), SuiteData("kitti", "structured", 2)), "resize", "x/y", "v.zip"
)


def image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def make_vtab(folder, classes, joined=True):
    """As in the archive: images in folders of their split, and lists of "path label"."""
    lists = {"train800": 6, "val200": 3, "test": 4}
    lines = {}
    for kind, (name, count) in enumerate(lists.items()):
        lines[name] = []
        for index in range(count):
            path = f"images/{name}/{index:04d}.png"
            image(folder / path, 50 * kind + index)
            lines[name].append(f"{path} {index % classes}")
        (folder / f"{name}.txt").write_text("\n".join(lines[name]) + "\n")
    if joined:
        (folder / "train800val200.txt").write_text("\n".join(lines["train800"] + lines["val200"]) + "\n")


@pytest.fixture
def vtab(tmp_path):
    make_vtab(tmp_path / "vtab-1k" / "cifar", 3)
    make_vtab(tmp_path / "vtab-1k" / "kitti", 2)
    return tmp_path / "vtab-1k"


def test_lists_are_read_as_splits(load, vtab):
    found = load(vtab / "cifar")
    assert {name: len(split) for name, split in found.items()} == {"train": 6, "validation": 3, "test": 4}
    assert found["train"]["label"][:] == [0, 1, 2, 0, 1, 2] and found["train"].features["label"].names == [
        "0",
        "1",
        "2",
    ]
    assert [each.getpixel((0, 0))[0] for each in found["validation"]["image"]] == [50, 51, 52]
    assert found["test"]["label"][:] == [0, 1, 2, 0]


@pytest.mark.parametrize("images", ["", "images", "Images", "jpg"])
def test_json_lists_number_any_labels_in_order(load, tmp_path, images):
    # As of NABirds: class numbers have gaps, are text, and one stands in the test list alone
    lists = {"train": {"a/1.jpg": "0817", "a/2.jpg": "0295"}, "val": {"b/3.jpg": "0817"}, "test": {"b/4.jpg": "1010"}}
    for name, rows in lists.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        for value, path in enumerate(rows):
            image(tmp_path / images / path, value)
    found = load(tmp_path)
    assert found["train"].features["label"].names == ["0295", "0817", "1010"]
    assert [found[name]["label"][:] for name in ("train", "validation", "test")] == [[1, 0], [1], [2]]


def test_numbers_are_ordered_by_value(load, tmp_path):
    for name, rows in {"train": {"1.jpg": 10, "2.jpg": 9}, "val": {"1.jpg": 9}, "test": {"2.jpg": 100}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    for value, name in enumerate(("1.jpg", "2.jpg")):
        image(tmp_path / name, 99 * value)
    assert load(tmp_path)["train"].features["label"].names == ["9", "10", "100"]


def test_damaged_lists_are_told(load, vtab, caplog):
    folder = vtab / "cifar"
    (folder / "images" / "test" / "0002.png").unlink()
    with pytest.raises(DataError, match="1 images of its lists are not there, the first is 'images/test/0002.png'"):
        load(folder)
    image(folder / "images" / "test" / "0002.png", 0)
    (folder / "train800val200.txt").write_text("images/test/0000.png 0\n")
    load(folder)
    assert "is not the images of the training and the validation list" in caplog.text
    (folder / "val200.txt").write_text("images/val200/0000.png one\n")
    with pytest.raises(DataError, match=r"val200.txt, line 1: .* is not a path and the number of a class"):
        load(folder)
    (vtab / "kitti" / "train.json").write_text("[1]")
    (vtab / "kitti" / "train800.txt").unlink()
    with pytest.raises(DataError, match="must map paths of images to classes"):
        load(vtab / "kitti")


def test_a_suite_is_found_and_checked(vtab, caplog):
    expected = {"cifar": vtab / "cifar", "kitti": vtab / "kitti"}
    # The archive holds a folder of its own name
    assert suite_folders(SMALL, vtab) == suite_folders(SMALL, vtab.parent) == expected
    assert caplog.text == "" and SMALL.groups == {"cifar": "natural", "kitti": "structured"}
    other = Suite("vtab-1k", (SuiteData("cifar", "natural", 3, 5),), "resize", "x/y")
    suite_folders(other, vtab)
    assert "has 4 test images and not the 5 of the published split" in caplog.text
    with pytest.raises(DataError, match="has 3 classes instead of 100"):
        suite_folders(Suite("vtab-1k", (SuiteData("cifar", "natural", 100),), "resize", "x/y"), vtab)
    with pytest.raises(DataNotFoundError, match="lacks caltech101, dtd, .*huggingface.co/datasets/XiN0919/VTAB-1k"):
        suite_folders(SUITES["vtab-1k"], vtab)
    with pytest.raises(DataNotFoundError, match="--suite_dir"):
        suite_folders(SUITES["fgvc"], None)
    (vtab / "kitti" / "test.txt").unlink()
    with pytest.raises(DataError, match="has no list of test images"):
        suite_folders(SMALL, vtab)


def test_the_suites_are_those_of_the_papers():
    sets = SUITES["vtab-1k"].sets
    assert len(sets) == 19 and [
        sum(each.group == group for each in sets) for group in ("natural", "specialized", "structured")
    ] == [7, 4, 8]
    assert {each.folder: each.num_classes for each in SUITES["fgvc"].sets} == {
        "CUB_200_2011": 200,
        "nabirds": 555,
        "OxfordFlower": 102,
        "StanfordDogs": 120,
        "StanfordCars": 196,
    }
    assert SUITES["fgvc"].groups is None


def test_an_archive_is_verified_and_unpacked_once(vtab, tmp_path, monkeypatch):
    archive = tmp_path / "v.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(vtab.rglob("*")):
            file.write(path, path.relative_to(vtab.parent))
    asked, digest = [], hashlib.sha256(archive.read_bytes()).hexdigest()

    def download(*args, **kwargs):
        asked.append((args, kwargs["repo_type"]))
        return str(archive)

    hub = SimpleNamespace(sha256="0" * 64)
    info = lambda *args, **kwargs: [SimpleNamespace(lfs=hub)]  # noqa: E731
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: SimpleNamespace(get_paths_info=info))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    with pytest.raises(DataError, match=f"has SHA-256 {digest}, the Hub says 0000"):
        suite_folders(SMALL, None)
    hub.sha256 = digest
    first = suite_folders(SMALL, None)
    assert suite_folders(SMALL, None) == first and asked == [(("x/y", "v.zip"), "dataset")] * 2
    assert first["kitti"] == tmp_path / "home" / "vpt_peft" / "suites" / "vtab-1k" / "vtab-1k" / "kitti"
    assert suites.read_listed(first["kitti"])["train"].num_rows == 6


def test_an_unreachable_hub_names_the_remedy(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=r"cannot be downloaded \(no route to host\); .*--suite_dir"):
        suite_folders(SMALL, None)
