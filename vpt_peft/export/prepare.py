"""The model as it is exported: a copy in float32, prompts merged, one image tensor in, named tensors out."""

from __future__ import annotations

import copy
import warnings
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..encoder.inputs import image_size as configured_size
from ..encoder.inputs import sample_inputs
from ..tuners.vpt.layer import PromptTunerLayer
from ..tuners.vpt.parameters import find_parameters


if TYPE_CHECKING:
    from torch.export import ExportedProgram


class ExportedModel(nn.Module):
    """A model of one image tensor that returns the tensors of its output by name.

    Args:
        model: The model.
        argument: The name under which it takes images.
        options: Further keyword arguments.
    """

    def __init__(self, model: nn.Module, argument: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.argument, self.options = model, argument, options

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of images `(batch, channels, height, width)`; those that are not tensors are left out."""
        output = self.model(**{self.argument: pixel_values}, **self.options, return_dict=True)
        return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def float_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 on the CPU, in eval mode, with attention as matrix products and other adapters merged."""
    copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    # One by one, as `Module.to` would drop the imaginary part of complex buffers (rotary tables)
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    # While it is traced, transformers makes boolean masks for other attention functions, and BEiT adds them as numbers
    copied.set_attn_implementation("eager")
    for module in copied.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, PromptTunerLayer):
            if not module.merged and not module.disable_adapters:
                module.merge()
    return copied


def merge_prompts(model: nn.Module, adapter: str) -> None:
    """Make deep prompts constant keys and values, again where they were merged in another dtype."""
    parameters = find_parameters(model)
    if parameters is not None:
        for layer in parameters.layers:
            layer.unmerge_prompts()
            layer.merge_prompts(parameters.adapter(adapter))


def sample(
    model: PreTrainedModel, size: tuple[int, int] | None, image_processor: Any
) -> tuple[ExportedModel, torch.Tensor]:
    """The model as it is exported, and images `(1, channels, height, width)` that it takes.

    Args:
        model: The prompted model.
        size: (height, width) in pixels; `None`: the image processor's, else the configuration's.
        image_processor: Of the model, or `None`.

    Raises:
        ValueError: The model does not run on images alone, or not on images of this size.
    """
    parameters = find_parameters(model)
    encoder = model if parameters is None else parameters.encoder
    size = size or processor_size(image_processor)
    accepted, failure = signature(model.forward).parameters, None
    for inputs in sample_inputs(encoder):
        (argument, images), *others = inputs.items()
        if others or argument not in accepted:
            continue
        options: dict[str, Any] = {}
        if size is not None:
            images = random_images(images, 1, size=size)
            if size != configured_size(encoder.config) and "interpolate_pos_encoding" in accepted:
                options["interpolate_pos_encoding"] = True
        wrapper = ExportedModel(model, argument, options)
        try:
            with torch.no_grad():
                outputs = wrapper(images)
        except Exception as error:  # this candidate is not an input of the model
            failure = failure or error
            continue
        if not outputs:
            raise ValueError(f"{type(model).__name__} returns no tensor by name; export a model with a head.")
        return wrapper, images
    raise ValueError(
        f"{type(model).__name__} does not run on images alone{f' ({failure})' if failure else ''}; export a vision model "
        "or one with a classification head, at an image_size that it takes."
    )


def trace(model: ExportedModel, images: torch.Tensor) -> ExportedProgram:
    """The graph of a model for images `(batch, ..., height, width)`, the batch of any size."""
    with warnings.catch_warnings():
        # Prompts on their way to the head are kept in an attribute, which the graph has no need of
        warnings.filterwarnings("ignore", "The tensor attribute .* was assigned during export")
        # With one image the batch would be taken for a constant
        return torch.export.export(
            model, (random_images(images, 2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )


def processor_size(image_processor: Any) -> tuple[int, int] | None:
    """(height, width) in pixels of what an image processor gives, `None` where it does not say."""
    cropped = getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None)
    size = cropped or getattr(image_processor, "size", None)
    if not size:
        return None
    sides = dict(size)
    height, width = (sides.get(name) or sides.get("shortest_edge") for name in ("height", "width"))
    return (int(height), int(width)) if height and width else None


def random_images(like: torch.Tensor, rows: int, seed: int = 0, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Images of the shape of `like`, `(rows, ..., height, width)`, drawn from a standard normal."""
    shape = (rows, *like.shape[1:-2], *(size or like.shape[-2:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
