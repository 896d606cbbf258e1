"""Small pictures with masks or boxes, for the tests of dense tasks."""

import json

import numpy as np
from PIL import Image


NAMES = {0: "ground", 1: "dark", 2: "bright"}


def picture(draws, height=24, width=32):
    """Return a grey picture with a dark and a bright square in it, and its mask; the first row is ignored."""
    pixels, mask = np.full((height, width, 3), 128, np.uint8), np.zeros((height, width), np.uint8)
    for number in (1, 2):
        x, y = int(draws.integers(0, width // 2 - 12)) + width // 2 * (number - 1), int(draws.integers(0, height - 12))
        pixels[y : y + 12, x : x + 12] = 255 if number == 2 else 0
        mask[y : y + 12, x : x + 12] = number
    mask[0] = 255
    return Image.fromarray(pixels), Image.fromarray(mask)


def write_folders(folder, counts, **size):
    """Write <split>/images and <split>/masks with so many pictures, and id2label.json; return the folder."""
    draws = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            image, mask = picture(draws, **size)
            image.save(folder / split / "images" / f"{number}.png")
            mask.save(folder / split / "masks" / f"{number}.png")
    (folder / "id2label.json").write_text(json.dumps(NAMES))
    return folder


def write_coco(folder, counts, **size):
    """Write <split>/_annotations.coco.json with boxes and polygons of so many pictures beside it; return the folder."""
    draws = np.random.default_rng(0)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            image, mask = picture(draws, **size)
            image.save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png"})
            for kind in (1, 2):
                rows, columns = np.where(np.asarray(mask) == kind)
                left, top, right, bottom = map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "category_id": kind,
                        "bbox": [left, top, right - left, bottom - top],
                        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    }
                )
        categories = [{"id": number, "name": NAMES[number]} for number in (1, 2)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder
