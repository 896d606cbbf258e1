"""Windows over images: tiles decide every pixel once, and what is drawn at random keeps image and mask together."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vpt_peft.data.masks import IGNORED
from vpt_peft.data.windows import SegmentationTransform, tiles


SIZE = (16, 24)
PLAIN = ViTImageProcessorPil(size={"height": 16, "width": 24}, do_normalize=False)


def marked(height, width):
    """An image whose red channel is its mask."""
    mask = np.random.default_rng(0).integers(0, 5, (height, width))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = mask * 50
    return Image.fromarray(pixels), mask


@pytest.mark.parametrize("image", [(16, 24), (7, 9), (17, 24), (40, 90), (16, 25), (133, 23)])
def test_tiles_decide_every_pixel_once(image):
    decided, reach = np.zeros(image, int), SIZE
    covering = tiles(image, SIZE)
    for tile in covering:
        rows, columns = slice(*tile.rows), slice(*tile.columns)
        decided[rows, columns] += 1
        assert tile.top <= tile.rows[0] <= tile.rows[1] <= tile.top + reach[0]
        assert tile.left <= tile.columns[0] <= tile.columns[1] <= tile.left + reach[1]
    assert (decided == 1).all()
    assert len(covering) == 1 or image[0] > 16 or image[1] > 24


def test_neighbours_share_a_quarter_and_each_decides_its_half():
    first, second = tiles((16, 42), (16, 24))
    assert (first.left, first.columns, second.left, second.columns) == (0, (0, 21), 18, (21, 42))


@pytest.mark.parametrize("image", [(16, 24), (10, 12), (40, 61)])
def test_tiles_show_what_their_labels_say(image):
    picture, mask = marked(*image)
    transform = SegmentationTransform(PLAIN, SIZE)
    count = len(tiles(image, SIZE))
    rows = transform({"image": [picture] * count, "annotation": [mask] * count, "tile": list(range(count))})
    seen = 0
    for pixels, labels in zip(rows["pixel_values"], rows["labels"], strict=True):
        assert pixels.shape == (3, *SIZE) and labels.shape == SIZE and labels.dtype == torch.int64
        counted = labels != IGNORED
        torch.testing.assert_close(pixels[0][counted] * 255 / 50, labels[counted].float())
        seen += int(counted.sum())
    assert seen == mask.size


@pytest.mark.parametrize("augmentation", ["none", "resize", "resize_crop_flip"])
@pytest.mark.parametrize("image", [(40, 61), (10, 12)])
def test_drawn_windows_keep_image_and_mask_together(augmentation, image):
    picture, _ = marked(*image)
    # Large areas, as scaling mixes the colours of neighbours
    mask = (np.arange(image[1])[None] * 4 // image[1] + np.zeros((image[0], 1), int)).astype(np.int64)
    pixels = np.zeros((*image, 3), np.uint8)
    pixels[..., 0] = mask * 60
    picture, transform = Image.fromarray(pixels), SegmentationTransform(PLAIN, SIZE, augmentation, train=True)
    torch.manual_seed(0)
    shares = []
    for _ in range(12):
        row = transform({"image": [picture], "annotation": [mask.copy()]})
        labels, red = row["labels"][0], row["pixel_values"][0][0] * 255 / 60
        counted = labels != IGNORED
        shares.append((red[counted] - labels[counted]).abs().lt(0.3).float().mean().item())
        if augmentation == "none" and image == (10, 12):
            assert int(counted.sum()) == mask.size
    assert min(shares) > 0.5 and np.mean(shares) > 0.85


def test_windows_are_drawn_anew_mirrored_and_by_the_seed():
    mask = np.arange(3)[None].repeat(4, 1).repeat(8, 0) + np.zeros((8, 12), int)
    picture = Image.new("RGB", (12, 8))

    def draw(seed=0, state=0):
        torch.manual_seed(state)
        transform = SegmentationTransform(PLAIN, SIZE, "resize_crop_flip", train=True, seed=seed)
        return [transform({"image": [picture], "annotation": [mask]})["labels"][0] for _ in range(20)]

    first = draw()
    assert all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, draw(seed=1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, draw(state=1), strict=True))
    # Mirrored ones fall from left to right; what was filled up is right and below in all
    falling = [bool((row[0][row[0] != IGNORED].diff() < 0).any()) for row in first]
    assert 4 <= sum(falling) <= 16
    small = [row for row in first if (row == IGNORED).any()]
    assert small and all((row[0, 0] != IGNORED) and (row[-1, -1] == IGNORED) for row in small)


def test_half_of_the_augmented_windows_hold_a_rare_class():
    mask = np.zeros((200, 200), np.int64)
    mask[3, 5] = 1
    picture = Image.new("RGB", (200, 200))

    def share(augmentation):
        torch.manual_seed(0)
        transform = SegmentationTransform(PLAIN, SIZE, augmentation, train=True)
        rows = [transform({"image": [picture], "annotation": [mask]})["labels"][0] for _ in range(150)]
        return np.mean([bool((row == 1).any()) for row in rows])

    # A class of the image is drawn for half of the windows, and this is one of two; scaled down, a pixel may vanish
    assert 0.1 < share("resize_crop_flip") < 0.45 and share("none") < 0.06


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="augmentation='blur' is unknown; choose one of none, resize"):
        SegmentationTransform(PLAIN, SIZE, "blur")
