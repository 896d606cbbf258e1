"""Convert an official ViT checkpoint into a folder that `from_pretrained` reads."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from ..files import write_json, written_beside
from .errors import ConversionError
from .layouts import Geometry, Weight, is_jax, layout, read_geometry
from .reading import read_checkpoint
from .sources import SOURCES, backbone_weights, resolve_source


logger = logging.getLogger(__name__)

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
WRITTEN_FILES = frozenset({"config.json", "model.safetensors", "preprocessor_config.json"})


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    source: str = "auto",
    image_size: int | None = None,
    num_heads: int | None = None,
    overwrite: bool = False,
    normalization: str = "auto",
) -> Path:
    """Convert an official ViT checkpoint into a Hugging Face ViT folder.

    Reads MoCo-v3, MAE, DINO and timm checkpoints (`.pth`, `.pth.tar`, `.safetensors`) and the `.npz` files of
    google-research/vision_transformer. No code stored in them runs, and every tensor is checked by name and shape.
    The folder holds `config.json`, `model.safetensors` and `preprocessor_config.json`, all of them or none. A linear head that reads the class token is kept as `classifier` (ViTForImageClassification, labels LABEL_0,
    LABEL_1, ...); otherwise the folder holds a ViTModel without pooler. The layer norm's epsilon is 1e-6, as in all
    five code bases, and the activation the exact GELU (JAX's own is its tanh approximation; timm and the Hub's copies
    of those weights use the exact one too).

    Args:
        checkpoint: the file.
        output_dir: the folder to make; an empty one may exist.
        source: "moco_v3", "mae", "dino", "timm", "npz", or "auto": found from the names in the file.
        image_size: side of the input in pixels; None: patch size times patches along a side. Only needed where the
            patches leave a rest.
        num_heads: attention heads; None: from the shapes (npz), else as the code base has them, else hidden / 64.
        overwrite: replace a folder that an earlier conversion made.
        normalization: "imagenet", "half" (mean and std 0.5), or "auto": half for npz, for timm what a `config.json`
            beside the checkpoint says, imagenet for all others.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: `checkpoint` does not exist.
        FileExistsError: `output_dir` is a file or is not empty (with `overwrite`: holds anything but a
            conversion).
        ConversionError: the file cannot be read, is not a plain ViT, or an argument does not fit it.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if normalization not in ("auto", *NORMALIZATIONS):
        raise ConversionError(f"normalization={normalization!r}; use 'auto', {', '.join(map(repr, NORMALIZATIONS))}.")
    _check_output(output_dir, overwrite)

    content = read_checkpoint(checkpoint)
    name = resolve_source(content, source)
    weights = backbone_weights(content, name)
    if is_jax(weights) != (name == "npz"):
        raise ConversionError(
            f"source={source!r} does not fit the names in checkpoint={str(checkpoint)!r}, such as "
            f"{_listed(list(weights), 4)}; use source='auto'."
        )
    geometry = read_geometry(weights, num_heads, dict(SOURCES[name].heads))
    table = layout(geometry, jax=is_jax(weights))
    _check_weights(weights, table, checkpoint)
    image_size = _image_size(geometry, image_size)
    model = _build(geometry, image_size, weights, table)
    preprocessor = _preprocessor(image_size, name, normalization, checkpoint)
    with written_beside(output_dir) as folder:
        model.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", preprocessor)
    logger.info(
        "Wrote %s: %s, %d blocks of %d channels, %d heads, patches of %d px, images of %d px.",
        output_dir,
        type(model).__name__,
        geometry.num_layers,
        geometry.hidden_size,
        geometry.num_heads,
        geometry.patch_size,
        image_size,
    )
    return output_dir


def _check_output(output_dir: Path, overwrite: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"output_dir={str(output_dir)!r} is a file; name a new folder.")
    present = {entry.name for entry in output_dir.iterdir()} if output_dir.exists() else set()
    if present and not overwrite:
        raise FileExistsError(
            f"output_dir={str(output_dir)!r} is not empty; name a new folder, or pass overwrite=True to replace it (--overwrite)."
        )
    if foreign := sorted(present - WRITTEN_FILES):
        raise FileExistsError(
            f"output_dir={str(output_dir)!r} holds more than a conversion ({', '.join(foreign[:5])}), so "
            "overwrite=True would delete files that are not its own; name another folder."
        )


def _check_weights(weights: Mapping[str, Tensor], table: list[Weight], checkpoint: Path) -> None:
    expected = {weight.source: weight.shape for weight in table}
    common = [name for name in expected if name in weights]
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "misshapen": [
            f"{name} is {tuple(weights[name].shape)}, expected {expected[name]}"
            for name in common
            if tuple(weights[name].shape) != expected[name]
        ],
        "no floating point numbers": [
            f"{name} ({weights[name].dtype})" for name in common if not weights[name].is_floating_point()
        ],
        "not finite": [
            name for name in common if weights[name].is_floating_point() and not weights[name].isfinite().all()
        ],
    }
    if any(faults.values()):
        report = "; ".join(f"{kind}: {_listed(names)}" for kind, names in faults.items() if names)
        raise ConversionError(
            f"checkpoint={str(checkpoint)!r} does not fit a plain ViT. {report}. Check that the download is complete "
            "and that `source` is right; a Hugging Face ViT cannot hold variants with other layers."
        )


def _listed(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _image_size(geometry: Geometry, image_size: int | None) -> int:
    if image_size is None:
        return geometry.grid * geometry.patch_size
    if image_size // geometry.patch_size != geometry.grid:
        raise ConversionError(
            f"image_size={image_size} makes {image_size // geometry.patch_size} patches of {geometry.patch_size} px a "
            f"side, but the position embedding has {geometry.grid}; leave image_size out, and read larger images with "
            "interpolate_pos_encoding=True."
        )
    return image_size


def _build(
    geometry: Geometry, image_size: int, weights: Mapping[str, Tensor], table: list[Weight]
) -> ViTModel | ViTForImageClassification:
    config = ViTConfig(
        hidden_size=geometry.hidden_size,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        intermediate_size=geometry.intermediate_size,
        image_size=image_size,
        patch_size=geometry.patch_size,
        encoder_stride=geometry.patch_size,
        qkv_bias=geometry.qkv_bias,
        layer_norm_eps=1e-6,
    )
    model_class: Any = ViTModel
    options: dict[str, Any] = {"add_pooling_layer": False}
    if geometry.num_labels is not None:
        config.num_labels = geometry.num_labels
        model_class, options = ViTForImageClassification, {}
    state_dict: dict[str, Tensor] = {}
    for weight in table:
        state_dict.update(weight.convert(weights[weight.source]))
    dtypes = {tensor.dtype for tensor in state_dict.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True, **options
    )
    # transformers maps the Hub's names to those of its own version; what it could not place must not be lost.
    if wrong := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise ConversionError(f"This version of transformers did not take the Hub's ViT names: {wrong}.")
    return model


def _preprocessor(image_size: int, name: str, normalization: str, checkpoint: Path) -> dict[str, Any]:
    statistics = NORMALIZATIONS[SOURCES[name].normalization if normalization == "auto" else normalization]
    if name == "timm" and normalization == "auto":
        stated = _timm_statistics(checkpoint.parent / "config.json")
        if stated is None:
            logger.warning(
                "timm weights do not say how their input was normalised: ImageNet's mean and std are written. Those "
                "trained with AugReg or on ImageNet-21k by Google need normalization='half'."
            )
        statistics = stated or statistics
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": SOURCES[name].resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(statistics[0]),
        "image_std": list(statistics[1]),
    }


def _timm_statistics(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std from the `config.json` that timm puts beside its weights on the Hub; None: there is none."""
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["pretrained_cfg"]
        mean, std = (tuple(float(value) for value in stated[key]) for key in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (mean, std) if len(mean) == len(std) == 3 else None
