"""The `objects` column of detection data, made uniform and checked, with errors that name the sample."""

from __future__ import annotations

import io
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import datasets

from .images import DataError, open_image, read_bytes


_BOX_NAMES = ("bbox", "bboxes", "box", "boxes")
_CLASS_NAMES = ("category", "categories", "category_id", "label", "labels", "class", "classes")
_CROWD_NAMES = ("iscrowd", "is_crowd", "crowd")
# Annotation tools round, and let boxes end on the next pixel
_TOLERANCE = 2.0
_TRANSPOSED = (5, 6, 7, 8)
_ORIENTATION = 0x0112

OBJECTS = {
    "bbox": [[datasets.Value("float32")]],
    "category": [datasets.Value("int64")],
    "area": [datasets.Value("float32")],
    "iscrowd": [datasets.Value("bool")],
}


def find_objects_column(features: datasets.Features, wanted: str | None) -> str:
    """Return the column that is wanted, else the only one with boxes in it.

    Raises:
        DataError: there is no such column, or there are several.
    """
    names = [name for name, feature in features.items() if has_boxes(feature)]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return str(wanted)
    columns = ", ".join(features)
    fault = (
        f"label_column_name={wanted!r} is not a column of objects" if wanted else f"{len(names)} columns of objects"
    )
    raise DataError(
        f"{fault}; there is {columns}. Detection reads a column such as objects, with lists bbox ([x, y, width, height] "
        "in pixels) and category, or a folder with COCO JSON. Name it with label_column_name."
    )


def has_boxes(feature: Any) -> bool:
    """Whether a column's feature is of objects with boxes."""
    return _field(feature, _BOX_NAMES) is not None


def object_classes(feature: Any) -> Any:
    """Return the feature of the class of one object in an objects column."""
    name = _field(feature, _CLASS_NAMES)
    if name is None:
        raise DataError(
            f"the objects column has {list(_fields(feature))}, but no category; add the class of each box."
        )
    inner = _fields(feature)[name]
    return getattr(inner, "feature", inner[0] if isinstance(inner, list) else inner)


def as_lists(value: Any) -> dict[str, list]:
    """Return the objects of one image as {"bbox", "category", "area", "iscrowd"}, whatever the fields are called.

    Args:
        value: a dict of lists, or a list of dicts; None for no objects.
    """
    if isinstance(value, Sequence):
        value = {name: [entry[name] for entry in value] for name in (value[0] if value else ())}
    value = value or {}
    boxes = list(value.get(_first(value, _BOX_NAMES), ()))
    return {
        "bbox": boxes,
        "category": list(value.get(_first(value, _CLASS_NAMES), ())),
        "area": list(value.get("area") or ()),
        "iscrowd": [bool(crowd) for crowd in value.get(_first(value, _CROWD_NAMES), ())] or [False] * len(boxes),
    }


def image_size(image: Any) -> tuple[int, int]:
    """Return (width, height) of an undecoded image, upright, from its header."""
    with open_image(io.BytesIO(read_bytes(image))) as opened:
        width, height = opened.size
        return (height, width) if opened.getexif().get(_ORIENTATION) in _TRANSPOSED else (width, height)


def check_objects(objects: dict[str, list], size: tuple[int, int], sample: str) -> dict[str, list]:
    """Return the objects of an image with boxes cut to it.

    Args:
        objects: of `as_lists`.
        size: (width, height) of the image.
        sample: how messages call the image.

    Raises:
        DataError: a box has no area, is not four numbers, or reaches outside the image by more than rounding; or there
            is not one category for each box.
    """
    width, height = size
    if not len(objects["bbox"]) == len(objects["category"]) == len(objects["iscrowd"]):
        raise DataError(
            f"{sample} has {len(objects['bbox'])} boxes, {len(objects['category'])} categories and "
            f"{len(objects['iscrowd'])} crowd marks; give one of each for every object."
        )
    cut = []
    for number, box in enumerate(objects["bbox"]):
        named = f"{sample}, {width}x{height} pixels: box {number}, {_shown(box)},"
        if box is None or len(box) != 4 or not all(v is not None and math.isfinite(v) for v in box):
            raise DataError(f"{named} is not four numbers; give [x, y, width, height] in pixels.")
        left, top, across, down = box
        if across <= 0 or down <= 0:
            raise DataError(f"{named} has no area; remove it, or give [x, y, width, height] in pixels.")
        over = max(-left, -top, left + across - width, top + down - height)
        if over > _TOLERANCE:
            raise DataError(
                f"{named} reaches {over:.4g} pixels outside the image; cut it to the image. Boxes are [x, y, width, "
                "height] in pixels, not two corners."
            )
        x0, y0 = min(max(left, 0.0), width), min(max(top, 0.0), height)
        x1, y1 = min(left + across, width), min(top + down, height)
        if x1 <= x0 or y1 <= y0:
            raise DataError(f"{named} lies outside the image; remove it.")
        cut.append([x0, y0, x1 - x0, y1 - y0])
    areas = objects["area"] if len(objects["area"]) == len(cut) else [None] * len(cut)
    areas = [box[2] * box[3] if area is None else float(area) for area, box in zip(areas, cut, strict=True)]
    return {**objects, "bbox": cut, "area": areas}


def number_classes(
    feature: Any, categories: Iterable[Hashable], named: Mapping[int, str] | None
) -> tuple[dict[int, str], dict[Hashable, int]]:
    """Return the classes by number, and the number of each category as it stands in the data.

    Args:
        feature: of one category: a `ClassLabel`, else integers or strings.
        categories: those of the training split.
        named: an `id2label` beside the data.
    """
    own = getattr(feature, "names", None)
    if own:
        return dict(enumerate(own)), {number: number for number in range(len(own))}
    if named:
        lookup: dict[Hashable, int] = {}
        for number, name in named.items():
            lookup |= {name: number, number: number}
        return dict(named), lookup
    distinct = sorted({c for c in categories if c is not None}, key=lambda c: (isinstance(c, str), c))
    return {n: str(c) for n, c in enumerate(distinct)}, {c: n for n, c in enumerate(distinct)}


def _shown(box: Any) -> str:
    return str([round(v, 2) if isinstance(v, float) else v for v in box]) if isinstance(box, Sequence) else repr(box)


def _first(value: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if name in value), "")


def _fields(feature: Any) -> Mapping[str, Any]:
    feature = getattr(feature, "feature", feature)
    feature = feature[0] if isinstance(feature, list) and feature else feature
    return feature if isinstance(feature, Mapping) else {}


def _field(feature: Any, names: Sequence[str]) -> str | None:
    return _first(_fields(feature), names) or None
