"""Images with masks: which folders and columns are read, how labels are numbered, and what is refused by name."""

import json
import re

import datasets
import numpy as np
import pytest
from PIL import Image
from segmentation_data import NAMES, picture, write_folders

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.images import DataError
from vpt_peft.data.masks import IGNORED
from vpt_peft.data.segmentation import read_segmentation


def read(folder, id2label=None, **given):
    return read_segmentation(DataArguments(str(folder), **given), cache_dir=str(folder / "cache"), id2label=id2label)


def mask_of(folder, name="train", number=0):
    return folder / name / "masks" / f"{number}.png"


def test_folders_of_a_split(tmp_path):
    splits = read(write_folders(tmp_path, {"train": 3, "val": 2}))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 2}
    row = splits["train"][1]
    expected = np.asarray(Image.open(mask_of(tmp_path, number=1)))
    assert (row["height"], row["width"], row["classes"]) == (24, 32, [0, 1, 2])
    assert row["image"].size == (32, 24)
    assert np.array_equal(row["annotation"], expected) and row["annotation"].dtype == np.int64
    assert splits["train"].features["annotation"].names == list(NAMES.values())


@pytest.mark.parametrize("layout", ["images/{split}|masks/{split}", "images|masks", "JPEGImages|SegmentationClass"])
def test_other_layouts(layout, tmp_path):
    source = write_folders(tmp_path / "source", {"train": 4})
    for path, kind in zip(layout.split("|"), ("images", "masks"), strict=True):
        target = tmp_path / "data" / path.format(split="train")
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / "train" / kind).rename(target)
    splits = read(tmp_path / "data", validation_fraction=0.25)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 1}
    # Without an id2label.json classes are called by their numbers
    assert splits["train"].features["annotation"].names == ["0", "1", "2"]


def test_columns_are_found_by_name_or_named(tmp_path):
    image, mask = picture(np.random.default_rng(0))
    features = datasets.Features({"photo": datasets.Image(), "labels_map": datasets.Image()})
    table = datasets.Dataset.from_dict({"photo": [image] * 4, "labels_map": [mask] * 4}, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "d"))
    splits = read(tmp_path / "d", validation_fraction=0.5)
    assert np.array_equal(splits["validation"][0]["annotation"], np.asarray(mask))
    with pytest.raises(DataError, match="label_column_name='photo'|are both 'photo'"):
        read(tmp_path / "d", image_column_name="photo", label_column_name="photo")
    with pytest.raises(DataError, match="label_column_name='seg': no such column of images; there is photo"):
        read(tmp_path / "d", label_column_name="seg")
    datasets.DatasetDict({"train": table.remove_columns("labels_map")}).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DataError, match="no column of masks beside one of images"):
        read(tmp_path / "one")


def test_ignored_reduced_palette_and_16_bit(tmp_path):
    folder = write_folders(tmp_path, {"train": 2, "val": 1})
    mask = np.asarray(Image.open(mask_of(folder))).copy()
    expected = mask.astype(np.int64)
    palette = Image.fromarray(mask)
    palette.putpalette(list(range(256)) * 3)
    palette.save(mask_of(folder))
    assert Image.open(mask_of(folder)).mode == "P"
    assert np.array_equal(read(folder)["train"][0]["annotation"], expected)
    for name, number in (("train", 0), ("train", 1), ("val", 0)):
        wide = np.asarray(Image.open(mask_of(folder, name, number))).astype(np.uint16)
        Image.fromarray(np.where(wide == 255, 60000, wide + 1).astype(np.uint16)).save(mask_of(folder, name, number))
    found = read(folder, ignore_index=60000, reduce_labels=True)["train"][0]["annotation"]
    assert np.array_equal(found, expected)


def test_classes_of_a_model_are_matched_by_name(tmp_path):
    folder = write_folders(tmp_path, {"train": 2, "val": 1})
    plain = read(folder)["train"][0]["annotation"]
    found = read(folder, id2label={0: "bright", 5: "ground", 7: "dark"})["train"][0]["annotation"]
    for ours, theirs in ((0, 5), (1, 7), (2, 0), (IGNORED, IGNORED)):
        assert (found[plain == ours] == theirs).all() and (plain == ours).any()
    with pytest.raises(DataError, match="does not know the classes 'bright'; it knows 'ground', 'dark'"):
        read(folder, id2label={0: "ground", 1: "dark"})


def test_limits(tmp_path):
    folder = write_folders(tmp_path, {"train": 5, "val": 3, "test": 2})
    splits = read(folder, max_train_samples=2, max_eval_samples=1)
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation": 1, "test": 2}


def colours(path):
    Image.open(path).convert("RGB").save(path)


def smaller(path):
    Image.open(path).resize((16, 24)).save(path)


def out_of_range(path):
    mask = np.asarray(Image.open(path)).copy()
    mask[5, 5] = 9
    Image.fromarray(mask).save(path)


def broken(path):
    path.write_bytes(b"none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (colours, r"row 1 of split 'validation' \(.*val.masks.1\.png\): the mask cannot be used: it has mode RGB"),
        (smaller, r"row 1 of split 'validation' .*the mask has 16x24 pixels, its image 32x24"),
        (out_of_range, r"row 1 of split 'validation' .*the label 9, which is neither one of the 3 classes nor ignore"),
        (broken, r"row 1 of split 'validation' .*the mask cannot be used"),
        (lambda path: path.unlink(), r"val.images.1\.png has no mask of the same name"),
        (
            lambda path: (path.parent.parent / "images" / "1.png").unlink(),
            r"val.masks.1\.png has no image of the same",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message, tmp_path):
    folder = write_folders(tmp_path, {"train": 2, "val": 2})
    change(mask_of(folder, "val", 1))
    with pytest.raises(DataError, match=message):
        read(folder)


def test_masks_without_a_pixel_that_counts(tmp_path):
    folder = write_folders(tmp_path, {"train": 2, "val": 1})
    Image.new("L", (32, 24), 255).save(mask_of(folder, "val"))
    with pytest.raises(DataError, match="split 'validation' has no pixel that counts"):
        read(folder)


def test_a_turned_image_has_the_size_that_is_seen(tmp_path):
    folder = write_folders(tmp_path, {"train": 2, "val": 1})
    path = folder / "train" / "images" / "0.png"
    upright = Image.open(path)
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    row = read(folder)["train"][0]
    assert row["image"].size == (32, 24) and row["annotation"].shape == (24, 32)


def test_too_many_classes(tmp_path):
    folder = write_folders(tmp_path, {"train": 2, "val": 1})
    (folder / "id2label.json").write_text(json.dumps({str(n): f"c{n}" for n in range(300)}))
    with pytest.raises(DataError, match=re.escape("300 classes are too many; 255 can be told apart")):
        read(folder)


def test_every_tile_in_order_also_read_again(tmp_path):
    """What a second run finds in the cache of `datasets` is read in the same way."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from vpt_peft.tasks import get_task

    folder = write_folders(tmp_path, {"train": 2, "val": 3})
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    for _ in range(2):
        split = read(folder, max_eval_samples=2)["validation"]
        rows = get_task("semantic-segmentation").rows(split, processor)
        # 24x32 pixels in windows of 16: two down, three across
        assert len(rows) == 12
        counted = [
            sum(int((rows[6 * image + tile]["labels"] != IGNORED).sum()) for tile in range(6)) for image in (0, 1)
        ]
        assert counted == [23 * 32] * 2
