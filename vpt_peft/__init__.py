"""Visual Prompt Tuning and Gated Prompt Tuning as PEFT methods; importing the package registers both."""

from .encoder import EncoderError
from .initialization import initialize_prompts
from .tuners import GatedVPTConfig, GatedVPTModel, VPTConfig, VPTModel

__version__ = "0.1.0"

__all__ = ["EncoderError", "GatedVPTConfig", "GatedVPTModel", "VPTConfig", "VPTModel", "initialize_prompts"]
