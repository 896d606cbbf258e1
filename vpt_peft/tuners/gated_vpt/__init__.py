"""Gated prompt tuning (Yoo et al., ICML 2023, arXiv 2306.05067)."""

from vpt_peft.registration import register_method

from .config import GatedVPTConfig
from .model import GatedVPTModel


register_method("gated_prompt", GatedVPTConfig, GatedVPTModel)

__all__ = ["GatedVPTConfig", "GatedVPTModel"]
