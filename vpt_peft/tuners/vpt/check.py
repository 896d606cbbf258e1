"""What is tried out when prompts are attached: keys and values against tokens, and quantised maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vpt_peft.encoder import BlockSpec, EncoderSpec, submodule
from vpt_peft.encoder.inputs import sample_inputs
from vpt_peft.encoder.quantized import has_packed_weights, try_map
from vpt_peft.encoder.trace import block_arguments, first_tensor, in_eval

from .config import VPTConfig
from .plan import make_roles
from .store import VPTPromptStore


DIFFERENCE = "relative difference"


def check_key_values(encoder: nn.Module, spec: EncoderSpec) -> EncoderSpec:
    """`spec` with what the comparison rules out: tokens, or keys and values (with a warning).

    One block of each kind is run twice on the arguments it gets for a random input. Where key and value maps were
    recognised by their values, a difference means that tokens cannot stand in the sequence (their positions are counted,
    say); where they were recognised by lengths alone, it means that the maps are not what they seem. Tokens that make
    the block fail are ruled out.
    """
    blocks, verdicts = [], {}
    for index, block in enumerate(spec.blocks):
        module = submodule(encoder, block.path)
        kind = (type(module), block.takes_tokens, block.attention.path, block.attention.key)
        if kind not in verdicts and block.takes_tokens and block.attention.key is not None:
            verdicts[kind] = _compare(encoder, spec, index)
        blocks.append(_apply(block, verdicts.get(kind, "")))
    return replace(spec, blocks=tuple(blocks))


def _apply(block: BlockSpec, difference: str) -> BlockSpec:
    if not difference or block.attention.key is None:
        return block
    if block.attention.key.exact or not difference.startswith(DIFFERENCE):
        return replace(block, takes_tokens=False, no_tokens_reason=f"prompt tokens disturb the others ({difference})")
    warnings.warn(
        f"prompts as keys and values differ from prompts as tokens in {block.path} ({difference}); tokens are used, "
        "which cost more.",
        stacklevel=2,
    )
    return replace(block, attention=replace(block.attention, key=None, value=None))


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
    store = VPTPromptStore(spec, encoder, encoder)
    store.attach()
    try:
        outputs = [_run(store, block, mode, index, arguments) for mode in ("kv", "token")]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        store.detach()
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp_min(1e-6))
    # Eager attention takes its softmax in float32, whatever the model's dtype.
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-3}.get(outputs[0].dtype, 1e-1)
    return "" if difference < tolerance else f"{DIFFERENCE} {difference:.1e}"


def _give_values(store: VPTPromptStore, name: str) -> None:
    """Draw the probe's prompts where the caller makes all parameters on the meta device."""
    prompts = store.part(name, "prompts")
    for key in prompts:
        if prompts[key].is_meta:
            device, dtype = store.device_and_dtype()
            # Not by setattr, which is what the caller has redirected.
            prompts._parameters[key] = nn.Parameter(torch.randn(prompts[key].shape, dtype=dtype, device=device))


def _run(
    store: VPTPromptStore, block: nn.Module, mode: Any, index: int, arguments: tuple[tuple, dict[str, Any]]
) -> torch.Tensor:
    config = VPTConfig(num_virtual_tokens=3, layers_to_transform=[index], propagate=False, implementation=mode)
    with in_eval(store.encoder), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        store.update_layer(mode, config)
        _give_values(store, mode)
        for layer in (store, *store.layers):
            layer.set_adapter([mode])
        output = first_tensor(block(*arguments[0], **arguments[1]))
    if output is None:
        raise ValueError("the block returns no tensor")
    return output


def check_quantized(encoder: nn.Module, spec: EncoderSpec, config: VPTConfig, path: str = "") -> None:
    """Try the quantised maps that prompts run through, or their gradients.

    Args:
        encoder: The encoder.
        spec: Its description.
        config: What prompts are going to be attached.
        path: Dotted path of the encoder, for messages.

    Raises:
        EncoderError: A map does not run on as many tokens as there are prompts, or lets no gradient pass.
    """
    floats = (
        p.dtype for p in encoder.parameters() if p.is_floating_point() and not p.is_meta and p.element_size() > 1
    )
    dtype = next(floats, torch.float32)
    for block, role in zip(spec.blocks, make_roles(config, spec), strict=True):
        attention = block.attention
        maps = (attention.key, attention.value) if role.mode == "kv" else ()
        alone = {f"{attention.path}.{each.path}" for each in maps if each is not None}
        for name, module in submodule(encoder, block.path).named_modules():
            if hasattr(module, "in_features") and has_packed_weights(module):
                rows = config.num_virtual_tokens if name in alone else block.tokens
                where = ".".join(filter(None, (path, block.path, name)))
                with in_eval(module):
                    try_map(module, where, rows, dtype, needs_gradient=not config.inference_mode)


def check_heads(model: nn.Module, names: Iterable[str]) -> None:
    """Check that the modules that are going to train hold no quantised weights.

    Raises:
        ValueError: Some do.
    """
    packed = [
        path
        for path, module in model.named_modules()
        if any(f".{name}." in f".{path}." for name in names) and has_packed_weights(module)
    ]
    if packed:
        raise ValueError(
            f"modules_to_save: {', '.join(packed)} has quantised weights, which cannot train; leave it as it is when the "
            "model is quantised (modules_to_not_convert, for bitsandbytes llm_int8_skip_modules), or pass "
            "modules_to_save=[]."
        )
