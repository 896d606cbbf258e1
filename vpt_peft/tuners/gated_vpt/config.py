"""Configuration of gated prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vpt_peft.fields import explain_fields, option, refuse
from vpt_peft.registration import add_peft_type
from vpt_peft.tuners.vpt.config import VPTConfig


@explain_fields
@dataclass
class GatedVPTConfig(VPTConfig):
    """Configuration of gated prompt tuning (Yoo et al., ICML 2023, arXiv 2306.05067), for self-supervised ViTs.

    One set of prompts enters at the first block; gates decide how far each block's outputs replace its inputs, and a
    learnable temperature per block shapes the attention of all its tokens.

    Raises:
        TypeError: A field has a value of the wrong type.
        ValueError: A value is out of range, or a combination of fields has no meaning.
    """

    deep: bool = option(False, "Always False: one set of prompts enters at the first block.")
    gate: Literal["scalar", "elementwise", "none"] = option(
        "scalar", "One scalar per block; a linear-sigmoid gate with residual; or no gate."
    )
    # Beyond the bounds of these numbers exponentials overflow
    gate_init: float = option(
        5.0, "The papers' number: the gate's logit starts at MINUS this, nearly closed.", least=-88.0, below=88.0
    )
    num_gates: int | None = option(None, "The first so many blocks are gated; None: all but the last.", least=0)
    attention_temperature: bool = option(True, "One learnable temperature per block.")
    temperature_min: float = option(0.01, "Lower clamp of the temperatures.", least=1e-4)
    temperature_max: float = option(10.0, "Upper clamp of the temperatures.", below=88.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("GATED_PROMPT")

    def _check_combinations(self) -> None:
        super()._check_combinations()
        no_meaning = "has no meaning for gated prompts: one set enters first and flows on. Drop it."
        lowest, highest = self.temperature_min, self.temperature_max
        refuse(
            (self.deep, f"deep=True {no_meaning}"),
            (self.layers_to_transform is not None, f"layers_to_transform {no_meaning}"),
            (not self.propagate, f"propagate=False {no_meaning}"),
            (self.share_prompts, f"share_prompts=True {no_meaning}"),
            (self.prompt_location != "prepend",
             f"prompt_location={self.prompt_location!r} leaves no prompt tokens to gate; use 'prepend', or VPTConfig."),
            (self.implementation == "kv",
             "implementation='kv' is not exact for gated prompts, whose outputs matter; use 'auto'."),
            (self.gate == "none" and self.num_gates is not None,
             f"num_gates={self.num_gates} has no meaning with gate='none'; drop it."),
            (not 0 < lowest < highest,
             f"temperature_min={lowest} must be above 0 and below temperature_max={highest}."),
        )  # fmt: skip
