"""Adapter files and images with anything in them: read, or refused by a clear error that changes nothing."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_fixtures import cases, make, output
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft_fixtures import CONFIGS, hook_count, randomize
from PIL import Image
from safetensors.torch import load_file, save_file

from vpt_peft.data.images import ImageError, to_rgb
from vpt_peft.tuners.vpt.parameters import find_parameters


KINDS = ("deep", "shallow", "pooled", "gated")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 10**7), max_size=3),
    st.dictionaries(st.sampled_from(["0", "1", "2", "x"]), st.text(max_size=3) | st.integers(), max_size=3),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        model = get_peft_model(make("vit"), CONFIGS[kind]())
        randomize(model, 1, trainable_only=True).save_pretrained(folder / kind)  # type: ignore[operator]
    return folder


BASE = make("vit")
with torch.no_grad():
    EXPECTED = output(BASE)


@st.composite
def damages(draw: Any) -> tuple[str, Any]:
    """One change of a folder: of bytes, of a tensor, or of a field."""
    kind = draw(st.sampled_from(["bytes", "cut", "tensor", "key", "field", "config"]))
    if kind == "bytes":
        return kind, draw(
            st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3)
        )
    if kind == "cut":
        return kind, draw(st.floats(0, 1))
    if kind == "tensor":
        dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int32, torch.bool, torch.uint8])
        shape = st.lists(st.integers(0, 5), max_size=3)
        return kind, (draw(st.integers(0, 99)), draw(dtypes), draw(shape | st.none()), draw(st.floats(width=32)))
    if kind == "key":
        name = st.text(max_size=8) | st.sampled_from(
            ["base_model.model.vit.layernorm.weight", "base_model.model.classifier.original_module.bias",
             "base_model.model.prompt_tuner.vpt_prompts.0", "classifier.weight"]
        )  # fmt: skip
        return kind, (draw(st.integers(0, 99)), draw(name))
    fields = ["num_virtual_tokens", "deep", "layers_to_transform", "prompt_location", "pooling", "projection_dim",
              "bias", "id2label", "modules_to_save", "backbone", "peft_type", "gate", "gate_init", "num_gates",
              "temperature_max", "implementation", "token_type", "prompt_rank", "task_type", "new"]  # fmt: skip
    if kind == "field":
        return kind, (draw(st.sampled_from(fields)), draw(VALUES))
    return kind, draw(st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()))


def apply(folder: Path, kind: str, detail: Any) -> None:
    weights, config = folder / WEIGHTS, folder / CONFIG
    if kind == "bytes":
        content = bytearray(weights.read_bytes())
        for position, new in detail:
            # Most of them in the header
            start = position % (1500 if position % 3 else len(content))
            content[start : start + len(new)] = new
        weights.write_bytes(content)
    elif kind == "cut":
        content = weights.read_bytes()
        weights.write_bytes(content[: int(len(content) * detail)])
    elif kind == "tensor":
        number, dtype, shape, value = detail
        held = load_file(weights)
        key = sorted(held)[number % len(held)]
        held[key] = torch.full(
            held[key].shape if shape is None else shape, value if dtype.is_floating_point else 1
        ).to(dtype)
        save_file(held, weights)
    elif kind == "key":
        number, name = detail
        held = load_file(weights)
        held[name] = held.pop(sorted(held)[number % len(held)])
        save_file(held, weights)
    elif kind == "field":
        config.write_text(json.dumps({**json.loads(config.read_text()), detail[0]: detail[1]}))
    else:
        config.write_bytes(detail)


@given(name=st.sampled_from(KINDS), damage=damages())
@cases(60)
@pytest.mark.filterwarnings("ignore")
def test_adapter_folders(saved: Path, name: str, damage: tuple[str, Any]):
    hooks, keys = hook_count(BASE), list(BASE.state_dict())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "adapter")
        shutil.copytree(saved / name, folder)
        apply(folder, *damage)
        try:
            model = PeftModel.from_pretrained(BASE, folder)
        except (ValueError, OSError):
            model = None
        except (KeyError, TypeError) as error:
            # PEFT reads `peft_type` before it is known whose file it is
            assert damage[0] in ("field", "config"), error
            model = None
        if model is not None:
            with torch.no_grad():
                assert output(model).isfinite().all()
                with model.disable_adapter():
                    assert torch.equal(output(model), EXPECTED)
            model.delete_adapter("default")
            model.unload()
            BASE.requires_grad_(True)
    assert hook_count(BASE) == hooks and list(BASE.state_dict()) == keys and find_parameters(BASE) is None
    assert all(p.requires_grad for p in BASE.parameters()) and not hasattr(BASE, "peft_config")
    with torch.no_grad():
        assert torch.equal(output(BASE), EXPECTED)


def encoded(mode: str, kind: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").convert(mode).save(file, kind)
    return file.getvalue()


FILES = [
    encoded(mode, kind, size)
    for mode, kind, size in [
        ("RGB", "PNG", (9, 7)), ("RGBA", "PNG", (1, 40)), ("P", "PNG", (8, 8)), ("L", "JPEG", (16, 9)),
        ("CMYK", "JPEG", (9, 16)), ("P", "GIF", (7, 7)), ("RGB", "BMP", (5, 3)), ("RGB", "TIFF", (6, 6)),
        ("I", "TIFF", (6, 6)), ("RGBA", "WEBP", (8, 5)), ("L", "PPM", (4, 4)), ("1", "PNG", (9, 9)),
        ("RGB", "JPEG2000", (8, 8)), ("RGBA", "ICO", (16, 16)),
    ]
]  # fmt: skip


@given(
    number=st.integers(0, len(FILES) - 1),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), max_size=3),
    share=st.floats(0.3, 1),
)
@cases(50)
@pytest.mark.filterwarnings("ignore")
def test_images(number: int, changes: list[tuple[int, bytes]], share: float):
    content = bytearray(FILES[number])
    for position, new in changes:
        start = position % len(content)
        content[start : start + len(new)] = new
    try:
        image = to_rgb(bytes(content[: int(len(content) * share)]))
    except ImageError as error:
        assert "cannot be read" in str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height <= Image.MAX_IMAGE_PIXELS
