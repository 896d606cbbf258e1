"""The registry of methods: by name how a model is built, what the method is called and which paper it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..encoder import EncoderSpec
from ..heads import trained_modules
from ..tuners import VPTConfig
from .baselines import adapter, bias, linear, mlp, partial, sidetune
from .modules import keep_frozen_in_eval
from .options import MethodOptions
from .peft_configs import lora, vpt, vpt_gated, vpt_shallow
from .structure import find_head


@dataclass(frozen=True)
class Method:
    """One method. It has either `configure` or `modify`; `full` has neither.

    Args:
        title (`str`): what it is called in a sentence.
        source (`str`): authors, venue and year of the paper; empty where there is none.
        url (`str`): of the paper.
        configure: makes the PEFT configuration from model, options and encoder spec (`None`: found when needed).
        modify: changes the frozen model in place, from the same arguments, and returns the modules that train beside
            the head.
    """

    title: str
    source: str = ""
    url: str = ""
    configure: Callable[[Any, MethodOptions, EncoderSpec | None], PeftConfig] | None = None
    modify: Callable[[Any, MethodOptions, EncoderSpec | None], list[nn.Module]] | None = None

    @property
    def markdown(self) -> str:
        """The title with a link to the paper."""
        return f"{self.title} ([{self.source}]({self.url}))" if self.source else self.title


_VPT_PAPER = ("Jia et al., ECCV 2022", "https://arxiv.org/abs/2203.12119")
METHODS: dict[str, Method] = {
    "vpt": Method("Visual Prompt Tuning, deep", *_VPT_PAPER, configure=vpt),
    "vpt_shallow": Method("Visual Prompt Tuning, shallow", *_VPT_PAPER, configure=vpt_shallow),
    "gated_vpt": Method(
        "gated prompts", "Yoo et al., ICML 2023", "https://arxiv.org/abs/2306.05067", configure=vpt_gated
    ),
    "linear": Method("a linear probe", modify=linear),
    "full": Method("full fine-tuning"),
    "partial": Method("fine-tuning of the last blocks", modify=partial),
    "mlp": Method("an MLP head on frozen features", modify=mlp),
    "bias": Method("bias tuning", "Ben Zaken et al., ACL 2022", "https://arxiv.org/abs/2106.10199", modify=bias),
    "adapter": Method(
        "bottleneck adapters", "Houlsby et al., ICML 2019", "https://arxiv.org/abs/1902.00751", modify=adapter
    ),
    "sidetune": Method("side-tuning", "Zhang et al., ECCV 2020", "https://arxiv.org/abs/1912.13503", modify=sidetune),
    "lora": Method("LoRA", "Hu et al., ICLR 2022", "https://arxiv.org/abs/2106.09685", configure=lora),
}
PROMPT_METHODS = ("vpt", "vpt_shallow", "gated_vpt")


def apply_method(
    model: Any, name: str, options: MethodOptions, spec: EncoderSpec | None = None
) -> PeftModel | nn.Module:
    """Make a model ready for a method: only what the method trains, and the head, has `requires_grad`.

    Args:
        model (`PreTrainedModel`): changed in place.
        name (`str`): key of `METHODS`.
        options (`MethodOptions`): numbers and fields of the method.
        spec (`EncoderSpec`, *optional*): the model's encoder; by default it is found when the method asks for it, which
            takes a model with weights.

    Returns:
        A `PeftModel` for prompts and LoRA, else `model`.

    Raises:
        ValueError: the method is unknown or does not fit the model.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; choose one of {', '.join(METHODS)}.")
    method = METHODS[name]
    if method.configure is not None:
        return attach(model, method.configure(model, options, spec))
    model.requires_grad_(method.modify is None)
    if method.modify is not None:
        trained = method.modify(model, options, spec)
        head = list(find_head(model).values())
        for module in head:
            module.requires_grad_(True)
        keep_frozen_in_eval(model, [*trained, *head])
    return model


def attach(model: Any, config: PeftConfig) -> PeftModel:
    """Attach an adapter to a model whose frozen parts then stay in eval mode, as prompts keep them by themselves."""
    adapted = get_peft_model(model, config)
    if not isinstance(config, VPTConfig):
        keep_frozen_in_eval(model, list(trained_modules(model)))
    return adapted
