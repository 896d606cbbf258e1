"""Visual Prompt Tuning and Gated Prompt Tuning as PEFT methods; importing the package registers both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .requirements import check_versions
from .version import __version__


if TYPE_CHECKING:
    from .training.trainer_inputs import training_recipe


def _is_command() -> bool:
    """Whether this process is `vpt-peft` or `python -m vpt_peft`.

    Both import this module before any line of theirs runs; with `-m`, `sys.argv` does not name it yet.
    """
    started = sys.orig_argv[1:3]
    return started == ["-m", __name__] or Path(*started[:1]).name in ("vpt-peft", "vpt-peft.exe")


# The command registers what it needs when it runs, so that it can show its help without torch
if not _is_command():
    check_versions()

    from .attention_maps import attention_maps
    from .encoder import EncoderError
    from .initialization import initialize_prompts
    from .peft_model import extend_peft_model
    from .reallocation import reallocate_prompts
    from .tuners import GatedVPTConfig, GatedVPTModel, VPTConfig, VPTModel

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
    "reallocate_prompts",
    "training_recipe",
]


def __getattr__(name: str) -> Any:
    # What trains needs packages of the extra "train", and seconds to import
    if name != "training_recipe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .training.trainer_inputs import training_recipe
    except ModuleNotFoundError as error:
        raise ImportError(f'training_recipe needs {error.name}: pip install "vpt_peft[train]"') from error
    return training_recipe
