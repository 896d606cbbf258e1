"""A plain vision transformer as a source of feature maps, whatever the size of the image."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel, ViTConfig


_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


def vision_config(config: Any) -> Any:
    """Return the configuration of the vision encoder alone; MAE's encoder is read as a ViT, which masks nothing.

    Raises:
        ValueError: the encoder is not a plain ViT with square patches.
    """
    config = getattr(config, "vision_config", config)
    if config.model_type == "vit_mae":
        config = ViTConfig.from_dict({**config.to_dict(), "model_type": "vit"})
    plain = isinstance(getattr(config, "patch_size", None), int) and hasattr(config, "hidden_size")
    if not plain or hasattr(config, "depths"):
        raise ValueError(
            f"model_type={config.model_type!r} is not a plain ViT (hidden_size, one square patch_size); choose a ViT, "
            "DeiT, DINOv2, MAE or CLIP, or a model with a dense head of its own."
        )
    return config


class OnPlainViT:
    """Loads only its own checkpoints: from a plain ViT's, transformers would make a model with random weights."""

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; see `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: it is of another kind of model.
        """
        wanted, config = cls.config_class.model_type, kwargs.get("config")  # type: ignore[attr-defined]
        if name_or_path is not None and config is None:
            source = {name: kwargs[name] for name in _HUB if name in kwargs}
            config = AutoConfig.from_pretrained(name_or_path, **source)
        if config is not None and config.model_type != wanted:
            raise ValueError(
                f"{str(name_or_path)!r} is of model_type={config.model_type!r}, from which {cls.__name__} cannot be loaded. "
                "An adapter that was trained on it, with its head, is loaded by "
                "vpt_peft.training.inference.load_adapter_model(folder)."
            )
        return super().from_pretrained(name_or_path, *args, **kwargs)  # type: ignore[misc]


def check_image_size(config: Any, size: tuple[int, int]) -> None:
    """Check that images of a size (height, width) hold at least one patch of a plain ViT.

    Raises:
        ValueError: they do not.
    """
    patch = vision_config(config).patch_size
    if min(size) < patch:
        raise ValueError(f"image_size={list(size)}: a patch has {patch}x{patch} pixels; give at least that.")


def build_backbone(config: Any) -> PreTrainedModel:
    """Return an encoder of `vision_config` with fresh weights, without a pooling layer, which dense heads do not read."""
    return AutoModel.from_config(config, **_without_pooler(config))


def load_backbone(name_or_path: str, **source: Any) -> PreTrainedModel:
    """Return the pre-trained vision encoder of a checkpoint in float32.

    Args:
        name_or_path: Hub id or folder.
        source: `revision`, `token`, `cache_dir`, as of `from_pretrained`.

    Raises:
        OSError: there is no such model.
        ValueError: the checkpoint is not a plain ViT's, or lacks weights of its encoder.
    """
    config = vision_config(AutoConfig.from_pretrained(name_or_path, **source))
    model, info = AutoModel.from_pretrained(
        name_or_path,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        **_without_pooler(config),
        **source,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name_or_path!r} lacks weights of its encoder: {', '.join(missing[:5])}.")
    return model


def _without_pooler(config: Any) -> dict[str, bool]:
    parameters = inspect.signature(cast(Any, AutoModel._model_mapping[type(config)])).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def patch_map(backbone: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the patch tokens of the encoder's output as a map; see `patch_maps`."""
    return patch_maps(backbone, pixel_values, [backbone.config.num_hidden_layers - 1])[0]


def patch_maps(backbone: Any, pixel_values: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
    """Return the patch tokens of some blocks as maps `(batch, hidden, height / patch, width / patch)`.

    Those of the last block are the encoder's output, behind its final norm. Positions are interpolated to the image. An
    image whose sides are no multiples of the patch is filled up with zeros to the right and below.

    Args:
        backbone: of `build_backbone` or `load_backbone`.
        pixel_values: `(batch, channels, height, width)`.
        blocks: 0-based.
    """
    patch, last = backbone.config.patch_size, backbone.config.num_hidden_layers - 1
    height, width = pixel_values.shape[-2:]
    pixel_values = F.pad(pixel_values, (0, -width % patch, 0, -height % patch))
    rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        options["interpolate_pos_encoding"] = True
    if any(block != last for block in blocks):
        options["output_hidden_states"] = True
    output = backbone(pixel_values=pixel_values, **options)
    tokens = [output.last_hidden_state if block == last else output.hidden_states[block + 1] for block in blocks]
    # Class, distillation and register tokens stand in front
    return [each[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns)) for each in tokens]
