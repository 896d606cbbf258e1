"""Find the blocks whose output a model reads; prompts in the others would never get a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from .inputs import IMAGE_INPUTS, sample_inputs
from .spec import EncoderSpec, submodule
from .trace import in_eval, random_state_kept


# A tiled image (LLaVA-NeXT) has an overview and a few tiles; surplus tiles are cut off by the model
TILES = 10


def read_blocks(root: nn.Module, encoder: nn.Module, spec: EncoderSpec) -> tuple[bool, ...]:
    """Whether each block's output influences what `root` returns for an image.

    `root` runs once on a random image, in eval mode. To make this cheap, one block of each kind runs and the others
    repeat its output. Each block adds a zero of its own to its output. A block is unread if autograd finds no path from
    what `root` returns back to that zero; `DistributedDataParallel` finds unused parameters by the same rule. Models that
    need text as well run their `get_image_features` instead, if their configuration selects feature layers.

    Args:
        root: The model around the encoder, or the encoder itself.
        encoder: The encoder.
        spec: Its description.

    Returns:
        One value per block, in the order of `spec.blocks`. All are true where `root` does not run on images alone: what
        is not known to be unread counts as read.
    """
    for run in _runs(root, encoder):
        zeros: dict[int, torch.Tensor] = {}
        passed_on: list[Any] = []
        try:
            with in_eval(root), _unchanged(root), random_state_kept(root), torch.enable_grad():
                encoder.register_forward_pre_hook(_refuse_attention_maps, with_kwargs=True)
                _patch_blocks(encoder, spec, zeros)
                for module in _feature_extractors(root, encoder):
                    module.register_forward_hook(partial(_note_output, passed_on))
                output = run()
        except Exception:  # not an input of this model
            continue
        # A model that extracts features may return the encoder's outputs beside them
        hidden = {id(leaf) for leaf in passed_on}
        reached = _reached(leaf for leaf in tree_leaves(output) if id(leaf) not in hidden)
        unread = {index for index, zero in zeros.items() if id(zero) not in reached}
        # Without any way back, the encoder runs without gradients, which says nothing about what is read
        if unread != set(zeros):
            return tuple(index not in unread for index in range(len(spec.blocks)))
    return (True,) * len(spec.blocks)


def _runs(root: nn.Module, encoder: nn.Module) -> Iterator[Callable[[], Any]]:
    """Ways to run `root` on images alone, the likeliest first."""
    takes_text = isinstance(root, PreTrainedModel) and root.main_input_name not in IMAGE_INPUTS and root is not encoder
    for inputs in sample_inputs(encoder):
        if not takes_text:
            yield partial(root, **inputs)
            if len(inputs) == 1 and not isinstance(root, PreTrainedModel):
                yield partial(root, *inputs.values())
        elif _selects_layers(getattr(root.config, "to_dict", dict)()):
            extract = getattr(root, "get_image_features", None)
            images = next(iter(inputs.values()))
            if extract is None or images.dim() != 4:
                continue
            yield partial(extract, images)
            if "image_sizes" in signature(extract).parameters:
                sizes = torch.tensor([images.shape[-2:]], device=images.device)
                for batch in (images, images.expand(TILES, -1, -1, -1)[None]):
                    yield partial(extract, batch, image_sizes=sizes)


def _selects_layers(config: Any) -> bool:
    """Whether a configuration, or one inside it, names the layers whose features are used."""
    if not isinstance(config, dict):
        return False
    return any("feature_layer" in str(name) or _selects_layers(value) for name, value in config.items())


def _feature_extractors(root: nn.Module, encoder: nn.Module) -> list[nn.Module]:
    """The encoder and the modules around it, up to the one that extracts features."""
    if not hasattr(root, "get_image_features"):
        return []
    return [
        module
        for module in root.modules()
        if not hasattr(module, "get_image_features") and any(child is encoder for child in module.modules())
    ]


def _refuse_attention_maps(encoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: blocks that repeat an output have no attention maps of their own."""
    if kwargs.get("output_attentions", getattr(encoder.config, "output_attentions", False)):
        raise ValueError("the model reads attention maps")


def _note_output(outputs: list[Any], module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook that collects everything a module returns."""
    outputs += tree_leaves(output)


def _patch_blocks(encoder: nn.Module, spec: EncoderSpec, zeros: dict[int, torch.Tensor]) -> None:
    """Make each block add its zero to its output, and repeat the output of a block of the same kind."""
    outputs: dict[tuple, Any] = {}
    for index, block in enumerate(spec.blocks):
        module: Any = submodule(encoder, block.path)
        kind = (type(module), *(parameter.shape for parameter in module.parameters()))
        module.forward = partial(_forward, module.forward, outputs, kind, zeros, index)


def _forward(
    original: Callable, outputs: dict[tuple, Any], kind: tuple, zeros: dict[int, torch.Tensor], index: int, /,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    zero = zeros.setdefault(index, torch.zeros((), requires_grad=True))
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    key = (*kind, *(leaf.shape for leaf in given))
    if key not in outputs:
        with torch.no_grad():
            outputs[key] = original(*args, **kwargs)
    # Empty sums connect the output with the input; they are zero whatever the numbers are
    linked = [leaf.narrow(-1, 0, 0).sum() for leaf in given if leaf.is_floating_point() and leaf.dim()]

    def connect(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf + sum(each.to(leaf) for each in (zero, *linked))

    return tree_map(connect, outputs[key])


def _reached(outputs: Iterable[Any]) -> set[int]:
    """Ids of the leaf tensors that autograd finds behind `outputs`."""
    found: set[int] = set()
    tensors = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        found.add(id(getattr(node, "variable", None)))
        following = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= following
        waiting += following
    return found


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what happens to the attributes, hooks and buffers of all modules, such as transformers' capturing hooks."""
    before = [(module, vars(module).copy()) for module in model.modules()]
    contents = [(value, value.copy()) for _, state in before for value in state.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        for module, state in before:
            vars(module).clear()
            vars(module).update(state)
        for value, content in contents:
            value.clear()
            value.update(content)
