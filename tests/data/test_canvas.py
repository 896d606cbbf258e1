import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessorPil, ViTImageProcessorPil

from vpt_peft.data.canvas import Canvas, JointAugmentation, canvas_size
from vpt_peft.data.images import DataError
from vpt_peft.data.objects import image_size


PROCESSOR = ViTImageProcessorPil(size={"height": 40, "width": 60})


def test_sizes_of_processors():
    assert canvas_size(PROCESSOR) == (40, 60)
    assert canvas_size(DetrImageProcessorPil(size={"shortest_edge": 80, "longest_edge": 133})) == (80, 80)
    with pytest.raises(DataError, match="size="):
        canvas_size(object())


def test_images_keep_their_aspect_ratio():
    wide, tall = Image.new("RGB", (30, 10), "white"), Image.new("RGB", (5, 10), "white")
    canvas = Canvas(PROCESSOR, 40, 60)
    pixels = canvas.pixel_values([wide, tall])
    assert pixels.shape == (2, 3, 40, 60) and pixels.dtype == torch.float32
    # White is 1 after normalising, what is not covered 0
    assert (pixels[0, :, :20] == 1).all() and (pixels[0, :, 20:] == 0).all()
    assert (pixels[1, :, :, :20] == 1).all() and (pixels[1, :, :, 20:] == 0).all()
    assert canvas.extent(wide) == (20.0, 30.0) and canvas.extent(tall) == (10.0, 15.0)


def test_a_line_of_one_pixel_stays():
    assert Canvas(PROCESSOR, 40, 60).pixel_values([Image.new("RGB", (600, 1))]).shape == (1, 3, 40, 60)


def bright(pixels):
    """Corners of what is bright."""
    rows, columns = torch.where(pixels[0] > 0.5)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def test_boxes_follow_the_picture():
    augment, flipped, scaled = JointAugmentation(), 0, set()
    torch.manual_seed(0)
    for _ in range(20):
        pixels = torch.zeros(3, 60, 80)
        pixels[:, 20:40, 24:40] = 1
        image, boxes, stays = augment(pixels, torch.tensor([[24.0, 20.0, 40.0, 40.0]]))
        assert stays.tolist() == [True]
        assert np.abs(np.array(bright(image)) - boxes[0].numpy()).max() < 1.0
        flipped += boxes[0, 0] > 40
        scaled.add(round(float(boxes[0, 2] - boxes[0, 0])))
    assert 0 < flipped < 20 and min(scaled) < 16 < max(scaled)


def test_a_flip_alone_is_exact():
    augment = JointAugmentation()
    del augment._augment[1]
    torch.manual_seed(0)
    boxes = {
        tuple(augment(torch.zeros(3, 60, 80), torch.tensor([[0.0, 5.0, 10.0, 60.0]]))[1][0].tolist())
        for _ in "0123456789"
    }
    assert boxes == {(0.0, 5.0, 10.0, 60.0), (70.0, 5.0, 80.0, 60.0)}


def test_what_leaves_the_picture_is_no_object():
    augment = JointAugmentation()
    torch.manual_seed(0)
    corner = torch.tensor([[0.0, 0.0, 10.0, 10.0], [30.0, 20.0, 50.0, 40.0]])
    seen = [augment(torch.zeros(3, 60, 80), corner) for _ in range(30)]
    assert all(stays[1] for _, _, stays in seen) and 3 < sum(not stays[0] for _, _, stays in seen) < 30
    for _, boxes, stays in seen:
        kept = boxes[stays]
        assert (kept >= 0).all() and (kept[:, 2] <= 80).all() and (kept[:, 3] <= 60).all()
    image, boxes, stays = augment(torch.zeros(3, 60, 80), torch.zeros(0, 4))
    assert boxes.shape == (0, 4) and stays.shape == (0,)


def test_draws_follow_the_generator_and_the_seed():
    def draw(seed):
        torch.manual_seed(1)
        return JointAugmentation(seed)(torch.zeros(3, 60, 80), torch.tensor([[24.0, 20.0, 40.0, 40.0]]))[1]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_sizes_are_of_the_upright_image(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    assert image_size({"path": str(tmp_path / "turned.jpg"), "bytes": None}) == (10, 20)
    assert image_size({"path": None, "bytes": (tmp_path / "plain.jpg").read_bytes()}) == (20, 10)
