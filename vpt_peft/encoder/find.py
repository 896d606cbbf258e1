"""Find the vision encoder in a model and describe it by running it once."""

from __future__ import annotations

import math
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import nn

from .inputs import IMAGE_INPUTS, channel_counts, is_packed, sample_inputs
from .projections import match_projection
from .spec import AttentionSpec, BlockSpec, EncoderError, EncoderSpec
from .trace import AttentionCall, Call, Trace, block_arguments, first_tensor, in_eval, trace_encoder


PACKED = "its blocks take the tokens of all images as one sequence"


def find_encoder(model: nn.Module, backbone: str | None = None) -> EncoderSpec:
    """Find the vision encoder inside `model` and describe it by one forward pass on a small random input.

    Args:
        model: Any transformers model with a vision encoder in it.
        backbone: Dotted path of the encoder, needed if the model has several.

    Returns:
        The description, with paths relative to `model`.

    Raises:
        EncoderError: There is no vision encoder, there are several and `backbone` is not given, the path does not
            exist, or prompts are not defined for the encoder.
    """
    if backbone is not None:
        modules = dict(model.named_modules())
        if backbone not in modules:
            near = ", ".join(repr(path) for path, _ in _candidates(model)) or "none"
            raise EncoderError(
                f"backbone={backbone!r} is not a module of {type(model).__name__}; its vision encoders are: {near}."
            )
        return describe_encoder(modules[backbone], backbone)
    found = _candidates(model)
    if not found:
        raise EncoderError(
            f"{type(model).__name__} has no vision encoder: no part of it takes `pixel_values`, or patches with their "
            "`grid_thw`. Prompts are for vision transformers; pass a transformers vision model or a model with a vision "
            "tower."
        )
    specs, failures = [], []
    for path, encoder in found:
        try:
            specs.append(describe_encoder(encoder, path))
        except EncoderError as error:
            failures.append(str(error))
    specs = [spec for spec in specs if not any(_inside(other.path, spec.path) for other in specs)]
    if not specs:
        raise EncoderError(" ".join(dict.fromkeys(failures)))
    if len(specs) > 1:
        paths = ", ".join(repr(spec.path) for spec in specs)
        raise EncoderError(
            f"{type(model).__name__} has several vision encoders ({paths}): choose one with backbone=..."
        )
    return specs[0]


def find_encoder_path(model: nn.Module) -> str:
    """Dotted path of the vision encoder inside `model`, which is run only where there may be several.

    Raises:
        EncoderError: See [`find_encoder`].
    """
    found = _candidates(model)
    return found[0][0] if len(found) == 1 else find_encoder(model).path


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of blocks; `nn.Sequential` is one if it repeats a single class."""
    if isinstance(module, nn.Sequential):
        return len(module) > 1 and len({type(child) for child in module}) == 1
    return isinstance(module, nn.ModuleList)


def _inside(inner: str, outer: str) -> bool:
    return inner != outer and (outer == "" or inner.startswith(outer + "."))


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost models that take images; an outer one only if no model inside it does."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "config")
        and (any(name in signature(module.forward).parameters for name in IMAGE_INPUTS) or is_packed(module))
        and any(_is_stack(child) for child in module.modules())
    ]
    return [
        (path, module)
        for path, module in found
        if not any(_inside(inner, path) and _takes_images(other) for inner, other in found)
    ]


def _takes_images(module: nn.Module) -> bool:
    """Whether a model embeds pixels itself; an inner stack of blocks may only share the name of the input."""
    return any(isinstance(child, (nn.Conv2d, nn.Conv3d)) for child in module.modules()) or any(
        "patch" in path.rsplit(".", 1)[-1] and isinstance(child, nn.Linear) for path, child in module.named_modules()
    )


def describe_encoder(encoder: nn.Module, path: str = "") -> EncoderSpec:
    """Trace `encoder` and describe its blocks, attention projections, norms and token layout.

    Args:
        encoder: A model that takes images.
        path: Its dotted path in the whole model.

    Raises:
        EncoderError: It runs on no input derived from its configuration, or prompts are not defined for it.
    """
    name = type(encoder).__name__
    if any(parameter.is_meta for parameter in encoder.parameters()):
        raise EncoderError(f"{name} is on the meta device: load its weights before prompts are attached.")
    failure: Exception | None = None
    for inputs in sample_inputs(encoder):
        trace = trace_encoder(encoder, inputs)
        if trace.failure is None and trace.attention:
            return _describe(encoder, path, trace, inputs)
        if trace.failure is None:
            raise EncoderError(f"{name} has no softmax attention on a random input made from its configuration.")
        failure = failure or trace.failure
    raise EncoderError(f"{name} could not be run on a random input made from its configuration: {failure}")


def _describe(encoder: nn.Module, path: str, trace: Trace, inputs: dict[str, Any]) -> EncoderSpec:
    lists = {p for p, module in encoder.named_modules() if _is_stack(module)}
    chosen: dict[str, AttentionCall] = {}
    for call in trace.attention:
        block = _element_above(call.path, lists)
        if block is not None and call.value is not None:
            best = chosen.get(block)
            if best is None or call.key.shape[-2] > best.key.shape[-2]:
                chosen[block] = call
    chosen = {block: call for block, call in chosen.items() if not any(_inside(other, block) for other in chosen)}
    if not chosen:
        raise EncoderError(f"{type(encoder).__name__} has no stack of blocks with softmax self-attention.")
    runs = {call.path: call for call in reversed(trace.calls)}
    order = sorted(chosen, key=lambda block: chosen[block].order)
    blocks: list[BlockSpec] = []
    known: dict[tuple, BlockSpec] = {}
    for block in order:
        attention = chosen[block]
        signature = (type(runs[block].module), attention.module.__class__, attention.path[len(block) :])
        known[signature] = _describe_block(encoder, block, attention, runs, trace, known.get(signature))
        blocks.append(known[signature])
    first, last = runs[order[0]], runs[order[-1]]
    if not is_packed(encoder) and _joins_images(encoder, first, inputs):
        blocks = [replace(block, takes_tokens=False, no_tokens_reason=PACKED) for block in blocks]
    images = first_tensor(inputs)
    plain = images if images is not None and images.dim() >= 4 and not is_packed(encoder) else None
    convolutions = [call for call in trace.calls if isinstance(call.module, (nn.Conv2d, nn.Conv3d))]
    return EncoderSpec(
        path=path,
        blocks=tuple(blocks),
        special=_special_positions(encoder, first, inputs),
        final_norm=_final_norm(trace, last),
        patch_embedding=next((c.path for c in convolutions if plain is not None and c.order < first.order), None),
        image_size=(plain.shape[-2], plain.shape[-1]) if plain is not None else None,
        channels=plain.shape[-3] if plain is not None else channel_counts(encoder)[0],
        packed=is_packed(encoder),
        merges=_merges(trace, [runs[block] for block in order]),
        model_type=str(getattr(encoder.config, "model_type", "")),
    )


def _joins_images(encoder: nn.Module, first: Call, inputs: dict[str, Any]) -> bool:
    """Whether two images come to the first block as one sequence (Pixtral), told apart by a mask."""
    if first.input is None or first.input.dim() != 3 or first.input.shape[0] != 1:
        return False
    both = {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    try:
        args, kwargs = block_arguments(encoder, first.module, both)
    except Exception:  # it takes one image at a time
        return False
    return (kwargs[first.argument] if first.argument else args[0]).shape[0] == 1


def _element_above(path: str, lists: set[str]) -> str | None:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[: end - 1]) in lists:
            return ".".join(parts[:end])
    return None


def _describe_block(
    encoder: nn.Module,
    path: str,
    attention: AttentionCall,
    runs: dict[str, Call],
    trace: Trace,
    twin: BlockSpec | None,
) -> BlockSpec:
    block, call = runs[path], runs[attention.path]
    if call.input is None or block.input is None:
        raise EncoderError(f"{type(block.module).__name__} does not take its tokens as a tensor.")
    below = [c for c in trace.calls if _inside(c.path, path)]
    inner = [c for c in below if _inside(c.path, attention.path) and c.order <= call.order]
    if twin is not None and twin.attention.key is not None:
        query, key, value = twin.attention.query, twin.attention.key, twin.attention.value
    else:
        query, key, value = _match_projections(attention, inner)
    heads = 0
    if key is not None:
        made_from = next(c for c in inner if c.path == f"{attention.path}.{key.path}")
        if made_from.output is not None:
            heads = made_from.output.shape[-1] // (key.parts * attention.key.shape[-1])
        if made_from.input is not None and made_from.input.numel() < call.input.numel():
            raise EncoderError(
                f"{type(attention.module).__name__} attends to spatially reduced keys and values, for which Visual "
                "Prompt Tuning is not defined; choose an encoder with full self-attention."
            )
    before = [c for c in below if c.order < call.order and not _inside(c.path, attention.path)]
    mask = attention.mask
    spec = AttentionSpec(
        path=attention.path[len(path) + 1 :],
        norm=_norm_before(before, call, path),
        query=query,
        key=key,
        value=value,
        out=next((c.path[len(attention.path) + 1 :] for c in inner[::-1] if hasattr(c.module, "weight")), None),
        heads=heads,
        head_dim=attention.value.shape[-1] if attention.value is not None else 0,
        uses_interface=attention.uses_interface,
        eager=attention.eager,
        mask_open=_open_value(mask),
    )
    reason = PACKED if is_packed(encoder) else _why_no_tokens(block, call, attention)
    windowed = (
        bool(reason)
        and block.input.dim() == 3
        and 0 <= call.input.numel() - block.input.numel()
        and (call.input.shape[0] > block.input.shape[0])
    )
    if twin is not None and twin.windowed:
        # At the last resolution one window may cover the grid; the block still partitions its tokens.
        windowed, reason = True, twin.no_tokens_reason
    return BlockSpec(
        path=path,
        width=call.input.shape[-1],
        tokens=math.prod(block.input.shape[1:-1] if block.input.dim() > 2 else block.input.shape[:1]),
        attention=spec,
        argument=block.argument,
        takes_tokens=not reason,
        no_tokens_reason=reason,
        windowed=windowed,
        tail=_tail(below, block, call) if windowed else (),
    )


def _match_projections(attention: AttentionCall, inner: list[Call]):
    """The projections of queries, keys and values; all `None` if keys or values are not found."""
    if attention.value is not None:
        query, key, value = (
            match_projection(attention.module, inner, target, attention.path, name)
            for name, target in (("query", attention.query), ("key", attention.key), ("value", attention.value))
        )
        if key is not None and value is not None:
            return query, key, value
    return None, None, None


def _norm_before(before: list[Call], attention: Call, block: str) -> str | None:
    """The norm whose output is the attention's input, or the last one that ran before it."""
    norms = [c for c in before if "norm" in type(c.module).__name__.lower() and c.output is not None]
    made_it = [c for c in norms if c.output is attention.input]
    chosen = (made_it or norms)[-1:]
    return chosen[0].path[len(block) + 1 :] if chosen else None


def _open_value(mask: torch.Tensor | None) -> float:
    """The value of a float mask where attention is allowed: 0, except in encoders that mark it with 1."""
    if mask is None or mask.dtype == torch.bool or not mask.is_floating_point():
        return 0.0
    values = mask.unique()
    return float(values.max()) if values.numel() == 2 and values.min() < -1e3 else 0.0


def _why_no_tokens(block: Call, call: Call, attention: AttentionCall) -> str:
    tokens, inputs = block.input, call.input
    if tokens is None or inputs is None or tokens.dim() != 3:
        return "its blocks take the tokens as a grid"
    if inputs.dim() != 3 or inputs.shape[0] != tokens.shape[0] or attention.key.dim() not in (3, 4):
        return "its blocks split the tokens into windows or merge windows"
    if attention.key.shape[-2] < tokens.shape[1]:
        return "its attention regroups the tokens"
    return ""


def _tail(below: list[Call], block: Call, attention: Call) -> tuple[str, ...]:
    """The children of a windowed block from its second norm on, if `x + tail(x)` is the block's output."""
    depth = block.path.count(".") + 1
    after = sorted(
        (c for c in below if c.path.count(".") == depth and c.order > attention.order and c.input is not None),
        key=lambda c: c.order,
    )
    start = next((i for i, c in enumerate(after) if "norm" in type(c.module).__name__.lower()), None)
    if start is None or block.output is None or after[start].input is None:
        return ()
    tokens: Any = after[start].input
    result = tokens
    with torch.no_grad():
        for child in after[start:]:
            with in_eval(child.module):
                result = child.module(result)
    if not torch.allclose(tokens + result, block.output.reshape_as(tokens), rtol=1e-3, atol=1e-4):
        return ()
    return tuple(child.path[len(block.path) + 1 :] for child in after[start:])


def _final_norm(trace: Trace, last: Call) -> str | None:
    """The norm that reads all tokens of the last block."""
    for call in trace.calls:
        if call.order > last.order and call.input is not None and last.output is not None:
            norm = "norm" in type(call.module).__name__.lower() and not any(True for _ in call.module.children())
            if norm and call.input.dim() == 3 and call.input.shape == last.output.shape:
                return call.path
    return None


def _merges(trace: Trace, blocks: list[Call]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    found = []
    for index, (before, after) in enumerate(zip(blocks, blocks[1:], strict=False), start=1):
        if before.output is None or after.input is None or before.output.shape[-1] == after.input.shape[-1]:
            continue
        merge = next((c for c in trace.calls if c.output is after.input and c.input is before.output), None)
        if merge is not None:
            children = [c for c in trace.calls if _inside(c.path, merge.path) and c.order < merge.order]
            found.append((index, tuple(c.path for c in sorted(children, key=lambda c: c.order))))
    return tuple(found)


def _special_positions(encoder: nn.Module, first: Call, inputs: dict[str, Any]) -> tuple[int, ...]:
    """Positions in the first block's input that change with a token parameter."""
    if first.input is None or first.input.dim() != 3:
        return ()

    def block_input() -> torch.Tensor:
        args, kwargs = block_arguments(encoder, first.module, inputs)
        return kwargs[first.argument] if first.argument else args[0]

    positions: set[int] = set()
    generator = torch.Generator().manual_seed(0)
    base = None
    for name, parameter in encoder.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        is_token = ("token" in leaf or "class_embedding" in leaf or leaf == "cls") and "mask" not in leaf
        if (
            not is_token
            or parameter.shape[-1] != first.input.shape[-1]
            or parameter.numel() > 4096 * parameter.shape[-1]
        ):
            continue
        base = block_input() if base is None else base
        kept = parameter.detach().clone()
        try:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
            moved = (block_input() - base).abs().amax(dim=(0, 2)) > 1e-6
        finally:
            with torch.no_grad():
                parameter.copy_(kept)
        if not moved.all():
            positions.update(torch.nonzero(moved).flatten().tolist())
    return tuple(sorted(positions))
