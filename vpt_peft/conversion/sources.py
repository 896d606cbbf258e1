"""Where checkpoints come from: how weights are wrapped, what of them is not the backbone, how input is normalised."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import ConversionError


logger = logging.getLogger(__name__)

# Bilinear and bicubic in PIL's numbering, which preprocessor_config.json uses.
_BILINEAR, _BICUBIC = 2, 3

# ViT-H, ViT-g and ViT-G of every code base have 16 heads.
_LARGE_HEADS = ((1280, 16), (1408, 16), (1664, 16))


@dataclass(frozen=True)
class Source:
    """What is particular about the checkpoints of one code base.

    Attributes:
        containers: keys under which the weights may lie, the first that exists is taken; else the file's own dict.
        prefixes: prefixes of the backbone's names; where one of them occurs, names without it are left out.
        ignored: prefixes (after those above) of what is known to be neither the backbone nor a linear classifier.
        normalization: "imagenet" (ImageNet mean and std) or "half" (0.5 and 0.5).
        resample: PIL's number of the resize filter used in the official evaluation.
        heads: attention heads by hidden size, where they differ from one per 64 channels.
    """

    containers: tuple[str, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    normalization: str = "imagenet"
    resample: int = _BICUBIC
    heads: tuple[tuple[int, int], ...] = _LARGE_HEADS


SOURCES: dict[str, Source] = {
    "moco_v3": Source(
        containers=("state_dict",),
        prefixes=("module.base_encoder.", "base_encoder.", "module."),
        resample=_BILINEAR,
        # MoCo-v3's own ViT-S has 12 heads of 32 channels.
        heads=((384, 12), *_LARGE_HEADS),
    ),
    "mae": Source(
        containers=("model", "state_dict"), prefixes=("module.",), ignored=("mask_token", "decoder_", "head.")
    ),
    "dino": Source(
        containers=("teacher", "student", "state_dict", "model"),
        prefixes=("module.backbone.", "backbone.", "module."),
        ignored=("head.",),
    ),
    "timm": Source(containers=("state_dict", "model"), prefixes=("module.",)),
    "npz": Source(containers=(), normalization="half", resample=_BILINEAR),
}


def resolve_source(content: Mapping[str, Any], source: str) -> str:
    """Name the code base of a checkpoint: `source` itself, or found from the names in the file if it is "auto".

    Raises:
        ConversionError: `source` is unknown.
    """
    if source != "auto":
        if source not in SOURCES:
            raise ConversionError(f"source={source!r} is unknown; use 'auto' or one of {', '.join(SOURCES)}.")
        return source
    found = _detect(content)
    logger.info("source='auto': read as a %s checkpoint.", found)
    return found


def _detect(content: Mapping[str, Any]) -> str:
    if any(name.endswith("/kernel") for name in content):
        return "npz"
    if isinstance(content.get("teacher"), Mapping) or isinstance(content.get("student"), Mapping):
        return "dino"
    weights = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    names = [str(name) for name in weights]
    if any("base_encoder." in name for name in names):
        return "moco_v3"
    # MoCo-v3's linear probes name the architecture without patch and image size, timm's with them.
    arch = content.get("arch")
    if isinstance(arch, str) and arch in ("vit_small", "vit_base") and all(n.startswith("module.") for n in names):
        return "moco_v3"
    if any(name.removeprefix("module.").startswith(("mask_token", "decoder_")) for name in names):
        return "mae"
    if weights is content.get("model") and not any(name.startswith("head") for name in names):
        return "mae"
    if weights is content.get("model") and any(name.startswith("fc_norm.") for name in names):
        return "mae"
    return "timm"


def backbone_weights(content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of the backbone (and of a linear head, where one is kept) under their bare names.

    A final norm called `fc_norm` (models that pool the mean of the patches) is renamed `norm`. A head is left out
    where it does not read the normalised class token: behind `fc_norm`, or behind a `pre_logits` layer.

    Raises:
        ConversionError: there are no tensors where checkpoints of this source have them.
    """
    source = SOURCES[name]
    container = next((content[key] for key in source.containers if isinstance(content.get(key), Mapping)), content)
    tensors = {str(key): value for key, value in container.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConversionError(
            f"source={name!r}: no tensors found; looked under {list(source.containers) or 'the top level'} and at the "
            f"top level, which holds {_sample(content)}. Name the right source, or give the weights file itself."
        )
    prefix = next((p for p in source.prefixes if any(key.startswith(p) for key in tensors)), "")
    dropped = [key for key in tensors if not key.startswith(prefix)]
    bare = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    ignored = source.ignored
    if prefix.endswith("base_encoder."):
        # During pre-training the head is a projection MLP, of which one layer may look like a linear classifier.
        ignored = (*ignored, "head.")
    if "norm.weight" not in bare and "fc_norm.weight" in bare:
        logger.warning("The final norm comes from fc_norm: this backbone was trained to pool the mean of its patches.")
        bare = {
            ("norm." + key.removeprefix("fc_norm.") if key.startswith("fc_norm.") else key): value
            for key, value in bare.items()
        }
        ignored = (*ignored, "head.")
    if any(key.startswith("pre_logits") for key in bare):
        ignored = (*ignored, "pre_logits.", "pre_logits/", "head.", "head/")
    dropped += [key for key in bare if key.startswith(ignored)]
    if dropped:
        logger.info("Left out %d tensors that are not part of the backbone: %s", len(dropped), _sample(dropped))
    return {key: value for key, value in bare.items() if not key.startswith(ignored)}


def _sample(names: Any, limit: int = 8) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
