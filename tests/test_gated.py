"""Gated prompts: how gates start, and the bounds of the temperatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, tiny_vit

from vpt_peft import GatedVPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


def attach(**fields: Any) -> tuple[PeftModel, dict[str, Any]]:
    """A gated model in eval mode, and the parts of its adapter."""
    model = get_peft_model(tiny_vit(), GatedVPTConfig(num_virtual_tokens=3, **fields))
    return model.eval(), find_parameters(model).adapter("default").parts  # type: ignore[union-attr, return-value]


def test_scalar_gates_start_at_minus_gate_init():
    _, parts = attach(gate_init=5.0)
    assert {key: gate.weight.tolist() for key, gate in parts["gates"].items()} == {"0": [-5.0], "1": [-5.0]}
    for gate in parts["gates"].values():
        entered, left = torch.zeros(1, 3, 32), torch.ones(1, 3, 32)
        assert torch.allclose(gate(entered, left), torch.full((1, 3, 32), 0.0066929), rtol=1e-4)


def test_elementwise_gates_start_at_minus_gate_init():
    _, parts = attach(gate="elementwise", gate_init=3.0)
    assert list(parts["gates"]) == ["0", "1"]
    for gate in parts["gates"].values():
        assert not gate.weight.any()
        assert gate.bias.tolist() == [-3.0] * 32


@pytest.mark.parametrize("stored, bound", [(100.0, 4.0), (-1.0, 0.5)])
def test_training_clamps_the_stored_temperatures(stored: float, bound: float):
    """Before the pass, as the official code does: the optimiser goes on from the bound."""
    model, parts = attach(temperature_min=0.5, temperature_max=4.0)
    temperatures = [temperature.weight for temperature in parts["temperatures"].values()]
    for weight in temperatures:
        weight.data.fill_(stored)
    with torch.no_grad():
        model(pixel_values=images())
    assert [weight.item() for weight in temperatures] == [stored] * 3
    model.train()(pixel_values=images())
    assert [weight.item() for weight in temperatures] == [bound] * 3


@pytest.mark.parametrize("stored, bound", [(100.0, 4.0), (-1.0, 0.5)])
def test_inference_computes_within_the_bounds(stored: float, bound: float):
    """A file may hold other values; the pass clamps them and leaves what is stored."""
    model, parts = attach(temperature_min=0.5, temperature_max=4.0, gate_init=0.0)
    outputs = []
    for value in (stored, bound, 1.0):
        for temperature in parts["temperatures"].values():
            temperature.weight.data.fill_(value)
        with torch.no_grad():
            outputs.append(model(pixel_values=images()).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[1] - outputs[2]).abs().max() > 1e-6
