"""Prompts as keys and values: how they reach the attention of a block, and the arithmetic around them."""

from .extras import AttentionExtras, AttentionMap, PromptedBlock, project
from .intercept import attach_interceptor
from .interface import PromptedConfig


__all__ = [
    "AttentionExtras",
    "AttentionMap",
    "PromptedBlock",
    "PromptedConfig",
    "attach_interceptor",
    "project",
]
