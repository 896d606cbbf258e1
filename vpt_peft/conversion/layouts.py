"""The two ways in which ViT weights are named and laid out (timm's and JAX's), each mapped to the Hub's ViT names.

Targets are the names of ViT checkpoints on the Hub (`encoder.layer.0.attention.attention.query.weight`), which every
version of transformers reads, whatever it calls its own modules.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt

from torch import Tensor

from .errors import ConversionError


@dataclass(frozen=True)
class Geometry:
    """The sizes of a plain ViT (lengths in channels, `patch_size` and `image_size` in pixels)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    num_tokens: int
    qkv_bias: bool
    num_labels: int | None

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return isqrt(self.num_tokens - 1)


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint: its name and shape there, the Hub names it goes to, and how it is laid out.

    More than one target: the tensor is split into equal parts along its first axis (a fused query, key and value).
    """

    source: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    transform: Callable[[Tensor], Tensor] | None = None

    def convert(self, tensor: Tensor) -> dict[str, Tensor]:
        """The Hub's tensors by name, each with memory of its own."""
        laid_out = tensor if self.transform is None else self.transform(tensor)
        parts = laid_out.chunk(len(self.targets))
        return {target: part.clone().contiguous() for target, part in zip(self.targets, parts, strict=True)}


def read_geometry(weights: Mapping[str, Tensor], num_heads: int | None, heads: Mapping[int, int]) -> Geometry:
    """Read the sizes of a ViT from the shapes of its weights.

    Args:
        weights: tensors under timm's or JAX's bare names.
        num_heads: attention heads; None: from the shapes (JAX), else from `heads`, else one per 64 channels.
        heads: attention heads by hidden size, where they differ from one per 64 channels.

    Raises:
        ConversionError: a tensor that tells a size is missing or has the wrong rank; the image or a patch is not
            square; the images have not 3 channels; the number of heads cannot be told, or does not fit.
    """
    jax = is_jax(weights)
    if jax:
        patch_height, patch_width, channels, hidden = _shape(weights, "embedding/kernel", 4)
        tokens = _shape(weights, "Transformer/posembed_input/pos_embedding", 3)[1]
        block, depth = "Transformer/encoderblock_0/", _depth(weights, r"Transformer/encoderblock_(\d+)/")
        intermediate = _shape(weights, block + "MlpBlock_3/Dense_0/kernel", 2)[1]
        stored_heads = _shape(weights, block + "MultiHeadDotProductAttention_1/query/kernel", 3)[1]
        qkv_bias = block + "MultiHeadDotProductAttention_1/query/bias" in weights
        labels = _shape(weights, "head/kernel", 2)[1] if "head/kernel" in weights else None
        if num_heads not in (None, stored_heads):
            raise ConversionError(f"num_heads={num_heads}, but the checkpoint has {stored_heads}; leave it out.")
        num_heads = stored_heads
    else:
        hidden, channels, patch_height, patch_width = _shape(weights, "patch_embed.proj.weight", 4)
        tokens = _shape(weights, "pos_embed", 3)[1]
        depth = _depth(weights, r"blocks\.(\d+)\.")
        intermediate = _shape(weights, "blocks.0.mlp.fc1.weight", 2)[0]
        qkv_bias = "blocks.0.attn.qkv.bias" in weights
        labels = _shape(weights, "head.weight", 2)[0] if "head.weight" in weights else None
    if patch_height != patch_width:
        raise ConversionError(
            f"The patches are {patch_height}x{patch_width} pixels; only square patches are supported."
        )
    if channels != 3:
        raise ConversionError(f"The patch embedding reads {channels} channels; only RGB models (3) are supported.")
    if tokens < 2 or isqrt(tokens - 1) ** 2 != tokens - 1:
        raise ConversionError(
            f"The position embedding has {tokens} tokens, which is not one class token and a square of patches; "
            "models with other extra tokens or without a class token do not fit a Hugging Face ViT."
        )
    return Geometry(
        hidden_size=hidden,
        num_layers=depth,
        num_heads=_check_heads(hidden, num_heads, heads),
        intermediate_size=intermediate,
        patch_size=patch_height,
        num_tokens=tokens,
        qkv_bias=qkv_bias,
        num_labels=labels,
    )


def is_jax(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of google-research/vision_transformer."""
    return any(name.endswith("/kernel") for name in weights)


def layout(geometry: Geometry, jax: bool) -> list[Weight]:
    """Every tensor that a checkpoint of these sizes must hold, in JAX's or in timm's names."""
    return _jax_layout(geometry) if jax else _timm_layout(geometry)


def _timm_layout(geometry: Geometry) -> list[Weight]:
    hidden, wide, patch = geometry.hidden_size, geometry.intermediate_size, geometry.patch_size
    body = "vit." if geometry.num_labels else ""

    def pair(source: str, *targets: str, shape: tuple[int, ...], bias: bool = True) -> list[Weight]:
        weights = [Weight(f"{source}.weight", shape, tuple(f"{target}.weight" for target in targets))]
        if bias:
            weights.append(Weight(f"{source}.bias", shape[:1], tuple(f"{target}.bias" for target in targets)))
        return weights

    table = [
        Weight("cls_token", (1, 1, hidden), (f"{body}embeddings.cls_token",)),
        Weight("pos_embed", (1, geometry.num_tokens, hidden), (f"{body}embeddings.position_embeddings",)),
        *pair(
            "patch_embed.proj",
            f"{body}embeddings.patch_embeddings.projection",
            shape=(hidden, 3, patch, patch),
        ),
    ]
    for index in range(geometry.num_layers):
        source, target = f"blocks.{index}", f"{body}encoder.layer.{index}"
        qkv = tuple(f"{target}.attention.attention.{name}" for name in ("query", "key", "value"))
        table += pair(f"{source}.norm1", f"{target}.layernorm_before", shape=(hidden,))
        table += pair(f"{source}.attn.qkv", *qkv, shape=(3 * hidden, hidden), bias=geometry.qkv_bias)
        table += pair(f"{source}.attn.proj", f"{target}.attention.output.dense", shape=(hidden, hidden))
        table += pair(f"{source}.norm2", f"{target}.layernorm_after", shape=(hidden,))
        table += pair(f"{source}.mlp.fc1", f"{target}.intermediate.dense", shape=(wide, hidden))
        table += pair(f"{source}.mlp.fc2", f"{target}.output.dense", shape=(hidden, wide))
    table += pair("norm", f"{body}layernorm", shape=(hidden,))
    if geometry.num_labels:
        table += pair("head", "classifier", shape=(geometry.num_labels, hidden))
    return table


def _jax_layout(geometry: Geometry) -> list[Weight]:
    hidden, wide, patch = geometry.hidden_size, geometry.intermediate_size, geometry.patch_size
    heads, width = geometry.num_heads, geometry.hidden_size // geometry.num_heads
    body = "vit." if geometry.num_labels else ""

    def norm(source: str, target: str) -> list[Weight]:
        return [
            Weight(f"{source}/scale", (hidden,), (f"{target}.weight",)),
            Weight(f"{source}/bias", (hidden,), (f"{target}.bias",)),
        ]

    def dense(source: str, target: str, inputs: int, outputs: int) -> list[Weight]:
        return [
            Weight(f"{source}/kernel", (inputs, outputs), (f"{target}.weight",), lambda kernel: kernel.T),
            Weight(f"{source}/bias", (outputs,), (f"{target}.bias",)),
        ]

    table = [
        Weight("cls", (1, 1, hidden), (f"{body}embeddings.cls_token",)),
        Weight(
            "Transformer/posembed_input/pos_embedding",
            (1, geometry.num_tokens, hidden),
            (f"{body}embeddings.position_embeddings",),
        ),
        # Height, width, input, output to output, input, height, width.
        Weight(
            "embedding/kernel",
            (patch, patch, 3, hidden),
            (f"{body}embeddings.patch_embeddings.projection.weight",),
            lambda kernel: kernel.permute(3, 2, 0, 1),
        ),
        Weight("embedding/bias", (hidden,), (f"{body}embeddings.patch_embeddings.projection.bias",)),
    ]
    for index in range(geometry.num_layers):
        source, target = f"Transformer/encoderblock_{index}", f"{body}encoder.layer.{index}"
        attention = f"{source}/MultiHeadDotProductAttention_1"
        table += norm(f"{source}/LayerNorm_0", f"{target}.layernorm_before")
        for name in ("query", "key", "value"):
            to = f"{target}.attention.attention.{name}"
            table.append(
                Weight(
                    f"{attention}/{name}/kernel",
                    (hidden, heads, width),
                    (f"{to}.weight",),
                    lambda kernel: kernel.flatten(1).T,
                )
            )
            if geometry.qkv_bias:
                table.append(Weight(f"{attention}/{name}/bias", (heads, width), (f"{to}.bias",), Tensor.flatten))
        to = f"{target}.attention.output.dense"
        table += [
            Weight(
                f"{attention}/out/kernel",
                (heads, width, hidden),
                (f"{to}.weight",),
                lambda kernel: kernel.flatten(0, 1).T,
            ),
            Weight(f"{attention}/out/bias", (hidden,), (f"{to}.bias",)),
        ]
        table += norm(f"{source}/LayerNorm_2", f"{target}.layernorm_after")
        table += dense(f"{source}/MlpBlock_3/Dense_0", f"{target}.intermediate.dense", hidden, wide)
        table += dense(f"{source}/MlpBlock_3/Dense_1", f"{target}.output.dense", wide, hidden)
    table += norm("Transformer/encoder_norm", f"{body}layernorm")
    if geometry.num_labels:
        table += dense("head", "classifier", hidden, geometry.num_labels)
    return table


def _shape(weights: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in weights:
        raise ConversionError(
            f"Missing: {name}. Without it the sizes of a ViT cannot be read; the checkpoint holds "
            f"{', '.join(list(weights)[:8])} ... Check the file and `source`; only plain ViTs can be converted."
        )
    shape = tuple(weights[name].shape)
    if len(shape) != rank or 0 in shape:
        raise ConversionError(f"Misshapen: {name} is {shape}, expected {rank} axes, none of them empty.")
    return shape


def _depth(weights: Mapping[str, Tensor], pattern: str) -> int:
    # Counted, as an absurd index must not make an absurd model.
    return len({match.group(1) for match in map(re.compile(pattern).match, weights) if match})


def _check_heads(hidden: int, num_heads: int | None, heads: Mapping[int, int]) -> int:
    if num_heads is None:
        num_heads = heads.get(hidden) or (hidden // 64 if hidden % 64 == 0 else None)
    if num_heads is None:
        raise ConversionError(
            f"num_heads is not in these weights, and {hidden} channels are not a multiple of 64: pass num_heads."
        )
    if num_heads < 1 or hidden % num_heads:
        raise ConversionError(f"num_heads={num_heads} does not divide the hidden size {hidden}.")
    return num_heads
