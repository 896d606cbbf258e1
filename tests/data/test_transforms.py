import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil, set_seed

from vpt_peft.data.images import CheckedImage, ImageError
from vpt_peft.data.transforms import build_transform
from vpt_peft.tasks.classification import TASK


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def vit(height=8, width=8, **options):
    return ViTImageProcessorPil(**{"size": {"height": height, "width": width}, **HALF, **options})


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(height=64, width=64):
    """Red grows with the column, green with the row, so that a crop shows where it was taken."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def split_of(images):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": list(range(len(images)))}, features=features)


@pytest.mark.parametrize("augmentation", ["none", "resize", "resize_crop_flip"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("processor", [vit(), vit(12, 8), CLIPImageProcessorPil(size=10, crop_size=8)])
def test_shapes_and_types(augmentation, train, processor):
    transform = build_transform(processor, augmentation, train)
    images = [noise(20, 30), Image.new("L", (3, 1)), Image.new("CMYK", (5, 90)), Image.new("I;16", (8, 8))]
    output = transform({"image": images, "other": [0] * 4})
    height = 12 if isinstance(processor, ViTImageProcessorPil) and processor.size["height"] == 12 else 8
    assert set(output) == {"pixel_values"}
    assert output["pixel_values"].shape == (4, 3, height, 8) and output["pixel_values"].dtype == torch.float32


def test_values_follow_the_checkpoints_statistics():
    image = Image.new("RGB", (20, 10), (0, 51, 255))
    for augmentation in ("none", "resize", "resize_crop_flip"):
        pixels = build_transform(vit(), augmentation)({"image": [image]})["pixel_values"][0]
        assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx([-1.0, -0.6, 1.0], abs=1e-6)
        imagenet = vit(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
        pixels = build_transform(imagenet, augmentation)({"image": [image]})["pixel_values"][0]
        expected = [-0.485 / 0.229, (0.2 - 0.456) / 0.224, 0.594 / 0.225]
        assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_none_and_resize_are_the_processors_own_resize(resample):
    processor, image = vit(12, 8, resample=resample), noise(31, 47)
    own = processor(images=[image], return_tensors="pt")["pixel_values"]
    for augmentation in ("none", "resize"):
        ours = build_transform(processor, augmentation, train=True)({"image": [image]})["pixel_values"]
        assert torch.equal(ours, own)


def test_none_keeps_the_crop_of_a_processor_and_resize_does_not():
    processor, image = (
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8, resample=0, **HALF),
        gradient(8, 64),
    )
    own = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(build_transform(processor, "none")({"image": [image]})["pixel_values"], own)
    red = build_transform(processor, "resize")({"image": [image]})["pixel_values"][0, 0, 0]
    # eight samples across all 64 columns instead of the middle 8
    assert torch.allclose(red.diff(), torch.full((7,), 8 / 127.5), atol=1e-6)
    assert torch.allclose(own[0, 0, 0].diff(), torch.full((7,), 1 / 127.5), atol=1e-6)


def test_a_processor_without_a_fixed_size_is_given_one():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    pixels = build_transform(processor, "none")({"image": [noise(20, 90), noise(30, 10)]})["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)


def test_centre_crop_in_evaluation():
    processor = vit(56, 56, resample=0)
    transform = build_transform(processor, "resize_crop_flip", train=False)
    pixels = transform({"image": [gradient(64, 128)]})["pixel_values"][0]
    columns, rows = (pixels[0] * 127.5 + 127.5)[0], (pixels[1] * 127.5 + 127.5)[:, 0]
    # shorter side 64 = 56 * 256/224, so nothing is scaled and (128 - 56) / 2 columns, (64 - 56) / 2 rows go
    assert torch.allclose(columns, torch.arange(36.0, 92.0), atol=1e-3)
    assert torch.allclose(rows, torch.arange(4.0, 60.0), atol=1e-3)
    assert torch.equal(transform({"image": [gradient(64, 128)]})["pixel_values"][0], pixels)


@pytest.mark.parametrize(("height", "width", "resized"), [(500, 1000, (256, 512)), (300, 200, (384, 256))])
def test_the_shorter_side_becomes_256_for_224(height, width, resized):
    transform = build_transform(vit(224, 224, resample=0), "resize_crop_flip")
    image = gradient(height, width).convert("RGB").resize((width, height))
    expected = image.resize(resized[::-1], Image.Resampling.NEAREST)
    left, top = (resized[1] - 224) // 2, (resized[0] - 224) // 2
    expected = torch.from_numpy(np.array(expected.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1)
    pixels = transform({"image": [image]})["pixel_values"][0] * 127.5 + 127.5
    assert torch.allclose(pixels, expected.float(), atol=1e-3)


def crops(transform, count=200):
    """(left, top, flipped) of random crops of the gradient picture."""
    pixels = transform({"image": [gradient()] * count})["pixel_values"] * 127.5 + 127.5
    first, last, top = pixels[:, 0, 0, 0], pixels[:, 0, 0, -1], pixels[:, 1, 0, 0]
    return [
        (round(min(a, b)), round(t), a > b) for a, b, t in zip(*(v.tolist() for v in (first, last, top)), strict=True)
    ]


def test_random_crops_and_flips_cover_their_range():
    set_seed(0)
    drawn = crops(build_transform(vit(56, 56, resample=0), "resize_crop_flip", train=True), 600)
    assert {left for left, _, _ in drawn} == set(range(9)) == {top for _, top, _ in drawn}
    assert 0.42 < np.mean([flipped for _, _, flipped in drawn]) < 0.58


def test_draws_are_reproducible_and_differ_between_calls_and_seeds():
    transform = build_transform(vit(56, 56, resample=0), "resize_crop_flip", train=True)
    set_seed(3)
    first, second = crops(transform), crops(transform)
    set_seed(3)
    assert crops(transform) == first and first != second
    set_seed(3)
    assert crops(build_transform(vit(56, 56, resample=0), "resize_crop_flip", train=True, seed=1)) != first


def epoch(loader):
    return torch.cat([batch["pixel_values"] for batch in loader])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_epochs_draw_differently_and_reproducibly(workers):
    transform = pickle.loads(pickle.dumps(build_transform(vit(56, 56, resample=0), "resize_crop_flip", train=True)))
    split = split_of([gradient()] * 16).with_transform(transform)
    loader = DataLoader(split, batch_size=4, num_workers=workers, collate_fn=TASK.collate)
    set_seed(5)
    first, second = epoch(loader), epoch(loader)
    set_seed(5)
    assert torch.equal(epoch(loader), first)
    assert not torch.equal(first, second)
    # the batches come from both workers in turn; none repeats another's draws
    assert len({batch.numpy().tobytes() for batch in first.split(4)}) == 4


def test_a_corrupt_image_is_named_from_within_a_worker():
    buffer = io.BytesIO()
    noise(40, 40).save(buffer, "JPEG")
    rows = [{"bytes": buffer.getvalue(), "path": "a.jpg"}, {"bytes": buffer.getvalue()[:-300], "path": "b.jpg"}]
    undecoded = (
        split_of(rows).cast_column("image", datasets.Image(decode=False)).with_transform(build_transform(vit()))
    )
    with pytest.raises(ImageError, match=r"'b\.jpg' cannot be read"):
        undecoded[0:2]
    decoded = split_of(rows).cast_column("image", CheckedImage()).with_transform(build_transform(vit()))
    with pytest.raises(ImageError, match=r"'b\.jpg' cannot be read"):
        next(iter(DataLoader(decoded, batch_size=2, num_workers=1, collate_fn=TASK.collate)))


class Flat:
    """A processor whose output is not one image per picture."""

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.zeros(1, 2, 3, 4, 4)}


@pytest.mark.parametrize(
    ("processor", "options", "message"),
    [
        (vit(), {"augmentation": "blur"}, "augmentation='blur' is unknown; choose one of none, resize"),
        (vit(), {"seed": -1}, "seed=-1 is negative"),
        (Flat(), {}, r"Flat gives pixel_values of shape \(1, 2, 3, 4, 4\)"),
        (vit(do_resize=False, size={"longest_edge": 8}), {}, "no input size follows|has size="),
    ],
)
def test_bad_settings(processor, options, message):
    with pytest.raises(ValueError, match=message):
        build_transform(processor, **options)
