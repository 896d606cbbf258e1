"""Images and their targets: where they come from, how they are split, and how they become model input."""

from .arguments import DataArguments


__all__ = ["DataArguments"]
