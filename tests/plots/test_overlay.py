import numpy as np
from PIL import Image, ImageColor

from vpt_peft.plots.overlay import PALETTE, captions, class_colour, draw_findings


def colours(image):
    return {colour for _, colour in image.getcolors(10**6)}


def test_a_class_has_one_colour_whatever_else_is_found():
    image = Image.new("RGB", (640, 480), "white")
    both = draw_findings(image, [[10, 50, 100, 200], [200, 50, 300, 200]], [0, 1], ["a", "b"])
    alone = draw_findings(image, [[200, 50, 300, 200]], [1], ["b"])
    first, second = (ImageColor.getrgb(PALETTE[number]) for number in (0, 1))
    assert {first, second} <= colours(both)
    assert second in colours(alone) and first not in colours(alone)
    assert both.getpixel((10, 100)) == first and both.getpixel((200, 100)) == second
    # Classes beyond the palette have other shades of it, and colours come again at last
    seen = colours(draw_findings(image, [[10, 50, 100, 200]], [len(PALETTE)], ["c"]))
    assert first not in seen and class_colour(len(PALETTE)) in seen
    assert len({class_colour(number) for number in range(35)}) == 35 and class_colour(35) == first


def test_small_images_are_enlarged_with_their_boxes():
    drawn = draw_findings(Image.new("RGB", (64, 48), "white"), [[20, 10, 40, 30]], [0], ["a"])
    assert drawn.size == (640, 480)
    orange = np.asarray(drawn)[:, :, 2] == ImageColor.getrgb(PALETTE[0])[2]
    rows, columns = np.where(orange[110:, :])
    assert abs(columns.min() - 200) <= 2 and abs(columns.max() - 400) <= 2 and abs(rows.max() + 110 - 300) <= 2


def test_captions():
    findings = [{"label": "a", "score": 0.987}, {"label": "b", "score": 1.0}]
    assert captions(findings, {0: "a", 1: "b"}) == ["a 0.99", "b 1.00"]
    assert captions(findings[:1], {0: "a"}) == ["0.99"]


def test_masks_and_nothing():
    image = Image.new("RGB", (640, 480), "white")
    assert colours(draw_findings(image, [], [], [])) == {(255, 255, 255)}
    mask = np.zeros((1, 480, 640), bool)
    mask[0, 100:200, 100:300] = True
    drawn = draw_findings(image, [[100, 100, 300, 200]], [0], ["a"], mask)
    inside, outside = drawn.getpixel((200, 180)), drawn.getpixel((400, 300))
    assert drawn.getpixel((100, 150)) == (255, 255, 255)
    assert outside == (255, 255, 255) and inside != outside and inside[2] < inside[0]
