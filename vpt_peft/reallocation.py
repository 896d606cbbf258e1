"""Moving prompts between blocks by what the loss says (Shang et al., PRO-VPT, ICCV 2025, arXiv 2503.06901)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .encoder import submodule
from .encoder.trace import in_eval
from .tuners.vpt.forward_pass import current_pass
from .tuners.vpt.layout import own_blocks, prompt_counts
from .tuners.vpt.parameter_set import ParameterSet
from .tuners.vpt.parameters import VPTParameters, find_parameters


def reallocate_prompts(
    model: Any, dataloader: Iterable[Any], adapter_name: str = "default", moves: int = 1
) -> dict[int, int]:
    """Move prompts that do harm to the block where prompts help most.

    The score of a prompt p is gᵀp with the gradient g of the loss, summed over batches: to first order, what the loss
    loses without p. The prompt with the largest positive score goes, as it is, to the block whose prompts have the lowest
    mean score; no block gives its last prompt away. The parameters are made anew, so make a new optimizer afterwards.

    Layer norm undoes the scale of a deep prompt, but for its epsilon. Where that leaves nothing of gᵀp above rounding,
    p and g are those of the normed prompt, which the attention sees.

    Args:
        model: A model with a loss and an active adapter of deep prompts.
        dataloader: Batches with labels: mappings with the model's arguments, or pairs of images and labels.
        adapter_name: The adapter.
        moves: The largest number of prompts to move.

    Returns:
        The number of prompts of each prompted block, which becomes the configuration's `num_virtual_tokens`.

    Raises:
        ValueError: There is no such adapter or it is not active, its prompts cannot move, or the model gives no loss.
            Nothing is changed then.
    """
    parameters = find_parameters(model)
    if parameters is None or adapter_name not in parameters.active_names():
        raise ValueError(f"adapter_name={adapter_name!r} is not an active prompt adapter of this model.")
    config, own = parameters.configs[adapter_name], own_blocks(parameters.layouts[adapter_name])
    widths = {parameters.spec.blocks[index].width for index in own}
    if config.prompt_location != "prepend" or config.prompt_rank is not None or len(own) < 2 or len(widths) > 1:
        raise ValueError(
            "reallocate_prompts needs prompt tokens in several blocks of one width, without prompt_rank and share_prompts."
        )
    if moves < 1:
        raise ValueError(f"moves={moves} must be at least 1.")
    prompts: Any = parameters.adapter(adapter_name).parts["prompts"]
    scores = _scores(model, parameters, adapter_name, {index: prompts[str(index)] for index in own}, dataloader)
    goal = min(own, key=lambda index: float(scores[index].mean()))
    rows = {index: list(prompts[str(index)].detach()) for index in own}
    for _ in range(moves):
        givers = [index for index in own if index != goal and len(rows[index]) > 1]
        source = max(givers, key=lambda index: float(scores[index].max()), default=goal)
        if source == goal or float(scores[source].max()) <= 0.0:
            break
        worst = int(scores[source].argmax())
        rows[goal].append(rows[source].pop(worst))
        scores[source] = torch.cat([scores[source][:worst], scores[source][worst + 1 :]])
    _replace(parameters, adapter_name, {str(index): torch.stack(rows[index]) for index in own})
    counts = prompt_counts(config, parameters.spec) | {index: len(rows[index]) for index in own}
    config.num_virtual_tokens = list(counts.values())
    return counts


def _scores(
    model: Any,
    parameters: VPTParameters,
    name: str,
    prompts: dict[int, nn.Parameter],
    dataloader: Iterable[Any],
) -> dict[int, torch.Tensor]:
    """Sum of gᵀp over the batches, `(prompts,)` for each block."""
    trained = {index: parameter.requires_grad for index, parameter in prompts.items()}
    plain = {index: parameter.detach().new_zeros(len(parameter)) for index, parameter in prompts.items()}
    normed = {index: torch.zeros_like(score) for index, score in plain.items()}
    most, is_empty, is_normed = 0.0, True, False
    try:
        for parameter in prompts.values():
            parameter.requires_grad_(True)
        with in_eval(model), torch.enable_grad(), _gates_behind_norms(parameters, name) as gates:
            for batch in dataloader:
                gates.clear()
                loss, is_empty = _loss(model, parameters, batch), False
                gradients = torch.autograd.grad(loss, [*prompts.values(), *gates.values()])
                for (index, parameter), gradient in zip(prompts.items(), gradients, strict=False):
                    product = gradient * parameter.detach()
                    plain[index] += product.sum(-1)
                    most = max(most, float(product.norm(dim=-1).max()))
                for index, gradient in zip(gates, gradients[len(prompts) :], strict=True):
                    normed[index] += gradient.squeeze(-1)
                is_normed = len(gates) == len(prompts)
    finally:
        for index, parameter in prompts.items():
            parameter.requires_grad_(trained[index])
    if is_empty:
        raise ValueError("dataloader: it gives no batches.")
    largest = max(float(score.abs().max()) for score in plain.values())
    is_rounding = largest <= 100.0 * torch.finfo(next(iter(plain.values())).dtype).eps * most
    return normed if is_normed and is_rounding else plain


def _loss(model: Any, parameters: VPTParameters, batch: Any) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        batch = dict(zip(("pixel_values", "labels"), batch, strict=True))
    device, dtype = parameters.device_and_dtype()
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    moved = {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in tensors.items()}
    loss = getattr(model(**{**batch, **moved}), "loss", None)
    if loss is None:
        raise ValueError("reallocate_prompts needs a loss: give batches with labels to a model with a head.")
    return loss


@contextmanager
def _gates_behind_norms(parameters: VPTParameters, name: str) -> Iterator[dict[int, torch.Tensor]]:
    """Factors of one, `(prompts, 1)`, on what norms make of an adapter's key/value prompts; gᵀp is their gradient."""
    gates: dict[int, torch.Tensor] = {}
    handles = []
    for layer in parameters.layers:

        def gate(
            module: nn.Module, args: tuple, output: torch.Tensor, index: int = layer.index
        ) -> torch.Tensor | None:
            running = current_pass(parameters)
            if running is None or running.projecting is None or running.projecting.name != name:
                return None
            gates[index] = output.new_ones((output.shape[-2], 1)).requires_grad_(True)
            return output * gates[index]

        if layer.spec.attention.norm is not None:
            norm = submodule(layer.block, layer.spec.attention.norm)
            handles.append(norm.register_forward_hook(gate))
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _replace(parameters: VPTParameters, name: str, values: dict[str, torch.Tensor]) -> None:
    adapter = parameters.adapter(name)
    old: Any = adapter.parts["prompts"]
    first = old[next(iter(old))]
    made = ParameterSet({key: tuple(v.shape) for key, v in values.items()}, device=first.device, dtype=first.dtype)
    with torch.no_grad():
        for key, value in values.items():
            made[key].copy_(value)
    made.train(old.training).requires_grad_(first.requires_grad)
    getattr(parameters, f"{adapter.prefix}prompts")[name] = made
