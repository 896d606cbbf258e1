"""Findings drawn over an image: boxes and masks with the names of their classes, by supervision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


# Okabe and Ito's palette without black: told apart by colour-blind people too
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# By the contrast of each colour with black and white
_TEXT = ("#000000", "#000000", "#000000", "#000000", "#FFFFFF", "#000000", "#000000")
# Smaller images are enlarged, so that labels cover less of them
_SMALLEST_SIDE = 480


def draw_findings(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    labels: Sequence[str],
    masks: np.ndarray | None = None,
) -> Image.Image:
    """Return the image with what was found in it. A class has the same colour in every image.

    Args:
        image: RGB.
        boxes: left, top, right and bottom of each finding in pixels, the best first; it lies on top.
        classes: number of the class of each.
        labels: text of each.
        masks: `(findings, height, width)`, boolean.
    """
    import warnings

    # It says that OpenCV would be faster
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        import supervision as sv

    factor = max(1.0, _SMALLEST_SIDE / min(image.size))
    scene = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    if not len(boxes):
        return scene
    boxes, classes, labels = boxes[::-1], classes[::-1], labels[::-1]
    if masks is not None:
        masks = masks[::-1]
        masks = np.stack(
            [np.asarray(Image.fromarray(mask).resize(scene.size, Image.Resampling.NEAREST)) for mask in masks]
        )
    found = sv.Detections(
        xyxy=np.asarray(boxes, dtype=np.float32) * factor, class_id=np.asarray(classes, dtype=int), mask=masks
    )
    palette, text = sv.ColorPalette.from_hex(list(PALETTE)), sv.ColorPalette.from_hex(list(_TEXT))
    line = max(2, round(min(scene.size) / 240))
    if masks is None:
        scene = sv.BoxAnnotator(palette, thickness=line).annotate(scene, found)
    else:
        scene = sv.MaskAnnotator(palette, opacity=0.45).annotate(scene, found)
        scene = sv.PolygonAnnotator(palette, thickness=max(1, line // 2)).annotate(scene, found)
    annotator = sv.LabelAnnotator(
        palette, text_color=text, text_scale=0.4 * line / 2, text_thickness=1, text_padding=2, smart_position=True
    )
    return annotator.annotate(scene, found, list(labels))
