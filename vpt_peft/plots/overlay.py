"""Findings drawn over an image: boxes and masks with the names of their classes, by supervision."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image


# Okabe and Ito's palette without black: told apart by colour-blind people too
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# What later rounds through the palette do to its lightness
_LIGHTNESS = (1.0, 0.55, 1.6, 0.75, 1.3)
# Smaller images are enlarged, so that labels cover less of them
_SMALLEST_SIDE = 480


def class_colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class, alike in every image: the palette's, then darker and lighter ones of it."""
    red, green, blue = (int(PALETTE[number % len(PALETTE)][at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    lightness = min(0.92, lightness * _LIGHTNESS[number // len(PALETTE) % len(_LIGHTNESS)])
    shade = colorsys.hls_to_rgb(hue, lightness, saturation)
    return round(255 * shade[0]), round(255 * shade[1]), round(255 * shade[2])


def ink(colour: Sequence[int]) -> str:
    """Return "black" or "white", by the contrast with a colour, weighted as the eye sees it."""
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 110 else "white"


def captions(findings: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[str]:
    """Return the label and score of each finding; the score alone where there is one class, as objects may be small."""
    return [f"{each['label']} " * (len(names) > 1) + f"{each['score']:.2f}" for each in findings]


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
    colours = [class_colour(number) for number in range(len(PALETTE) * len(_LIGHTNESS))]
    palette = sv.ColorPalette([sv.Color(*colour) for colour in colours])
    text = sv.ColorPalette([sv.Color.BLACK if ink(colour) == "black" else sv.Color.WHITE for colour in colours])
    line = max(2, round(min(scene.size) / 240))
    if masks is None:
        scene = sv.BoxAnnotator(palette, thickness=line).annotate(scene, found)
    else:
        scene = sv.MaskAnnotator(palette, opacity=0.45).annotate(scene, found)
        # White, as objects that touch are often of one class
        scene = sv.PolygonAnnotator(sv.Color.WHITE, thickness=max(1, line // 2)).annotate(scene, found)
    annotator = sv.LabelAnnotator(
        palette, text_color=text, text_scale=0.4 * line / 2, text_thickness=1, text_padding=2, smart_position=True
    )
    return annotator.annotate(scene, found, list(labels))
