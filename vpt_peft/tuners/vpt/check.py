"""What is tried out when prompts are attached: keys and values against tokens, and quantised maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from vpt_peft.encoder import BlockSpec, EncoderSpec, submodule
from vpt_peft.encoder.inputs import IMAGE_INPUTS, sample_inputs
from vpt_peft.encoder.quantized import has_packed_weights, try_map
from vpt_peft.encoder.trace import block_arguments, first_tensor, in_eval, shaken

from .config import VPTConfig
from .plan import make_roles
from .sequence import replace_tokens
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
    difference = _difference(*outputs)
    return "" if difference < _tolerance(outputs[0]) else f"{DIFFERENCE} {difference:.1e}"


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-6))


def _tolerance(output: torch.Tensor) -> float:
    # Eager attention takes its softmax in float32, whatever the model's dtype.
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(output.dtype, 1e-1)


def _activate(store: VPTPromptStore, name: str, config: VPTConfig) -> None:
    """Give the store one adapter with random prompts, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        store.update_layer(name, config)
        _give_values(store, name)
    for layer in (store, *store.layers):
        layer.set_adapter([name])


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
    with in_eval(store.encoder), torch.no_grad():
        _activate(store, mode, config)
        output = first_tensor(block(*arguments[0], **arguments[1]))
    if output is None:
        raise ValueError("the block returns no tensor")
    return output


def check_shortcuts(root: nn.Module, encoder: nn.Module, spec: EncoderSpec) -> EncoderSpec:
    """`spec` with what work can be left out of a forward pass, see `shortcuts`.

    The whole model (where it does not run on images alone, its encoder) runs on a random input with shallow prompts and
    some noise in the weights behind the last block. First the last block's other tokens are changed: where every output
    stays exactly the same, none depends on them. Then work is left out, whoever looks; every output must stay the same
    to rounding.
    """
    if not all(block.takes_tokens for block in spec.blocks):
        return spec
    last = spec.blocks[-1].attention
    # Models of the user may read other tokens in other modes and calls than the one that is tried
    special = type(root).__module__.startswith("transformers.") and root is not encoder
    special = special and 0 < spec.prefix == len(spec.special) and last.uses_interface and last.key is not None
    special = special and not any(map(has_packed_weights, encoder.modules()))
    takes_images = getattr(root, "main_input_name", None) in IMAGE_INPUTS
    passed = {id(p) for block in spec.blocks[:-1] for p in submodule(encoder, block.path).parameters()}
    models = dict.fromkeys((root, encoder) if takes_images else (encoder,))

    @cache
    def noisy(model: nn.Module) -> dict[str, torch.Tensor]:
        return shaken((name, p) for name, p in model.named_parameters() if id(p) not in passed)

    for inputs in sample_inputs(encoder):
        for model in models:
            run = partial(_outputs, model, encoder, noisy(model), inputs)
            plain = run(spec)
            if plain is None:
                continue
            alone = special and model is root
            if alone:
                changed = run(spec, change_others=True)
                alone = changed is not None and all(map(torch.equal, plain, changed))
            for joins, reads_special in ((True, alone), (True, False), (False, alone)):
                tried = replace(spec, joins=joins, reads_special=reads_special)
                if _are_equal(plain, run(tried)):
                    return tried
            return spec
    return spec


def _outputs(
    model: nn.Module,
    encoder: nn.Module,
    weights: dict[str, torch.Tensor],
    inputs: dict[str, Any],
    spec: EncoderSpec,
    change_others: bool = False,
) -> list[torch.Tensor] | None:
    """All tensors the model returns with shallow prompts; `None` where it fails, or left out less than `spec` says.

    Args:
        weights: Take the place of the model's own, by name.
        change_others: Put other numbers in the place of what the last block makes of all but the special tokens.
    """
    store = VPTPromptStore(spec, encoder, model)
    store.attach()
    store.trying = True
    handles = []
    if change_others:
        change = partial(_change_others, spec.prefix)
        handles.append(submodule(encoder, spec.blocks[-1].path).register_forward_hook(change))
    try:
        with in_eval(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            _activate(store, "shallow", VPTConfig(num_virtual_tokens=3, deep=False))
            output = functional_call(model, weights, kwargs=inputs)
        if store.left_out != {name for name in ("joins", "reads_special") if getattr(spec, name)}:
            return None
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    except Exception:  # not an input of the model, or nothing may be left out
        return None
    finally:
        for handle in handles:
            handle.remove()
        store.detach()


def _change_others(special: int, block: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a block: everything behind the special tokens becomes large and alike."""
    hidden = first_tensor(output)
    if hidden is None:
        raise ValueError("the block returns no tensor")
    changed = torch.cat([hidden[:, :special], torch.full_like(hidden[:, special:], 10.0)], dim=1)
    return replace_tokens(output, changed)


def _are_equal(plain: list[torch.Tensor], shortened: list[torch.Tensor] | None) -> bool:
    if shortened is None or len(plain) != len(shortened):
        return False
    pairs = zip(plain, shortened, strict=True)
    return all(a.shape == b.shape and _difference(a, b) < _tolerance(a) for a, b in pairs)


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


def check_endings(adapter_names: Iterable[str], names: Iterable[str]) -> None:
    """Check that PEFT, which looks for modules to train by the ends of their paths, takes no adapter for one.

    Raises:
        ValueError: An adapter's name ends like a module to train.
    """
    for adapter in dict.fromkeys(adapter_names):
        alike = [name for name in names if adapter.endswith(name)]
        if alike:
            raise ValueError(
                f"adapter_name={adapter!r} ends with {alike[0]!r}, one of modules_to_save, and PEFT would take the adapter "
                "for that module; choose another name for the adapter."
            )
