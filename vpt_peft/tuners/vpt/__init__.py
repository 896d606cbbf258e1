"""Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119)."""

from vpt_peft.registration import register_method

from .config import VPTConfig
from .model import VPTModel


register_method("vpt", VPTConfig, VPTModel)

__all__ = ["VPTConfig", "VPTModel"]
