"""Prompts as keys and values: how they reach the attention of a block, and the arithmetic around them."""

from .extras import AttentionExtras, project_key_values, project_queries
from .intercept import attach_interceptor
from .interface import ALL_TOKENS, PromptedConfig


__all__ = [
    "ALL_TOKENS",
    "AttentionExtras",
    "PromptedConfig",
    "attach_interceptor",
    "project_key_values",
    "project_queries",
]
