"""Configuration of Visual Prompt Tuning."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig

from vpt_peft.fields import (
    BIAS_PLACES,
    FieldTypeError,
    check_choice,
    check_fields,
    check_int,
    check_length,
    explain_fields,
    option,
    refuse,
)
from vpt_peft.registration import add_peft_type


# More prompts than this outnumber the tokens of any image encoder a thousand times over; a slip, not a wish.
MAX_VIRTUAL_TOKENS = 100_000

# Frames and extra channels of pixels; far more than an image has
MAX_PIXELS = 1024
MAX_BLOCKS = 10_000
MAX_LABELS = 1_000_000

PIXEL_LOCATIONS = ("prepend_pixel", "pad", "channel")


@explain_fields
@dataclass
class VPTConfig(PeftConfig):
    """Configuration of Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119).

    Two independent choices give shallow, deep and partly deep prompts: which blocks have prompts of their own
    (`deep`, `layers_to_transform`), and whether prompts flow on into blocks that have none (`propagate`).

    Raises:
        TypeError: A field has a value of the wrong type.
        ValueError: A value is out of range, or a combination of fields has no meaning.
    """

    num_virtual_tokens: int | list[int] = option(
        10,
        "Prompts per prompted block, a list gives each its own number; for 'pad' the width of the frame in pixels, "
        "for 'channel' the number of extra input channels.",
        least=1,
        most=MAX_VIRTUAL_TOKENS,
    )
    deep: bool = option(True, "Every block has prompts of its own (VPT-deep), or only the first (shallow).")
    layers_to_transform: list[int] | int | None = option(
        None, "The blocks with prompts of their own, 0-based; None: all if deep, else the first."
    )
    layers_from_end: bool = option(False, "`layers_to_transform` counts from the end: 0 is the last block.")
    propagate: bool = option(True, "Prompts flow on into later blocks that have none of their own.")
    share_prompts: bool = option(False, "One set of prompts serves all prompted blocks.")
    prompt_location: Literal["prepend", "add", "add_shared", "prepend_pixel", "pad", "channel"] = option(
        "prepend", "Where the prompts go: among the tokens, onto the tokens, or the pixels."
    )
    token_type: Literal["patch", "class"] = option(
        "patch", "Prompts are extra patches, or extra class tokens that the head reads with the class token."
    )
    pooling: Literal["class", "image", "prompt", "image_prompt"] | None = option(
        None, "What the head reads; None: what it reads without prompts."
    )
    pool_before_norm: bool = option(False, "Take the mean before the final norm (MAE, MoCo-v3) instead of after it.")
    prompt_dropout: float = option(0.0, "Dropout on the prompts, drawn per image.", least=0.0, below=1.0)
    projection_dim: int | None = option(
        None,
        "Width the prompts live in; one linear map, shared by the blocks, takes them to the tokens'.",
        least=1,
        most=65_536,
    )
    project_patches: bool = option(
        False, "One hidden-to-hidden linear map over prompts and patch tokens at the input."
    )
    prompt_rank: int | None = option(
        None,
        "The prompts of a block are a product of this rank, A Bᵀ with A (prompts, rank) and B (width, rank).",
        least=1,
        most=65_536,
    )
    init_prompts: Literal["xavier_uniform", "normal", "zeros"] = option(
        "xavier_uniform", "How prompts start; data-driven starts: `initialize_prompts`."
    )
    implementation: Literal["auto", "kv", "token"] = option(
        "auto", "Prompts as keys and values ('kv'), as tokens, or as keys and values wherever exact."
    )
    skip_unread: bool = option(
        False,
        "The last block makes its class and register tokens only, for models whose head reads no others. What it "
        "gives for the patches (last hidden state, last attention map) is undefined then. Not saved.",
    )
    base_in_eval: bool = option(True, "`model.train()` leaves the frozen parts in eval mode.")
    self_check: bool = option(
        True, "Compare keys/values with tokens on a random input when the first prompts are attached."
    )
    backbone: str | None = option(None, "Dotted path of the vision encoder, where a model holds several.")
    modules_to_save: list[str] | None = option(
        None, "Modules trained and saved with the prompts; None: the task head, []: none."
    )
    id2label: dict[int, str] | None = option(
        None, "Labels of this adapter's head, which is made to fit; None: the model's. Always saved."
    )
    bias: str | list[str] = option(
        "none",
        "'all' also trains the backbone's biases; a list those of 'value' (projection), 'output' (of the attention), "
        "'mlp' (second layer), 'norm' (second).",
    )
    init_weights: bool = option(True, "False draws the prompts from a unit normal, as tests of PEFT methods ask.")
    target_modules: list[str] | str | None = option(None, "Found at attach time from the model; not to be set.")
    exclude_modules: list[str] | str | None = option(None, "Not used: blocks are chosen by `layers_to_transform`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("VPT")
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        if isinstance(self.num_virtual_tokens, (list, tuple)):
            self.num_virtual_tokens = list(self.num_virtual_tokens)
            if not self.num_virtual_tokens:
                raise ValueError("num_virtual_tokens=[] must be a number, or one number for each prompted block.")
            check_length("num_virtual_tokens", self.num_virtual_tokens, MAX_BLOCKS)
        check_fields(self)
        if self.backbone is not None and not isinstance(self.backbone, str):
            raise FieldTypeError(f"backbone={self.backbone!r} must be the dotted path of a module, or None.")
        if isinstance(self.modules_to_save, (tuple, set)):
            self.modules_to_save = list(self.modules_to_save)
        names = [] if self.modules_to_save is None else self.modules_to_save
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FieldTypeError(f"modules_to_save={names!r} must be a list of module names, or None.")
        if isinstance(self.bias, str):
            check_choice("bias", self.bias, ("none", "all"))
        elif isinstance(self.bias, (list, tuple, set)) and self.bias and set(self.bias) <= set(BIAS_PLACES):
            self.bias = [place for place in BIAS_PLACES if place in self.bias]
        else:
            raise ValueError(f"bias={self.bias!r} must be 'none', 'all' or a list of {str(BIAS_PLACES)[1:-1]}.")
        if self.id2label is not None:
            self.id2label = _checked_labels(self.id2label)
        layers = self.layers_to_transform
        if layers is None:
            return
        if not isinstance(layers, (int, list, tuple, set, range)):
            raise FieldTypeError(
                f"layers_to_transform={layers!r} must be a list of block indices, an integer or None."
            )
        chosen = [layers] if isinstance(layers, int) else layers
        check_length("layers_to_transform", chosen, MAX_BLOCKS)
        for layer in chosen:
            check_int("layers_to_transform", layer, least=0, most=MAX_BLOCKS)
        if not chosen:
            raise ValueError("layers_to_transform=[] names no block; give at least one index, or None.")
        self.layers_to_transform = layers if isinstance(layers, int) else sorted(set(layers))

    def _check_combinations(self) -> None:
        where = self.prompt_location
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) is not None:
                warnings.warn(
                    f"{name} has no effect: blocks are found in the model, choose them by layers_to_transform.",
                    stacklevel=4,
                )
        as_pixels, not_tokens = where in PIXEL_LOCATIONS, where not in ("prepend", "prepend_pixel")
        if as_pixels:
            # `deep` is True by default and says nothing about prompts that are pixels.
            self.deep = False
        has_list = isinstance(self.num_virtual_tokens, list)
        at_default = f"is defined for prompt tokens only, not for {where!r}; leave it at its default."
        takes_class = self.token_type == "class"
        has_layers = self.layers_to_transform is not None
        refuse(
            (where in ("pad", "channel") and self.most_tokens > MAX_PIXELS,
             f"num_virtual_tokens={self.num_virtual_tokens} must be at most {MAX_PIXELS:,} for prompt_location={where!r}."),
            (as_pixels and has_layers, f"layers_to_transform has no meaning for prompt_location={where!r}: pixels enter once."),
            (where != "prepend" and self.projection_dim is not None, f"projection_dim {at_default}"),
            (where != "prepend" and self.project_patches, f"project_patches {at_default}"),
            (where != "prepend" and self.prompt_rank is not None, f"prompt_rank {at_default}"),
            (where != "prepend" and has_list,
             f"num_virtual_tokens={self.num_virtual_tokens}: a list is for prompt tokens, not for {where!r}; give a number."),
            (self.share_prompts and has_list,
             f"num_virtual_tokens={self.num_virtual_tokens}: blocks that share prompts have the same number; give one."),
            (where != "prepend" and self.implementation == "kv",
             f"implementation='kv' has no meaning for prompt_location={where!r}; use 'auto'."),
            (where in ("pad", "channel") and self.prompt_dropout > 0.0,
             f"prompt_dropout={self.prompt_dropout} is for prompt tokens, not for {where!r}; drop it."),
            (not_tokens and not self.propagate,
             f"propagate=False needs prompt tokens that could flow on; {where!r} has none. Drop it."),
            (not_tokens and self.pooling in ("prompt", "image_prompt"),
             f"pooling={self.pooling!r} needs prompt tokens; prompt_location={where!r} has none."),
            (not_tokens and takes_class, f"token_type='class' needs prompt tokens; prompt_location={where!r} has none."),
            (self.layers_from_end and not has_layers,
             "layers_from_end=True says how to read layers_to_transform, which is not given."),
            (self.project_patches and self.projection_dim is not None,
             "projection_dim and project_patches are two readings of one option; set only one."),
            (takes_class and self.pooling not in (None, "class"),
             "token_type='class' already says what the head reads (class token and prompts); drop "
             f"pooling={self.pooling!r}."),
            (self.pool_before_norm and self.pooling in (None, "class") and not takes_class,
             "pool_before_norm=True needs a mean to take: set pooling to 'image', 'prompt' or 'image_prompt'."),
            (self.share_prompts and not self.deep and not has_layers,
             "share_prompts=True needs several prompted blocks: set deep=True or layers_to_transform."),
        )  # fmt: skip

    def note_found(self, **values: Any) -> None:
        """Set fields that were left open to what was found in a model; they stay open for the next model."""
        found: dict[str, Any] = self.__dict__.setdefault("_found", {})
        for name, value in values.items():
            if self.given(name) is None:
                found[name] = value
                setattr(self, name, value)

    def given(self, name: str) -> Any:
        """A field as the user gave it, `None` where its value was found in a model."""
        value, found = getattr(self, name), self.__dict__.get("_found", {})
        return None if name in found and found[name] == value else value

    def to_dict(self) -> dict[str, Any]:
        """The fields that say what the adapter is, as they are saved."""
        fields = super().to_dict()
        # How one program runs the model, and no part of the adapter
        fields.pop("skip_unread", None)
        return fields

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """A configuration from the fields of a file; see `PeftConfigMixin.from_peft_type`."""
        kwargs.pop("skip_unread", None)
        return super().from_peft_type(**kwargs)

    @property
    def most_tokens(self) -> int:
        """The largest number of prompts that a block has."""
        given = self.num_virtual_tokens
        return max(given) if isinstance(given, list) else given

    @property
    def pools(self) -> bool:
        """Whether the head reads a mean that is made for it, in place of what it reads without prompts."""
        return self.pooling not in (None, "class") or self.token_type == "class"

    @property
    def reads_prompts(self) -> bool:
        """Whether the head reads what the last block makes of the prompts."""
        return self.pooling in ("prompt", "image_prompt") or self.token_type == "class"


def _checked_labels(labels: Any) -> dict[int, str]:
    if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
        raise FieldTypeError(f"id2label={labels!r} must be a dict from class index to label, or None.")
    check_length("id2label", labels, MAX_LABELS)
    try:
        # Indices are strings after a way through JSON
        checked = {int(index): label for index, label in labels.items()}
    except (TypeError, ValueError):
        raise FieldTypeError(f"id2label={labels!r}: its keys must be class indices.") from None
    if sorted(checked) != list(range(len(labels))) or not labels:
        raise ValueError(
            f"id2label: its keys must be 0 to {max(len(labels) - 1, 0)} without gaps, not {list(labels)[:20]}."
        )
    return checked
