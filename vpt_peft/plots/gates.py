"""Gates and temperatures of gated prompts, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..tuners.gated_vpt.layer import ScalarGate
from ..tuners.vpt.adapter import PromptAdapter
from ..tuners.vpt.parameters import find_parameters
from .figures import ADAPTER, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def find_adapter(model: nn.Module, adapter_name: str | None) -> PromptAdapter:
    """Return a prompt adapter of a model; without a name the one that is active.

    Raises:
        ValueError: the model has no such adapter, or several are active.
    """
    parameters = find_parameters(model)
    if parameters is None:
        raise ValueError(f"{type(model).__name__} has no prompts; attach some with get_peft_model.")
    names = parameters.active_names() if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in parameters.configs:
        known = ", ".join(map(repr, parameters.configs))
        raise ValueError(f"adapter_name={adapter_name!r} must be one prompt adapter of this model: {known}.")
    return parameters.adapter(names[0])


def _values(adapter: PromptAdapter, part: str) -> dict[int, Any]:
    modules: Any = adapter.parts.get(part, {})
    return {int(index): modules[index] for index in modules}


def gate_openings(model: nn.Module, adapter_name: str | None = None) -> dict[int, float]:
    """Return how far each gate is open, sigmoid(γ), by the index of its block.

    Args:
        model (`nn.Module`): a model with gated prompts.
        adapter_name (`str`): the adapter; default: the active one.

    Raises:
        ValueError: there are no scalar gates. The openings of element-wise gates depend on the image.
    """
    gates = _values(find_adapter(model, adapter_name), "gates")
    if not gates or not all(isinstance(gate, ScalarGate) for gate in gates.values()):
        raise ValueError("this adapter has no scalar gates; they come with GatedVPTConfig(gate='scalar').")
    return {index: torch.sigmoid(gate.weight.detach().float()).item() for index, gate in gates.items()}


def temperatures(model: nn.Module, adapter_name: str | None = None) -> dict[int, float]:
    """Return the attention temperature of each block by its index; empty without temperatures.

    Args:
        model (`nn.Module`): a model with gated prompts.
        adapter_name (`str`): the adapter; default: the active one.
    """
    found = _values(find_adapter(model, adapter_name), "temperatures")
    with torch.no_grad():
        return {index: module().item() for index, module in found.items()}


def prompt_weights(openings: Mapping[int, float], blocks: int) -> list[float]:
    """Return what the prompts that enter the last block are made of, as weights that add up to 1.

    Z_i = g_i Ẑ_i + (1 - g_i) Z_(i-1) gives the outputs Ẑ_l of block l the weight g_l · Π_(k > l) (1 - g_k), and the
    learned prompts Π_k (1 - g_k).

    Args:
        openings (`Mapping[int, float]`): g by the index of the block; blocks without a gate pass on their outputs.
        blocks (`int`): number of blocks.

    Returns:
        `blocks` weights: of the learned prompts, then of the outputs of every block but the last.
    """
    weights = [1.0]
    for index in range(blocks - 1):
        opening = openings.get(index, 1.0)
        weights = [weight * (1.0 - opening) for weight in weights] + [opening]
    return weights


def draw_gates(model: nn.Module, adapter_name: str | None = None) -> Figure:
    """Draw gate openings, the weights they give each block in the last prompts, and the temperatures.

    Args:
        model (`nn.Module`): a model with gated prompts.
        adapter_name (`str`): the adapter; default: the active one.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there are no scalar gates.
    """
    openings = gate_openings(model, adapter_name)
    shaped = temperatures(model, adapter_name)
    blocks = len(find_adapter(model, adapter_name).layout)
    weights = prompt_weights(openings, blocks)
    figure = new_figure(10.5 if shaped else 7.5, 3.2)
    panels = figure.subplots(1, 3 if shaped else 2)
    panels[0].bar([index + 1 for index in openings], list(openings.values()), color=ADAPTER)
    panels[0].set(title="gate", xlabel="block", ylabel="g", ylim=(0, max(1.05 * max(openings.values()), 0.02)))
    panels[1].bar(range(blocks), weights, color=ADAPTER)
    panels[1].set(title="share in the last block's prompts", xlabel="outputs of block (0: as learned)", ylim=(0, 1.02))
    if shaped:
        panels[2].plot([index + 1 for index in shaped], list(shaped.values()), marker="o", color=ADAPTER)
        panels[2].axhline(1.0, color="0.5", lw=1, ls=":")
        panels[2].set(title="attention temperature", xlabel="block", ylabel="τ")
    for ax in panels:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.locator_params(axis="x", integer=True)
    return figure
