import json

import datasets
import numpy as np
import pytest
from PIL import Image

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.images import DataError
from vpt_peft.data.instances import instance_masks, read_instances


def read(folder, id2label=None, **options):
    return read_instances(DataArguments(str(folder), **options), cache_dir=str(folder / ".cache"), id2label=id2label)


def ids(*numbers, size=(8, 6), kind=np.uint16):
    """A mask with a row of pixels for each number."""
    mask = np.zeros((size[1], size[0]), kind)
    for row, number in enumerate(numbers):
        mask[row] = number
    return Image.fromarray(mask)


def parquet(folder, masks):
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "instances": datasets.Image()})
    columns = {"image": [Image.new("RGB", (8, 6))] * len(masks), "instances": masks}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_numbers_beyond_eight_bits(tmp_path):
    splits = read(parquet(tmp_path, [ids(300, 0, 65535), ids()]))
    assert splits["train"].features["category"].names == ["object"]
    masks, classes = instance_masks(splits["train"][0])
    assert masks.shape == (2, 6, 8) and masks[0, 0].all() and masks[1, 2].all() and masks.sum() == 16
    assert classes.tolist() == [0, 0]
    masks, classes = instance_masks(splits["train"][1])
    assert masks.shape == (0, 6, 8) and classes.shape == (0,)


def test_the_class_of_a_file_and_of_a_model(tmp_path):
    folder = parquet(tmp_path, [ids(1)])
    (folder / "id2label.json").write_text('{"0": "nucleus"}')
    assert read(folder)["train"].features["category"].names == ["nucleus"]
    splits = read(folder, {0: "cell", 1: "nucleus"})
    assert instance_masks(splits["train"][0])[1].tolist() == [1]
    with pytest.raises(DataError, match="does not know the classes 'nucleus'"):
        read(folder, {0: "cell"})
    (folder / "id2label.json").write_text('{"0": "a", "1": "b"}')
    with pytest.raises(DataError, match="names 2 classes"):
        read(folder)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (ids(1, size=(9, 6)), "row 1 of split 'train': the image is 8x6 pixels and its mask 9x6"),
        (Image.new("RGB", (8, 6)), "row 1 of split 'train': the mask is RGB"),
    ],
)
def test_masks_that_do_not_fit_name_the_sample(tmp_path, mask, message):
    with pytest.raises(DataError, match=message):
        read(parquet(tmp_path, [ids(1), mask]))


def coco(folder, annotations):
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / split / "a.png")
        content = {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"id": n, "image_id": 1, **each} for n, each in enumerate(annotations)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def test_polygons_run_lengths_and_crowds(tmp_path):
    from faster_coco_eval.core import mask as coco_mask

    shape = np.zeros((6, 8), np.uint8, order="F")
    shape[4, 5:7] = 1
    packed = coco_mask.encode(shape)
    counts = packed["counts"]
    packed["counts"] = counts.decode() if isinstance(counts, bytes) else counts
    polygon = [[0, 0, 4, 0, 4, 2, 0, 2], [6, 0, 8, 0, 8, 1, 6, 1]]
    splits = read(
        coco(
            tmp_path,
            [
                {"category_id": 2, "bbox": [0, 0, 8, 2], "segmentation": polygon},
                {"category_id": 1, "bbox": [5, 4, 2, 1], "segmentation": packed},
                {
                    "category_id": 1,
                    "bbox": [0, 0, 8, 6],
                    "iscrowd": 1,
                    "segmentation": {"size": [6, 8], "counts": [0, 48]},
                },
            ],
        )
    )
    masks, classes = instance_masks(splits["train"][0])
    assert classes.tolist() == [1, 0]
    assert masks[0].sum() == 10 and masks[0, :2, :4].all() and masks[0, 0, 6:].all()
    assert np.array_equal(masks[1], shape.astype(bool))
    renumbered = read(tmp_path, {0: "dog", 1: "cat"})
    assert instance_masks(renumbered["train"][0])[1].tolist() == [0, 1]


def outline(segmentation, **fields):
    return {"category_id": 1, "bbox": [0, 0, 2, 2], "segmentation": segmentation, **fields}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 4, 0]], "cannot be used .a polygon needs at least three points"),
        ([[0, 0, 4, 0, 4, 4, 0]], "a polygon needs at least three points"),
        ([[20, 20, 30, 20, 30, 30]], "cannot be used .it covers no pixel of the image"),
        ([[1, 1, 4, 1, 3, 1]], "it covers no pixel"),
        ({"size": [3, 3], "counts": [1, 8]}, r"of size \[3, 3\], the image is \[6, 8\]"),
        ({"size": [6, 8], "counts": [1, 8]}, "cannot be used"),
        ({"size": [6, 8], "counts": "~~"}, "cannot be used"),
        ({"size": [6, 8]}, "lacks 'counts'"),
        ("text", "cannot be used"),
    ],
)
def test_wrong_segmentations_name_the_sample(tmp_path, segmentation, message):
    good = outline([[0, 0, 4, 0, 4, 2, 0, 2]])
    with pytest.raises(
        DataError, match=r"row 0 of split 'train' \(.*a.png\): the segmentation of object 1.*" + message
    ):
        read(coco(tmp_path, [good, outline(segmentation)]))


def test_splits_without_an_object_are_refused(tmp_path):
    with pytest.raises(DataError, match="split 'train' has no object in any of its 2 images"):
        read(parquet(tmp_path / "a", [ids(), ids()]))
    crowd = outline([[0, 0, 4, 0, 4, 2, 0, 2]], iscrowd=1)
    with pytest.raises(DataError, match="split 'train' has no object in any of its 1 images .crowds are none"):
        read(coco(tmp_path / "b", [crowd]))


def test_boxes_alone_are_no_instances(tmp_path):
    with pytest.raises(DataError, match="row 0 of split 'train': object 0 has no segmentation"):
        read(coco(tmp_path, [{"category_id": 1, "bbox": [0, 0, 2, 2]}]))
