"""The methods that adapt a frozen backbone: prompts, LoRA and the baselines of the papers, each built in one place."""

from .options import MethodOptions
from .registry import COMBINED_METHODS, METHODS, PROMPT_METHODS, Method


__all__ = ["COMBINED_METHODS", "METHODS", "PROMPT_METHODS", "Method", "MethodOptions"]
