import io
import os
import pickle
import socket

import datasets
import numpy as np
import pytest
from peft_fixtures import run_python
from PIL import Image

from vpt_peft.data.images import CheckedImage, DataError, ImageError, find_corrupt_images, read_bytes, to_rgb


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(values, dtype=np.uint8):
    return Image.fromarray(np.array([values], dtype=dtype))


def pixels(image):
    return np.asarray(to_rgb(image)).reshape(-1, 3).tolist()


RED, GREEN, WHITE = [255, 0, 0], [0, 255, 0], [255, 255, 255]


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_of_pillow_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (5, 3)))
    assert image.mode == "RGB" and image.size == (5, 3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (grey([0, 77]), [[0] * 3, [77] * 3]),
        (Image.new("1", (1, 1), 1), [WHITE]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [RED]),
        (Image.new("LA", (1, 1), (10, 0)), [WHITE]),
        (Image.new("LA", (1, 1), (10, 255)), [[10] * 3]),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), [RED]),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), [WHITE]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 128)), [[127] * 3]),
    ],
)
def test_colours(image, expected):
    assert pixels(image) == expected


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 128, 255], np.uint16, [0, 128, 255]),  # 8 bits in a 16-bit file
        ([0, 2048, 4095], np.uint16, [0, 128, 255]),  # 12 bits
        ([0, 32768, 65535], np.uint16, [0, 128, 255]),
        ([0, 32768, 65535], np.int32, [0, 128, 255]),
        ([-100, 20, 100], np.int32, [0, 153, 255]),
        ([0, 120000, 200000], np.int32, [0, 153, 255]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 128.0, 255.0], np.float32, [0, 128, 255]),
        ([0.0, 32768.0, 65535.0], np.float32, [0, 128, 255]),
        ([-1.0, 0.2, 1.0], np.float32, [0, 153, 255]),
        ([np.nan, 0.5, np.inf], np.float32, [0, 128, 0]),
        ([7, 7, 7], np.uint16, [7, 7, 7]),
    ],
)
def test_more_than_eight_bits(values, dtype, expected):
    assert [pixel[0] for pixel in pixels(grey(values, dtype))] == expected
    if dtype is np.uint16:
        assert [pixel[0] for pixel in pixels(encoded(grey(values, dtype)))] == expected


def test_big_endian_sixteen_bits():
    assert pixels(Image.frombytes("I;16B", (2, 1), b"\x00\x00\xff\xff")) == [[0] * 3, WHITE]


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)) == [RED, GREEN]
    assert pixels(encoded(image, transparency=1)) == [RED, WHITE]


def test_grey_with_a_transparent_level():
    assert pixels(encoded(grey([5, 100]), transparency=100)) == [[5] * 3, WHITE]


def test_cmyk_jpeg():
    (pixel,) = pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.array(pixel) - RED).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise
    image = Image.new("RGB", (32, 16))
    image.paste((255, 0, 0), (0, 0, 32, 8))
    upright = to_rgb(encoded(image, kind, exif=exif))
    assert upright.size == (16, 32)
    assert upright.getpixel((14, 16))[0] > 200 and upright.getpixel((1, 16))[0] < 50
    # an image that was turned once is not turned again
    assert to_rgb(upright).size == (16, 32)


def test_a_file_with_malformed_exif_is_still_read():
    data = encoded(Image.new("RGB", (8, 4), (0, 255, 0)), "JPEG", exif=b"Exif\0\0nonsense")
    assert to_rgb(data).size == (8, 4)


def test_sources_of_an_image(tmp_path):
    path = tmp_path / "x.png"
    grey([9]).save(path)
    data = path.read_bytes()
    for source in (path, str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}):
        assert pixels(source) == [[9] * 3]
    assert read_bytes({"bytes": data, "path": None}) == read_bytes({"bytes": None, "path": str(path)}) == data


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_truncated_files(tmp_path, kind, share):
    data = encoded(NOISE, kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.bin' cannot be read .*find_corrupt_images"):
        to_rgb(path)


@pytest.mark.parametrize(
    "source", [b"", b"no image", None, {"bytes": None, "path": None}, {"bytes": b"no", "path": "p.png"}, "gone.png", 3]
)
def test_not_an_image(source):
    with pytest.raises(ImageError, match="cannot be read") as caught:
        to_rgb(source)
    assert isinstance(caught.value, DataError)
    if isinstance(source, dict) and source["path"]:
        assert "'p.png'" in str(caught.value)


def test_a_lazily_opened_truncated_image_is_named(tmp_path):
    path = tmp_path / "lazy.jpg"
    path.write_bytes(encoded(NOISE, "JPEG")[:-200])
    with pytest.raises(ImageError, match="lazy.jpg"):
        to_rgb(Image.open(path))


def test_errors_survive_pickling_between_workers():
    error = pickle.loads(pickle.dumps(ImageError("image 'x' cannot be read")))
    assert type(error) is ImageError and str(error) == "image 'x' cannot be read"


@pytest.fixture
def mixed(tmp_path):
    """Five images, of which row 1 is truncated, row 3 is no image and row 4 is gone."""
    good = encoded(NOISE, "JPEG")
    (tmp_path / "gone.jpg").write_bytes(good)
    rows = [
        {"bytes": good, "path": "0.jpg"},
        {"bytes": good[:-300], "path": "1.jpg"},
        {"bytes": encoded(grey([0, 65535], np.uint16)), "path": "2.png"},
        {"bytes": b"<html>", "path": None},
        {"bytes": None, "path": str(tmp_path / "gone.jpg")},
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    split = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1, 0]}, features=features)
    (tmp_path / "gone.jpg").unlink()
    return split


def test_find_corrupt_images(mixed):
    found = find_corrupt_images(mixed)
    assert [row for row, _ in found] == [1, 3, 4]
    assert "'1.jpg'" in found[0][1] and "truncated" in found[0][1] and "gone.jpg" in found[2][1]
    # whatever transform is set, and through a selection, rows are those of the split given
    chosen = mixed.with_transform(lambda batch: {"x": batch["label"]}).select([4, 0, 1])
    assert [row for row, _ in find_corrupt_images(chosen)] == [0, 2]
    assert find_corrupt_images(mixed.select([0, 2])) == []


def test_checked_image_names_the_file(mixed):
    split = mixed.cast_column("image", CheckedImage())
    assert split[0]["image"].size == (40, 40)
    with pytest.raises(ImageError, match=r"'1\.jpg'"):
        split[1]
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        split[4]


def test_missing_bytes(mixed):
    row = mixed.cast_column("image", datasets.Image(decode=False))[4]["image"]
    with pytest.raises(ImageError, match="gone.jpg"):
        read_bytes(row)


def test_memory_of_large_images(tmp_path):
    """Too many pixels are refused before decoding; of 25 million there are the file's own and the RGB ones at a time."""
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("1", (13_000, 13_000))))
    Image.new("I;16", (5000, 5000)).save(tmp_path / "wide.tif")
    Image.new("RGBA", (5000, 5000)).save(tmp_path / "clear.tif")
    program = """
import resource, sys
from vpt_peft.data.images import ImageError, to_rgb
for name in ("bomb.png", "wide.tif", "clear.tif"):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        to_rgb(f"{sys.argv[1]}/{name}")
    except ImageError as error:
        print(error, file=sys.stderr)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = run_python(program, str(tmp_path))
    assert "bomb.png" in done.stderr and "13000x13000 pixels are more than the 89,478,485" in done.stderr
    bomb, wide, clear = map(int, done.stdout.split())
    assert bomb < 20 and wide < 25 * (2 + 1 + 4) + 130
    # Over the peak of the image before
    assert wide + clear < 25 * (4 + 4) + 130
    path = str(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="13000x13000"):
        CheckedImage().decode_example({"path": path, "bytes": None})
    assert len(find_corrupt_images(datasets.Dataset.from_dict({"image": [path]}))) == 1


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_only_regular_files_are_opened(kind, tmp_path):
    path = tmp_path / "image.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
    for read in (to_rgb, lambda name: read_bytes({"path": name}), lambda name: CheckedImage().decode_example(
        {"path": name, "bytes": None}
    )):  # fmt: skip
        with pytest.raises(ImageError, match="image.png"):
            read(str(path))


def test_a_link_to_a_file_is_opened(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(Image.new("RGB", (3, 2), "red")))
    (tmp_path / "link.png").symlink_to(tmp_path / "image.png")
    assert to_rgb(tmp_path / "link.png").size == (3, 2)


def test_formats_that_need_another_program_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    for read in (to_rgb, lambda name: CheckedImage().decode_example({"path": name, "bytes": None})):
        with pytest.raises(ImageError, match="cannot identify"):
            read(str(path))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert pixels(content)[0] == pytest.approx(RED, abs=2)


def test_an_image_that_is_given_is_left_alone():
    image = Image.new("RGB", (4, 2), "red")
    image.getexif()[0x0112] = 6
    assert to_rgb(image).size == (2, 4) and image.size == (4, 2)
