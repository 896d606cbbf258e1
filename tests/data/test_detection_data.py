import json

import datasets
import numpy as np
import pytest
from PIL import Image

from vpt_peft.data.arguments import DataArguments
from vpt_peft.data.detection import read_detection
from vpt_peft.data.images import DataError, ImageError


CLASSES = datasets.ClassLabel(names=["cat", "dog"])


def picture(width=20, height=10, value=0):
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


def hub(folder, category=CLASSES, **splits):
    """A folder in Hub layout; each split is a list of objects, one entry per picture of 20x10 pixels."""
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        keys = rows[0].keys()
        kinds = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(category)}
        kinds |= {"iscrowd": datasets.List(datasets.Value("int64")), "area": datasets.List(datasets.Value("float32"))}
        features = datasets.Features({"image": datasets.Image(), "objects": {key: kinds[key] for key in keys}})
        columns = {"image": [picture(value=i) for i in range(len(rows))], "objects": rows}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def read(folder, id2label=None, **options):
    return read_detection(DataArguments(str(folder), **options), cache_dir=str(folder / ".cache"), id2label=id2label)


ONE = {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1]}
NONE: dict = {"bbox": [], "category": []}


def test_a_hub_column(tmp_path):
    crowd = {"bbox": [[1, 2, 3, 4], [0, 0, 5, 5]], "category": [0, 1], "iscrowd": [0, 1], "area": [10.0, 20.0]}
    splits = read(hub(tmp_path, train=[crowd, crowd], validation=[crowd]))
    assert list(splits) == ["train", "validation"]
    assert splits["train"].column_names == ["image", "objects"]
    assert splits["train"].features["objects"]["category"].feature.names == ["cat", "dog"]
    assert splits["train"][1]["objects"] == {
        "bbox": [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 5.0, 5.0]],
        "category": [0, 1],
        "area": [10.0, 20.0],
        "iscrowd": [False, True],
    }
    assert splits["train"][1]["image"].getpixel((0, 0)) == (1, 1, 1)


def test_pictures_without_objects_stay_and_areas_follow_from_boxes(tmp_path):
    splits = read(hub(tmp_path, train=[ONE, NONE, ONE], validation=[NONE, ONE]))
    assert splits["train"]["objects"][:] == [
        {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1], "area": [12.0], "iscrowd": [False]},
        {"bbox": [], "category": [], "area": [], "iscrowd": []},
        {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1], "area": [12.0], "iscrowd": [False]},
    ]


def test_a_validation_split_is_drawn_and_limits_hold(tmp_path):
    splits = read(hub(tmp_path, train=[ONE] * 10), validation_fraction=0.3, max_train_samples=4)
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 3}
    pixels = [image.getpixel((0, 0))[0] for split in splits.values() for image in split["image"]]
    assert len(set(pixels)) == 7


@pytest.mark.parametrize("category", [datasets.Value("string"), datasets.Value("int64")])
def test_classes_without_names(tmp_path, category):
    names = ["bee", "ant"] if category.dtype == "string" else [7, 3]
    rows = [{"bbox": [[0, 0, 1, 1], [1, 1, 2, 2]], "category": names}]
    splits = read(hub(tmp_path, category=category, train=rows, validation=rows))
    found = splits["train"].features["objects"]["category"].feature.names
    assert found == sorted(map(str, names))
    assert splits["train"][0]["objects"]["category"] == [1, 0]


def test_classes_of_a_file(tmp_path):
    rows = [{"bbox": [[0, 0, 1, 1]], "category": [1]}]
    folder = hub(tmp_path, category=datasets.Value("int64"), train=rows, validation=rows)
    (folder / "id2label.json").write_text(json.dumps({"0": "x", "1": "y", "2": "z"}))
    splits = read(folder)
    assert splits["train"].features["objects"]["category"].feature.names == ["x", "y", "z"]
    assert splits["train"][0]["objects"]["category"] == [1]


def test_a_model_numbers_by_name(tmp_path):
    folder = hub(tmp_path, train=[ONE], validation=[ONE])
    assert read(folder, {0: "dog", 1: "cat"})["validation"][0]["objects"]["category"] == [0]
    # Classes that do not occur need not be known
    assert read(folder, {0: "dog"})["validation"][0]["objects"]["category"] == [0]
    with pytest.raises(DataError, match="does not know the classes 'dog'"):
        read(folder, {0: "cat"})


def test_boxes_are_cut_to_the_image_within_rounding(tmp_path):
    rows = [{"bbox": [[-0.5, -1.0, 21.0, 12.0]], "category": [0]}]
    splits = read(hub(tmp_path, train=rows, validation=rows))
    assert splits["train"][0]["objects"]["bbox"] == [[0.0, 0.0, 20.0, 10.0]]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [[15, 2, 19, 9]], "category": [0]}, r"row 1 of split 'train', 20x10 pixels: box 0, \[15.0, 2.0"),
        ({"bbox": [[15, 2, 19, 9]], "category": [0]}, "reaches 14 pixels outside"),
        ({"bbox": [[1, 1, 2, 2], [5, 5, 0, 3]], "category": [0, 0]}, "box 1, .* has no area"),
        ({"bbox": [[5, 5, 2, -3]], "category": [0]}, "has no area"),
        ({"bbox": [[20, 5, 2, 3]], "category": [0]}, "lies outside the image"),
        ({"bbox": [[5, 5, float("nan"), 3]], "category": [0]}, "is not four numbers"),
        ({"bbox": [[5, 5, 2]], "category": [0]}, "is not four numbers"),
        ({"bbox": [[5, 5, 2, 2]], "category": [0, 1]}, "1 boxes, 2 categories"),
    ],
)
def test_wrong_boxes_name_the_sample(tmp_path, objects, message):
    with pytest.raises(DataError, match=message):
        read(hub(tmp_path, train=[ONE, objects], validation=[ONE]))


def test_other_faults_are_named(tmp_path):
    rows = [{"bbox": [[5, 5, 2, 2]], "category": [4]}]
    with pytest.raises(DataError, match="row 0 of split 'validation' has the category 4"):
        read(hub(tmp_path / "a", category=datasets.Value("int64"), train=[ONE], validation=rows))
    with pytest.raises(DataError, match="split 'validation' has no object"):
        read(hub(tmp_path / "b", train=[ONE], validation=[NONE, NONE]))
    crowds = {**ONE, "iscrowd": [1]}
    with pytest.raises(DataError, match="split 'train' has no object in any of its 1 images .crowds are none"):
        read(hub(tmp_path / "d", train=[crowds], validation=[crowds]))
    with pytest.raises(DataError, match="label_column_name='image' is not a column of objects"):
        read(tmp_path / "b", label_column_name="image")
    plain = datasets.Dataset.from_dict({"image": [picture()], "label": [0]}).cast_column("image", datasets.Image())
    (tmp_path / "c").mkdir()
    plain.to_parquet(tmp_path / "c" / "train.parquet")
    with pytest.raises(DataError, match="0 columns of objects; there is image, label"):
        read(tmp_path / "c")


# COCO JSON


def coco(path, names, objects, categories=None):
    """A COCO file; objects are (image, category id, box)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": name, "width": 20, "height": 10} for i, name in enumerate(names)],
                "annotations": [
                    {"id": i, "image_id": image, "category_id": category, "bbox": box}
                    for i, (image, category, box) in enumerate(objects)
                ],
                "categories": categories or [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}],
            }
        )
    )


def save(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        picture(value=number).save(folder / name)


OBJECTS = [(0, 3, [1, 2, 3, 4]), (0, 1, [0, 0, 5, 5])]


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("{split}/_annotations.coco.json", "{split}"),  # Roboflow
        ("annotations/instances_{split}.json", "images/{split}"),  # CVAT
        ("annotations/instances_{split}2017.json", "{split}2017"),  # COCO
        ("{split}.json", "images"),
    ],
)
def test_layouts(tmp_path, annotations, images):
    for split, names in {"train": ("a.png", "b.png"), "valid": ("c.png",)}.items():
        coco(tmp_path / annotations.format(split=split), names, OBJECTS)
        save(tmp_path / images.format(split=split), *names)
    splits = read(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation": 1}
    assert splits["train"].features["objects"]["category"].feature.names == ["cat", "dog"]
    assert splits["train"][0]["objects"]["category"] == [1, 0]
    assert splits["train"][0]["objects"]["bbox"] == [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 5.0, 5.0]]
    assert splits["train"][1]["objects"]["bbox"] == []
    assert splits["train"][1]["image"].getpixel((0, 0)) == (1, 1, 1)


def test_one_file_is_split(tmp_path):
    names = [f"{i}.png" for i in range(5)]
    coco(tmp_path / "annotations" / "instances_default.json", names, [(i, 3, [1, 2, 3, 4]) for i in range(5)])
    save(tmp_path / "images" / "default", *names)
    assert {name: len(split) for name, split in read(tmp_path).items()} == {"train": 4, "validation": 1}


def test_the_group_that_roboflow_adds_is_no_class(tmp_path):
    kinds = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "animals"},
        {"id": 2, "name": "dog", "supercategory": "animals"},
    ]
    coco(tmp_path / "train.json", ["a.png", "b.png"], [(0, 2, [1, 2, 3, 4]), (1, 1, [1, 2, 3, 4])], kinds)
    save(tmp_path, "a.png", "b.png")
    splits = read(tmp_path, validation_fraction=0.5)
    assert splits["train"].features["objects"]["category"].feature.names == ["cat", "dog"]


def test_faults_of_coco_files(tmp_path):
    def fails(message):
        with pytest.raises(DataError, match=message):
            read(tmp_path)

    path = tmp_path / "train.json"
    coco(path, ["a.png", "b.png", "c.png"], OBJECTS)
    save(tmp_path, "b.png")
    fails(r"2 of 3 images are missing, the first is 'a.png'; they were looked for in")
    coco(path, ["b.png"], [(5, 3, [1, 2, 3, 4])])
    fails("annotation 0 is of image_id=5")
    coco(path, ["b.png"], [(0, 2, [1, 2, 3, 4])])
    fails("annotation 0 has category_id=2")
    coco(path, ["b.png"], [(0, 3, [])])
    fails(r"annotation 0 has no bbox")
    coco(path, ["b.png"], [(0, 3, [1, 2, 30, 4])])
    fails(r"row 0 of split 'train' \(.*b.png\), 20x10 pixels: box 0")
    coco(tmp_path / "train" / "more.json", ["b.png"], OBJECTS)
    fails("are both of the split 'train'")
    (tmp_path / "train" / "more.json").unlink()
    coco(tmp_path / "val.json", ["b.png"], OBJECTS, [{"id": 3, "name": "dog"}, {"id": 1, "name": "cow"}])
    fails("has other categories than")
    (tmp_path / "val.json").write_text("{")
    coco(path, ["b.png"], [(0, 3, [1, 2, 3, 4])])
    (tmp_path / "val.json").rename(tmp_path / "instances_val.json")
    fails("instances_val.json is not a COCO file")
    (tmp_path / "instances_val.json").unlink()
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.raises(ImageError, match=r"row 0 of split 'train' \(.*b.png\): the image cannot be read"):
        read(tmp_path)
