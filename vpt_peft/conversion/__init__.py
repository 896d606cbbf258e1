"""Official ViT checkpoints (MoCo-v3, MAE, DINO, timm, JAX) to Hugging Face ViT folders."""

from .convert import convert_checkpoint
from .errors import ConversionError
from .sources import SOURCES


__all__ = ["SOURCES", "ConversionError", "convert_checkpoint"]
