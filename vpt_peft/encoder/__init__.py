"""Find the blocks, norms and attention of any vision encoder by running it."""

from .find import describe_encoder, find_encoder, find_encoder_path
from .reading import read_blocks
from .spec import AttentionSpec, BlockSpec, EncoderError, EncoderSpec, Projection, submodule


__all__ = [
    "AttentionSpec",
    "BlockSpec",
    "EncoderError",
    "EncoderSpec",
    "Projection",
    "describe_encoder",
    "find_encoder",
    "find_encoder_path",
    "read_blocks",
    "submodule",
]
