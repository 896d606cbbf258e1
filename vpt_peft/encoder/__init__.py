"""Where blocks, norms and attention are in whatever vision encoder came in, found by looking at it at run time."""

from .find import describe_encoder, find_encoder
from .spec import AttentionSpec, BlockSpec, EncoderError, EncoderSpec, HeadMap, submodule


__all__ = [
    "AttentionSpec",
    "BlockSpec",
    "EncoderError",
    "EncoderSpec",
    "HeadMap",
    "describe_encoder",
    "find_encoder",
    "submodule",
]
