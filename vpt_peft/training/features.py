"""Start a forward pass from cached features of frozen blocks in place of the images.

Where everything below some module is frozen and sees each image in one way only, that module's input is the same in
every epoch. Once it is cached (`feature_cache`), the blocks below are skipped and the cached features put in; results
are equal up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.func import functional_call

from ..encoder.trace import perturbed
from ..methods import COMBINED_METHODS, PROMPT_METHODS
from ..methods.structure import Classifier, base_model, find_blocks, find_final_norm, find_head
from .arguments import MethodArguments
from .optim import split_trainable


FEATURES = "cached_features"
_INPUT_PROMPTS = ("prepend_pixel", "pad", "channel")


@dataclass(frozen=True)
class SplitPoint:
    """Where the frozen part of a model ends.

    Args:
        name (`str`): "block 6" or "head".
        module (`nn.Module`): the first module that trains; its first input is cached.
        skipped (`tuple[nn.Module, ...]`): the blocks that need not run when it is known.
    """

    name: str
    module: nn.Module
    skipped: tuple[nn.Module, ...]


def find_split_point(model: Classifier, method: MethodArguments, augmentation: str) -> SplitPoint | None:
    """Return where the frozen part of a model of `build_model` ends, or None where features would not be exact.

    That is where images are augmented at random, or where something trains in the first block or before it.
    """
    if augmentation == "resize_crop_flip" or method.prompt_location in _INPUT_PROMPTS or method.method == "sidetune":
        return None
    if method.method in COMBINED_METHODS:
        # Something trains in every block
        return None
    base = base_model(model)
    heads = list(find_head(base).values())
    trained = {id(p) for group in split_trainable(model).values() for p in group.values()}
    trained -= {id(p) for head in heads for p in head.parameters()}
    if not trained:
        return SplitPoint("head", heads[0], tuple(find_blocks(base))) if len(heads) == 1 else None
    if isinstance(model, PeftModel) and getattr(model.peft_config[model.active_adapter], "bias", "none") != "none":
        return None
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        blocks, norm = find_blocks(base), find_final_norm(base)
    if norm is not None:
        trained -= {id(p) for p in norm.parameters()}
    inside = [trained & {id(p) for p in block.parameters()} for block in blocks]
    if method.method in PROMPT_METHODS:
        # Prompts need not lie in the block that they enter
        first = min(method.layers_to_transform or [0])
    elif set().union(*inside) == trained:
        first = next((index for index, each in enumerate(inside) if each), 0)
    else:
        return None
    return SplitPoint(f"block {first}", blocks[first], tuple(blocks[:first])) if first else None


class CachedForward:
    """While entered, `model(cached_features=...)` starts at the split point; `model(pixel_values=...)` is unchanged.

    Args:
        model (`Classifier`): the outermost model, a `PeftModel` where there is one.
        split_point (`SplitPoint`): where its frozen part ends.
        image_shape (`tuple[int, int, int]`): of the images the features came from.
    """

    def __init__(self, model: Classifier, split_point: SplitPoint, image_shape: Sequence[int]) -> None:
        self.model, self.split_point, self.image_shape = model, split_point, tuple(image_shape)
        # What runs before the split point on a blank image is thrown away: one image is enough, unless shapes are at odds
        self._one_blank = True
        self._features: torch.Tensor | None = None
        self._output_lengths: dict[int, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> CachedForward:
        self._handles = [
            self.model.register_forward_pre_hook(self._take_features, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._forget_features, always_call=True),
            self.split_point.module.register_forward_pre_hook(self._put_features, with_kwargs=True, prepend=True),
        ]
        for index, block in enumerate(self.split_point.skipped):
            block.forward = functools.partial(self._skip, index, block.forward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for block in self.split_point.skipped:
            del block.forward

    @torch.no_grad()
    def is_exact(self, pixel_values: torch.Tensor, features: torch.Tensor, tolerance: float = 1e-4) -> bool:
        """Whether logits of images and of their features agree, with noise in the head, which may be zero.

        Args:
            pixel_values: images `(batch, 3, height, width)`.
            features: theirs, as they were cached.
            tolerance: largest difference, relative to the largest logit where that is above 1.
        """
        self.model.eval()
        head = perturbed(split_trainable(self.model)["head"].items())
        expected = functional_call(self.model, head, kwargs={"pixel_values": pixel_values}).logits
        try:
            logits = functional_call(self.model, head, kwargs={FEATURES: features}).logits
        except RuntimeError:
            self._one_blank = False
            logits = functional_call(self.model, head, kwargs={FEATURES: features}).logits
        difference = (logits - expected).abs().max().item()
        return difference <= tolerance * max(1.0, expected.abs().max().item())

    def _take_features(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if FEATURES not in kwargs:
            return None
        features = kwargs.pop(FEATURES)
        self._features = features
        # Only its shape is read: position embeddings and masks are made for it
        blank = torch.zeros((), device=features.device).expand(
            1 if self._one_blank else len(features), *self.image_shape
        )
        return args, {"pixel_values": blank, **kwargs}

    def _forget_features(self, *_: Any) -> None:
        self._features = None

    def _put_features(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._features is None:
            return None
        if args:
            return (self._features, *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self._features}

    def _skip(self, index: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self._features is None:
            output = forward(*args, **kwargs)
            self._output_lengths[index] = len(output) if isinstance(output, tuple) else 0
            return output
        hidden_states = args[0] if args else next(iter(kwargs.values()))
        length = self._output_lengths.get(index, 0)
        return (hidden_states, *[None] * (length - 1)) if length else hidden_states
