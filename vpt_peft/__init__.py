"""Visual Prompt Tuning and Gated Prompt Tuning as PEFT methods; importing the package registers both."""

from .attention_maps import attention_maps
from .encoder import EncoderError
from .initialization import initialize_prompts
from .peft_model import extend_peft_model
from .tuners import GatedVPTConfig, GatedVPTModel, VPTConfig, VPTModel
from .version import __version__


extend_peft_model()

__all__ = [
    "EncoderError",
    "GatedVPTConfig",
    "GatedVPTModel",
    "VPTConfig",
    "VPTModel",
    "__version__",
    "attention_maps",
    "initialize_prompts",
]
