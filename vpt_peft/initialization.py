"""Data-driven starts: prompts taken from what frozen blocks see of the training images.

Real tokens per block (Wang et al., "Revisiting the Power of Prompt for Visual Tuning", ICML 2024, arXiv 2402.02382) and
class-token features (Jia et al., ECCV 2022, appendix).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .encoder import submodule
from .encoder.inputs import IMAGE_INPUTS
from .encoder.trace import in_eval
from .tuners.vpt.layout import own_blocks
from .tuners.vpt.parameters import VPTParameters, find_parameters


METHODS = ("tokens", "class_token_final", "class_token_layerwise", "mean_pool", "kmeans")
# k-means looks at a uniform sample of this many tokens per prompt.
KMEANS_TOKENS_PER_PROMPT = 64


class Reservoir:
    """A uniform sample of `size` rows of a stream of any length, in memory of `size` rows.

    Each row gets a random key and the rows with the largest keys stay.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0)
        self.rows = torch.empty(0)
        self.seen = 0

    def add(self, rows: torch.Tensor) -> None:
        """Offer rows `(count, width)`."""
        keys = torch.rand(rows.shape[0], generator=self.generator, dtype=torch.float64)
        self.seen += rows.shape[0]
        if self.keys.numel() == 0:
            self.keys, self.rows = keys[:0], rows[:0]
        keys = torch.cat([self.keys.to(keys.dtype), keys])
        kept = keys.topk(min(self.size, keys.numel())).indices
        mine, theirs = kept[kept < len(self.keys)], kept[kept >= len(self.keys)] - len(self.keys)
        self.rows = torch.cat([self.rows[mine], rows[theirs.to(rows.device)].float().cpu()])
        self.keys = keys[torch.cat([mine, theirs + len(self.keys)])]


def initialize_prompts(
    model: nn.Module,
    dataloader: Iterable[Any],
    method: str = "tokens",
    adapter_name: str = "default",
    seed: int = 0,
) -> None:
    """Start the prompts of an adapter from training images, by forward passes of the frozen encoder.

    Args:
        model: A model with a prompt adapter.
        dataloader: Batches of images: mappings with the encoder's arguments (others are left out), tuples whose first
            element is the images, or image tensors. Every batch is used once; memory does not grow with their number.
        method: "tokens": for each block, a uniform sample of the patch tokens it receives; "class_token_final": class
            tokens of the last block's output; "class_token_layerwise": class tokens each block receives; "mean_pool":
            means over each image's patch tokens; "kmeans": k-means centres of the patch tokens (needs scikit-learn).
        adapter_name: The adapter.
        seed: Of the sampling. The same data in the same order gives the same prompts.

    Raises:
        ValueError: The method is unknown, there is no such adapter, its prompts are not tokens of the blocks' width, the
            encoder has no class token, or there are fewer samples than prompts. Nothing is changed then.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}.")
    parameters = find_parameters(model)
    if parameters is None or adapter_name not in parameters.configs:
        known = "none" if parameters is None else ", ".join(map(repr, parameters.configs)) or "none"
        raise ValueError(f"adapter_name={adapter_name!r} is not a prompt adapter of this model; it has: {known}.")
    config = parameters.configs[adapter_name]
    if config.prompt_location != "prepend" or config.projection_dim or config.project_patches:
        raise ValueError(
            "initialize_prompts needs prompts that are tokens of the blocks' own width: prompt_location='prepend' without "
            "a projection."
        )
    if method.startswith("class_token") and not parameters.spec.special:
        raise ValueError(f"method={method!r}: this encoder has no class token; use 'tokens', 'mean_pool' or 'kmeans'.")
    keys = [str(index) for index in own_blocks(parameters.layouts[adapter_name])]
    if method == "class_token_final" and len({parameters.spec.blocks[int(key)].width for key in keys}) > 1:
        raise ValueError("method='class_token_final': the blocks' widths differ; use 'tokens'.")
    count = config.num_virtual_tokens
    size = count * KMEANS_TOKENS_PER_PROMPT if method == "kmeans" else count
    reservoirs = {key: Reservoir(size, seed + int(key)) for key in keys}
    _fill(parameters, reservoirs, dataloader, method)
    starts = {key: _choose(reservoir, count, method, seed) for key, reservoir in reservoirs.items()}
    prompts: Any = parameters.adapter(adapter_name).parts["prompts"]
    for key, rows in starts.items():
        weight = prompts[key]
        with torch.no_grad():
            weight.copy_(rows.to(weight.device, weight.dtype))


def _choose(reservoir: Reservoir, count: int, method: str, seed: int) -> torch.Tensor:
    if reservoir.seen < count:
        raise ValueError(
            f"the dataloader gave {reservoir.seen} samples per block for num_virtual_tokens={count} prompts; give more "
            "images, or use method='tokens', which draws many samples per image."
        )
    if method != "kmeans":
        return reservoir.rows
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("method='kmeans' needs scikit-learn: pip install scikit-learn") from error
    fitted = KMeans(n_clusters=count, random_state=seed, n_init=1).fit(reservoir.rows.double().numpy())
    return torch.from_numpy(fitted.cluster_centers_)


def _samples(parameters: VPTParameters, hidden: torch.Tensor, method: str) -> torch.Tensor:
    """Rows `(samples, width)` of a block's input or output."""
    if method.startswith("class_token"):
        return hidden[:, parameters.spec.special[0]]
    if hidden.dim() == 3 and parameters.spec.special:
        patches = [index for index in range(hidden.shape[1]) if index not in set(parameters.spec.special)]
        hidden = hidden[:, patches]
    if method == "mean_pool":
        return hidden.flatten(1, -2).mean(1)
    return hidden.flatten(0, -2)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    states = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer._disable_adapters = state


def _fill(parameters: VPTParameters, reservoirs: dict[str, Reservoir], dataloader: Iterable[Any], method: str) -> None:
    encoder, handles = parameters.encoder, []

    def watch_input(reservoir: Reservoir, argument: str | None) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            reservoir.add(_samples(parameters, kwargs[argument] if argument else args[0], method))

        return hook

    def watch_output(module: nn.Module, args: tuple, output: Any) -> None:
        rows = _samples(parameters, output[0] if isinstance(output, tuple) else output, method)
        for reservoir in reservoirs.values():
            reservoir.add(rows)

    if method == "class_token_final":
        handles.append(submodule(encoder, parameters.spec.blocks[-1].path).register_forward_hook(watch_output))
    else:
        for key, reservoir in reservoirs.items():
            block = parameters.spec.blocks[int(key)]
            hook = watch_input(reservoir, block.argument)
            handles.append(submodule(encoder, block.path).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with in_eval(encoder), torch.no_grad(), _without_adapters(parameters.root):
            for batch in dataloader:
                encoder(**_encoder_arguments(parameters, batch))
    finally:
        for handle in handles:
            handle.remove()


def _encoder_arguments(parameters: VPTParameters, batch: Any) -> dict[str, Any]:
    accepted = signature(parameters.encoder.forward).parameters
    main = next((name for name in IMAGE_INPUTS if name in accepted), IMAGE_INPUTS[0])
    if isinstance(batch, torch.Tensor):
        batch = {main: batch}
    elif isinstance(batch, (tuple, list)):
        batch = {main: batch[0]}
    if not isinstance(batch, Mapping) or main not in batch:
        raise ValueError(f"a batch must be images, a tuple that begins with images, or a mapping with {main!r}.")
    device, dtype = parameters.device_and_dtype()
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
        if name in accepted
    }
