"""Predictions of images as tables and as COCO JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas


def as_table(rows: Sequence[Mapping[str, Any]], kind: str, finds_many: bool = False) -> str:
    """Return rows of `predict_images` as text.

    Args:
        rows: {"image", "predictions", "error"}.
        kind: "json"; or "csv" with columns image, label_1, probability_1, ..., error.
        finds_many: a line of the csv for each finding, with columns image, label, score, xmin, ..., error, and one for
            each image without any.

    Raises:
        ValueError: another kind.
    """
    if kind == "json":
        return json.dumps(list(rows), indent=2) + "\n"
    if kind != "csv":
        raise ValueError(f"format={kind!r} is unknown; choose csv, json or, for boxes and masks, coco.")
    if finds_many:
        # Run lengths of masks are for json and coco
        names = (name for row in rows for each in row["predictions"] for name in each if name != "segmentation")
        columns = ["image", *dict.fromkeys(["label", "score", "xmin", "ymin", "xmax", "ymax", *names])]
        table = [
            {"image": row["image"], "error": row["error"], **found}
            for row in rows
            for found in row["predictions"] or [{}]
        ]
    else:
        columns = ["image"]
        for rank in range(max((len(row["predictions"]) for row in rows), default=0)):
            names = next(row["predictions"][rank] for row in rows if len(row["predictions"]) > rank)
            columns += [f"{name}_{rank + 1}" for name in names]
        table = [
            {
                "image": row["image"],
                "error": row["error"],
                **{
                    f"{name}_{rank}": value
                    for rank, prediction in enumerate(row["predictions"], start=1)
                    for name, value in prediction.items()
                },
            }
            for row in rows
        ]
    return pandas.DataFrame(table, columns=[*columns, "error"]).to_csv(
        index=False, float_format="%.6f", lineterminator="\n"
    )


def as_coco(rows: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> str:
    """Return rows of `predict_images` as COCO JSON: images, annotations with scores, and categories numbered from 1.

    Args:
        rows: {"image", "width", "height", "predictions"}; those without a size could not be read and are left out.
        names: the classes by number.
    """
    numbers = {name: number + 1 for number, name in names.items()}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        if "width" not in row:
            continue
        image = len(images) + 1
        images.append({"id": image, "file_name": row["image"], "width": row["width"], "height": row["height"]})
        for found in row["predictions"]:
            across, down = found["xmax"] - found["xmin"], found["ymax"] - found["ymin"]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": numbers[found["label"]],
                "bbox": [found["xmin"], found["ymin"], across, down],
                "area": across * down,
                "iscrowd": 0,
                "score": found["score"],
            }
            if "segmentation" in found:
                annotation |= {"segmentation": found["segmentation"], "area": found["area"]}
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories}, indent=2) + "\n"
