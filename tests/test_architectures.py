"""Every vision encoder of transformers: prompts as keys and values against prompts as tokens and against an oracle."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, CASTING, SUPPORTED, UNSUPPORTED, draw
from encoder_fixtures import build, computing_in_float64, inputs_of, require_installed
from peft import PeftModel, get_peft_model
from reference_attention import prompted_by_reference
from torch import nn

from vpt_peft import VPTConfig
from vpt_peft.encoder import EncoderError, EncoderSpec, find_encoder
from vpt_peft.tuners.vpt.layer import VPTLayer


TOLERANCE, EFFECT = 1e-9, 1e-4
NAMES_ARE_OF = "5.23."


@dataclass(frozen=True)
class Run:
    """What an encoder computes: its outputs, its hidden states and the gradients of its prompts by block index."""

    outputs: list[torch.Tensor]
    hidden: list[torch.Tensor]
    gradients: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Life:
    """An encoder before, with and after prompts as keys and values."""

    before: Run
    prompted: Run
    disabled: Run
    after: Run
    prompts: dict[int, torch.Tensor]
    modes: list[str | None]
    keys_before: list[str]
    keys_after: list[str]


def floats(value: Any) -> list[torch.Tensor]:
    """All floating-point tensors in a nest of outputs."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in floats(item)]


def run(model: nn.Module, name: str, prompts: dict[int, torch.Tensor] | None = None, dtype=torch.float64) -> Run:
    """One forward pass; with `prompts` also the gradients of a sum of all outputs with fixed weights."""
    inputs = inputs_of(name, dtype)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(base.forward).parameters
    if "output_hidden_states" in accepted or "kwargs" in accepted:
        inputs["output_hidden_states"] = True
    torch.manual_seed(0)
    with torch.set_grad_enabled(prompts is not None):
        result = model(**inputs)
        named = dict(result) if isinstance(result, dict) else {"": result}
        hidden = floats(named.pop("hidden_states", None))
        outputs = floats(named)
        gradients: dict[int, torch.Tensor] = {}
        if prompts:
            weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in outputs]
            loss = torch.stack([(x * weight).sum() for x, weight in zip(outputs, weights, strict=True)]).sum()
            found = torch.autograd.grad(loss, list(prompts.values()), allow_unused=True)
            gradients = {index: g for index, g in zip(prompts, found, strict=True) if g is not None}
    return Run([x.detach() for x in outputs], [x.detach() for x in hidden], gradients)


def attach(model: nn.Module, implementation: Any = "auto") -> tuple[PeftModel, dict[int, torch.Tensor]]:
    """The model with prompts, and the prompts by block index: the same values whatever the dtype."""
    config = VPTConfig(num_virtual_tokens=3, implementation=implementation, modules_to_save=[])
    peft_model = get_peft_model(model, config).eval()
    prompts = {int(k.split(".")[-1]): p for k, p in peft_model.named_parameters() if ".vpt_prompts." in k}
    for index, prompt in prompts.items():
        prompt.data = 0.3 * draw(*prompt.shape, seed=index).to(prompt.dtype)
    return peft_model, dict(sorted(prompts.items()))


@cache
def live(name: str) -> Life:
    """Attach prompts as keys and values to an encoder, run it, disable them and take them off."""
    with computing_in_float64(name):
        # Torch chooses other kernels for weights that are trained.
        model = build(name).requires_grad_(False)
        keys_before, before = list(model.state_dict()), run(model, name)
        peft_model, prompts = attach(model)
        layers = [module for module in model.modules() if isinstance(module, VPTLayer)]
        modes = [layer.layouts["default"].mode for layer in sorted(layers, key=lambda layer: layer.index)]
        prompted = run(peft_model, name, prompts)
        with peft_model.disable_adapter():
            disabled = run(peft_model, name)
        model = peft_model.unload()
        after = run(model, name)
        values = {index: prompt.detach() for index, prompt in prompts.items()}
        return Life(before, prompted, disabled, after, values, modes, keys_before, list(model.state_dict()))


def deviation(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of two lists of tensors, each relative to its largest value."""
    assert len(found) == len(expected) > 0
    assert [x.shape for x in found] == [x.shape for x in expected]
    pairs = [(x.double(), y.double()) for x, y in zip(found, expected, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in pairs)


def assert_close(found: Run, expected: Run, tolerance: float = TOLERANCE) -> None:
    assert deviation(found.outputs, expected.outputs) < tolerance
    if expected.hidden:
        assert deviation(found.hidden, expected.hidden) < tolerance
    assert found.gradients.keys() == expected.gradients.keys()
    assert deviation(list(found.gradients.values()), list(expected.gradients.values())) < tolerance


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def require_names(model: nn.Module, name: str) -> None:
    """Skip where the installed transformers has other names than the oracle, unless the oracle is of its version."""
    oracle, modules = ARCHITECTURES[name], dict(model.named_modules())
    inside = [f"{oracle.attention}.{leaf}" for leaf in (oracle.key, oracle.value, oracle.key_norm) if leaf]
    paths = [f"{block}.{path}" for block in oracle.blocks for path in (oracle.norm, oracle.attention, *inside) if path]
    missing = [path for path in paths if path not in modules]
    if missing and not transformers.__version__.startswith(NAMES_ARE_OF):
        pytest.skip(f"transformers {transformers.__version__} has no {missing[0]}")
    assert not missing


def test_number_of_supported_encoders():
    assert len(ARCHITECTURES) == 73
    assert len(SUPPORTED) + len(UNSUPPORTED) == 73
    assert len(SUPPORTED) >= 60


@pytest.mark.parametrize("name", SUPPORTED)
def test_names_are_found(name: str):
    require_installed(name)
    oracle = ARCHITECTURES[name]
    with computing_in_float64(name):
        model = build(name)
        require_names(model, name)
        spec: EncoderSpec = find_encoder(model)
    prefix = f"{spec.path}." if spec.path else ""
    assert tuple(prefix + block.path for block in spec.blocks) == oracle.blocks
    assert spec.special == oracle.special
    for block in spec.blocks:
        attention = block.attention
        assert attention.key is not None and attention.value is not None
        assert (attention.norm, attention.path) == (oracle.norm, oracle.attention)
        assert (attention.key.path, attention.value.path) == (oracle.key, oracle.value)
        assert (attention.key.norm, attention.value.norm) == (oracle.key_norm, None)
        assert (attention.key.parts, attention.key.part) == ((3, 1) if oracle.key == oracle.value else (1, 0))
        assert (attention.value.parts, attention.value.part) == ((3, 2) if oracle.key == oracle.value else (1, 0))
        assert (attention.key.unit_length, attention.value.unit_length) == (oracle.scaling == "cosine", False)
        assert attention.uses_interface == oracle.interface
    assert spec.blocks[-1].attention.mask_open == oracle.mask_open


@pytest.mark.parametrize("name", SUPPORTED)
def test_keys_and_values_reach_every_block(name: str):
    require_installed(name)
    life = live(name)
    assert set(life.modes) == {"kv"}
    assert len(life.modes) == len(life.prompts) == len(ARCHITECTURES[name].blocks)
    assert deviation(life.prompted.outputs, life.before.outputs) > EFFECT
    assert life.prompted.gradients.keys() == life.prompts.keys()
    assert all(gradient.abs().max() > EFFECT for gradient in life.prompted.gradients.values())


@pytest.mark.parametrize("name", SUPPORTED)
def test_encoder_is_restored(name: str):
    require_installed(name)
    life = live(name)
    for restored in (life.disabled, life.after):
        assert same(restored.outputs, life.before.outputs)
        assert same(restored.hidden, life.before.hidden)
    assert life.keys_after == life.keys_before
    assert [x.shape for x in life.prompted.hidden] == [x.shape for x in life.before.hidden]


@pytest.mark.parametrize("name", [name for name in SUPPORTED if ARCHITECTURES[name].tokens])
def test_equal_to_tokens(name: str):
    require_installed(name)
    with computing_in_float64(name):
        model, prompts = attach(build(name), "token")
        assert_close(live(name).prompted, run(model, name, prompts))


@pytest.mark.parametrize("name", [name for name in SUPPORTED if not ARCHITECTURES[name].tokens])
def test_tokens_are_refused(name: str):
    require_installed(name)
    with computing_in_float64(name):
        with pytest.raises(EncoderError, match="cannot run as tokens through block [01] "):
            attach(build(name), "token")


@pytest.mark.parametrize("name", SUPPORTED)
def test_equal_to_reference_attention(name: str):
    require_installed(name)
    with computing_in_float64(name):
        model = build(name)
        require_names(model, name)
        oracle = ARCHITECTURES[name]
        prompts = {index: prompt.clone().requires_grad_() for index, prompt in live(name).prompts.items()}
        with prompted_by_reference(model, oracle, {}):
            assert deviation(run(model, name).outputs, live(name).before.outputs) < TOLERANCE
        with prompted_by_reference(model, oracle, prompts):
            assert_close(live(name).prompted, run(model, name, prompts))


@pytest.mark.parametrize("name", sorted(CASTING))
def test_encoders_that_cast_in_float32(name: str):
    require_installed(name)
    expected = live(name)
    for implementation in ("auto", "token") if ARCHITECTURES[name].tokens else ("auto",):
        model, prompts = attach(build(name, dtype=torch.float32), implementation)
        assert_close(run(model, name, prompts, torch.float32), expected.prompted, 1e-4)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str):
    require_installed(name)
    model = build(name)
    before, keys = run(model, name), list(model.state_dict())
    with pytest.raises(EncoderError, match=UNSUPPORTED[name]):
        attach(model)
    assert list(model.state_dict()) == keys
    assert same(run(model, name).outputs, before.outputs)
