"""The two methods as PEFT tuners: VPT and gated prompt tuning."""

from .gated_vpt import GatedVPTConfig, GatedVPTModel
from .vpt import VPTConfig, VPTModel


__all__ = ["GatedVPTConfig", "GatedVPTModel", "VPTConfig", "VPTModel"]
