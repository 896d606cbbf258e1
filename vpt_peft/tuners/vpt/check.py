"""What is tried out when prompts are attached: keys and values against tokens, and quantised layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from vpt_peft.encoder import BlockSpec, EncoderError, EncoderSpec, submodule
from vpt_peft.encoder.inputs import sample_inputs
from vpt_peft.encoder.quantized import has_packed_weights, try_map
from vpt_peft.encoder.trace import block_arguments, first_tensor, in_eval, perturbed, random_state_kept

from .config import VPTConfig
from .layout import make_layout
from .parameters import VPTParameters


DIFFERENCE = "relative difference"


def check_key_values(encoder: nn.Module, spec: EncoderSpec) -> EncoderSpec:
    """`spec` with what the comparison rules out: tokens, or keys and values (with a warning).

    One block of each kind is run twice on the arguments it gets for a random input. Where key and value maps were
    recognised by their values, a difference means that tokens cannot stand in the sequence (their positions are counted,
    say); where they were recognised by lengths alone, it means that the maps are not what they seem. Tokens that make
    the block fail are ruled out.
    """
    blocks: list[BlockSpec] = []
    verdicts: dict[tuple, str] = {}
    for index, block in enumerate(spec.blocks):
        key, difference = block.attention.key, ""
        if block.takes_tokens and key is not None:
            kind = (type(submodule(encoder, block.path)), block.attention.path, key)
            if kind not in verdicts:
                verdicts[kind] = _compare(encoder, spec, index)
            difference = verdicts[kind]
        if difference and key is not None and (key.exact or not difference.startswith(DIFFERENCE)):
            reason = f"prompt tokens disturb the others ({difference})"
            block = replace(block, takes_tokens=False, no_tokens_reason=reason)
        elif difference:
            warnings.warn(
                f"prompts as keys and values differ from prompts as tokens in {block.path} ({difference}); tokens are "
                "used, which cost more.",
                stacklevel=2,
            )
            block = replace(block, attention=replace(block.attention, key=None, value=None))
        blocks.append(block)
    return replace(spec, blocks=tuple(blocks))


def _compare(encoder: nn.Module, spec: EncoderSpec, index: int) -> str:
    """What differs between the two ways through block `index`; empty if nothing does."""
    block = submodule(encoder, spec.blocks[index].path)
    arguments = None
    for inputs in sample_inputs(encoder):
        try:
            arguments = block_arguments(encoder, block, inputs)
            break
        except Exception:  # this candidate is not an input of the encoder
            continue
    if arguments is None:
        return ""
    parameters = VPTParameters(spec, encoder, encoder)
    parameters.attach()
    outputs: list[Any] = []
    choice: dict[str, Any] = {"num_virtual_tokens": 3, "layers_to_transform": [index], "propagate": False}
    try:
        for mode in ("kv", "token"):
            with in_eval(encoder), torch.no_grad():
                _activate(parameters, mode, VPTConfig(**choice, implementation=mode))  # type: ignore[arg-type]
                outputs.append(first_tensor(block(*arguments[0], **arguments[1])))
        difference = _difference(*outputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        parameters.detach()
    return "" if difference < _tolerance(outputs[0]) else f"{DIFFERENCE} {difference:.1e}"


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-6))


def _tolerance(output: torch.Tensor) -> float:
    # Eager attention takes its softmax in float32, whatever the model's dtype.
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(output.dtype, 1e-1)


def _activate(parameters: VPTParameters, name: str, config: VPTConfig) -> None:
    """Give the parameters one adapter with random prompts, the same ones each time."""
    with random_state_kept(parameters.encoder, seed=0):
        parameters.update_layer(name, config)
        prompts: Any = parameters.adapter(name).parts["prompts"]
        device, dtype = parameters.device_and_dtype()
        for key in prompts:
            # The caller may make all parameters on the meta device, and redirect setattr to do so
            if prompts[key].is_meta:
                drawn = torch.randn(prompts[key].shape, dtype=dtype, device=device)
                prompts._parameters[key] = nn.Parameter(drawn)
    for layer in (parameters, *parameters.layers):
        layer.set_adapter([name])


def check_skip_unread(
    root: nn.Module, encoder: nn.Module, spec: EncoderSpec, others: Sequence[VPTConfig] = ()
) -> None:
    """Check on a random input that the model's first output depends on the prefix tokens of the last block alone.

    Weights behind the blocks get some noise first: those that are zero (of a fresh head) would hide what is read.

    Args:
        root: The model.
        encoder: Its encoder.
        spec: The encoder's description.
        others: Configurations of adapters that are on the model already.

    Raises:
        EncoderError: It depends on other tokens, or the last block cannot make the prefix tokens alone.
    """
    if any(config.skip_unread for config in others):
        return
    last, why = spec.blocks[-1], ""
    if others:
        why = "it is tried out before prompts are attached, and the first adapter did not ask for it"
    elif root is encoder:
        why = "it has no head, and its output holds all tokens"
    elif not 0 < spec.num_prefix_tokens == len(spec.special) or not last.takes_tokens:
        why = "it has no class or register tokens in front of the others"
    elif not last.attention.uses_interface or last.attention.key is None:
        why = "the attention of its last block is not known"
    else:
        blocks = {id(p) for block in spec.blocks[:-1] for p in submodule(encoder, block.path).parameters()}
        weights = perturbed((name, p) for name, p in root.named_parameters() if id(p) not in blocks)
        lengths: list[int] = []
        outputs = [_first_output(root, encoder, spec, weights, skip, lengths) for skip in (False, True)]
        if any(output is None for output in outputs) or outputs[0].shape != outputs[1].shape:  # type: ignore[union-attr]
            why = "it does not run on images alone with the last block cut short"
        elif not _difference(*outputs) <= _tolerance(outputs[0]):  # type: ignore[arg-type]
            why = "its head reads other tokens too"
        elif lengths[-1] != spec.num_prefix_tokens:
            why = "its last block takes masks, biases or positions for all tokens"
    if why:
        raise EncoderError(f"skip_unread=True does not fit {type(root).__name__}: {why}; leave it at False.")


def _first_output(
    root: nn.Module,
    encoder: nn.Module,
    spec: EncoderSpec,
    weights: dict[str, torch.Tensor],
    skip_unread: bool,
    lengths: list[int],
) -> torch.Tensor | None:
    """The first tensor that the model returns with deep prompts, `None` where it fails.

    `lengths` takes the number of tokens that come to the last block's attention.
    """

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = first_tensor(args) if args else first_tensor(kwargs)
        lengths.append(-1 if tokens is None else tokens.shape[-2])

    parameters = VPTParameters(spec, encoder, root)
    parameters.attach()
    attention = submodule(encoder, f"{spec.blocks[-1].path}.{spec.blocks[-1].attention.path}")
    handle = attention.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for inputs in sample_inputs(encoder):
            with in_eval(root), torch.no_grad(), random_state_kept(root):
                _activate(parameters, "probe", VPTConfig(num_virtual_tokens=3, skip_unread=skip_unread))
                try:
                    return first_tensor(functional_call(root, weights, kwargs=inputs))
                except Exception:  # this candidate is not an input of the model
                    continue
    finally:
        handle.remove()
        parameters.detach()
    return None


def check_quantized(encoder: nn.Module, spec: EncoderSpec, config: VPTConfig, path: str = "") -> None:
    """Try the quantised layers that prompts run through, or their gradients.

    Args:
        encoder: The encoder.
        spec: Its description.
        config: What prompts are going to be attached.
        path: Dotted path of the encoder, for messages.

    Raises:
        EncoderError: A layer does not run on as many tokens as there are prompts, or lets no gradient pass.
    """
    floats = (
        p.dtype for p in encoder.parameters() if p.is_floating_point() and not p.is_meta and p.element_size() > 1
    )
    dtype = next(floats, torch.float32)
    for block, layout in zip(spec.blocks, make_layout(config, spec), strict=True):
        attention = block.attention
        projections = (attention.key, attention.value) if layout is not None and layout.mode == "kv" else ()
        alone = {f"{attention.path}.{each.path}" for each in projections if each is not None}
        for name, module in submodule(encoder, block.path).named_modules():
            if hasattr(module, "in_features") and has_packed_weights(module):
                rows = config.most_tokens if name in alone else block.tokens
                where = ".".join(filter(None, (path, block.path, name)))
                with in_eval(module):
                    try_map(module, where, rows, dtype, needs_gradient=not config.inference_mode)
