"""The registry of methods: by name how a model is built, what the method is called and which paper it comes from."""

from __future__ import annotations

from dataclasses import dataclass


# Flags of prompts, beside their number and their rates
PROMPT_FIELDS = (
    "prompt_rank",
    "bias",
    "prompt_dropout",
    "projection_dim",
    "pooling",
    "pool_before_norm",
    "layers_to_transform",
    "prompt_location",
    "token_type",
    "share_prompts",
    "init_method",
)
GATE_FIELDS = ("gate", "gate_init", "attention_temperature")
_ADDED = ("prompt_learning_rate", "prompt_weight_decay")
_PROMPT_FLAGS = ("num_virtual_tokens", *PROMPT_FIELDS, *_ADDED)


@dataclass(frozen=True)
class Method:
    """One method. It has either `configure` or `modify`; `full` has neither.

    Functions are named, not held, so that the names of methods are known without torch.

    Args:
        title (`str`): what it is called in a sentence.
        source (`str`): authors, venue and year of the paper; empty where there is none.
        url (`str`): of the paper.
        configure (`str`): the function of `peft_configs` that makes the PEFT configuration.
        modify (`str`): the function of `baselines` that changes the frozen model in place.
        flags (`tuple[str, ...]`): the flags of training that only some methods read, and this one does.
    """

    title: str
    source: str = ""
    url: str = ""
    configure: str = ""
    modify: str = ""
    flags: tuple[str, ...] = ()

    @property
    def markdown(self) -> str:
        """The title with a link to the paper."""
        return f"{self.title} ([{self.source}]({self.url}))" if self.source else self.title


_VPT_PAPER = ("Jia et al., ECCV 2022", "https://arxiv.org/abs/2203.12119")
METHODS: dict[str, Method] = {
    "vpt": Method("Visual Prompt Tuning, deep", *_VPT_PAPER, configure="vpt", flags=_PROMPT_FLAGS),
    "vpt_shallow": Method("Visual Prompt Tuning, shallow", *_VPT_PAPER, configure="vpt_shallow", flags=_PROMPT_FLAGS),
    "vpt+bias": Method(
        "Visual Prompt Tuning, deep, with biases", *_VPT_PAPER, configure="vpt_bias", flags=_PROMPT_FLAGS
    ),
    "gated_vpt": Method(
        "gated prompts",
        "Yoo et al., ICML 2023",
        "https://arxiv.org/abs/2306.05067",
        configure="vpt_gated",
        flags=(*_PROMPT_FLAGS, *GATE_FIELDS),
    ),
    "linear": Method("a linear probe", modify="linear", flags=("solver",)),
    "full": Method("full fine-tuning"),
    "partial": Method("fine-tuning of the last blocks", modify="partial", flags=("partial_blocks",)),
    "mlp": Method("an MLP head on frozen features", modify="mlp", flags=("mlp_layers",)),
    "bias": Method("bias tuning", "Ben Zaken et al., ACL 2022", "https://arxiv.org/abs/2106.10199", modify="bias"),
    "adapter": Method(
        "bottleneck adapters",
        "Houlsby et al., ICML 2019",
        "https://arxiv.org/abs/1902.00751",
        modify="adapter",
        flags=("adapter_reduction",),
    ),
    "sidetune": Method(
        "side-tuning", "Zhang et al., ECCV 2020", "https://arxiv.org/abs/1912.13503", modify="sidetune"
    ),
    "lora": Method(
        "LoRA", "Hu et al., ICLR 2022", "https://arxiv.org/abs/2106.09685", configure="lora", flags=("lora_r", *_ADDED)
    ),
    "vpt+lora": Method("Visual Prompt Tuning, deep, with LoRA", modify="vpt_lora", flags=(*_PROMPT_FLAGS, "lora_r")),
    "vpt+adapter": Method(
        "Visual Prompt Tuning, deep, with bottleneck adapters",
        modify="vpt_adapter",
        flags=(*_PROMPT_FLAGS, "adapter_reduction"),
    ),
}
# Flags that only some methods read
METHOD_FLAGS = frozenset(flag for method in METHODS.values() for flag in method.flags)
PROMPT_METHODS = ("vpt", "vpt_shallow", "vpt+bias", "gated_vpt")
# Prompts beside another method, which no single PEFT configuration describes
COMBINED_METHODS = ("vpt+lora", "vpt+adapter")
