"""Data-driven starts: prompts taken from what frozen blocks see of the training images.

Real tokens per block (Wang et al., "Revisiting the Power of Prompt for Visual Tuning", ICML 2024, arXiv 2402.02382) and
class-token features (Jia et al., ECCV 2022, appendix), and VIPAMIN, which matches drawn prompts with tokens and adds
directions that the attention does not have (NeurIPS 2025, arXiv 2510.16446).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import project
from .encoder import submodule
from .encoder.inputs import IMAGE_INPUTS
from .encoder.projections import apply_projection
from .encoder.trace import in_eval, random_state_kept
from .tuners.vpt.layout import own_blocks, prompt_counts
from .tuners.vpt.parameters import VPTParameters, find_parameters


METHODS = ("tokens", "class_token_final", "class_token_layerwise", "mean_pool", "kmeans", "vipamin")
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
    neighbors: int = 8,
    orthogonal: float = 0.3,
) -> None:
    """Start the prompts of an adapter from training images, by forward passes of the frozen encoder.

    Args:
        model: A model with a prompt adapter.
        dataloader: Batches of images: mappings with the encoder's arguments (others are left out), tuples whose first
            element is the images, or image tensors. Every batch is used once; memory does not grow with their number.
            Positions are interpolated to images of another size than the encoder's.
        method: "tokens": for each block, a uniform sample of the patch tokens it receives; "class_token_final": class
            tokens of the last block's output; "class_token_layerwise": class tokens each block receives; "mean_pool":
            means over each image's patch tokens; "kmeans": k-means centres of the patch tokens (needs scikit-learn);
            "vipamin": random prompts of the first prompted block go to tokens whose keys are like theirs and to
            directions that the block's attention does not give, the others stay; about 256 images are enough.
        adapter_name: The adapter.
        seed: Of what is sampled or drawn. The same data in the same order gives the same prompts.
        neighbors: For "vipamin", of how many tokens a prompt becomes the mean (the paper tries 2, 8, 32 and 128).
        orthogonal: For "vipamin", the share λ in [0, 1] of the part orthogonal to the attention's outputs.

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
    adapter = parameters.adapter(adapter_name)
    own, counts = own_blocks(parameters.layouts[adapter_name]), prompt_counts(config, parameters.spec)
    if method == "class_token_final" and len({parameters.spec.blocks[index].width for index in own}) > 1:
        raise ValueError("method='class_token_final': the blocks' widths differ; use 'tokens'.")
    if method == "vipamin":
        device, dtype = parameters.device_and_dtype()
        with random_state_kept(parameters.encoder, seed=seed):
            parts = adapter.make_parts(parameters, config, adapter.layout, {"device": device, "dtype": dtype})
        drawn = type(adapter)(parameters, adapter_name, config, adapter.layout, parts).own_prompts(str(own[0]))
        start = _vipamin(parameters, drawn.detach(), own[0], dataloader, neighbors, orthogonal)
        adapter.set_prompts(str(own[0]), start)
        return
    factor = KMEANS_TOKENS_PER_PROMPT if method == "kmeans" else 1
    reservoirs = {index: Reservoir(counts[index] * factor, seed + index) for index in own}
    _fill(parameters, reservoirs, dataloader, method)
    starts = {index: _choose(reservoir, counts[index], method, seed) for index, reservoir in reservoirs.items()}
    for index, rows in starts.items():
        adapter.set_prompts(str(index), rows)


def _vipamin(
    parameters: VPTParameters,
    prompts: torch.Tensor,
    index: int,
    dataloader: Iterable[Any],
    neighbors: int,
    orthogonal: float,
) -> torch.Tensor:
    """(1 - λ) p_avg + λ p_orth for the prompts p of one block, `(prompts, width)`.

    p_avg is the mean of the patch tokens, averaged over images, whose keys are nearest to the key of p by cosine; keys
    are averaged over images and heads. With an orthonormal basis Q of the rows of the attention's mean output,
    p_orth = ((I - Q Qᵀ)(W_V p + b_V) - b_V) W_V⁺.
    """
    spec = parameters.spec.blocks[index]
    attention, special = spec.attention, set(parameters.spec.special)
    if neighbors < 1 or not 0.0 <= orthogonal <= 1.0:
        raise ValueError(f"neighbors={neighbors} must be at least 1, orthogonal={orthogonal} a share from 0 to 1.")
    if not spec.takes_tokens or attention.key is None or attention.value is None or attention.out is None:
        raise ValueError("method='vipamin' needs one sequence of tokens and attention that is known; use 'tokens'.")
    block = submodule(parameters.encoder, spec.path)
    module = submodule(block, attention.path)
    sums: dict[str, torch.Tensor] = {}
    seen = 0

    def add(name: str, rows: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + rows.double().sum(0)

    def see_tokens(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal seen
        hidden = kwargs[spec.argument] if spec.argument else args[0]
        hidden = hidden[:, [position for position in range(hidden.shape[1]) if position not in special]]
        seen += len(hidden)
        add("tokens", hidden)
        add("keys", project(block, attention, hidden, "key")[0].mean(1))

    def see_attention(module: nn.Module, args: tuple) -> None:
        add("outputs", args[0])

    handles = [
        block.register_forward_pre_hook(see_tokens, with_kwargs=True),
        submodule(module, attention.out).register_forward_pre_hook(see_attention),
    ]
    _run_frozen(parameters, dataloader, handles)
    if not seen or neighbors > len(sums["tokens"]):
        count = len(sums["tokens"]) if seen else 0
        raise ValueError(f"neighbors={neighbors} is more than the {count} patch tokens of an image.")
    tokens, keys, outputs = (sums[name] / seen for name in ("tokens", "keys", "outputs"))
    with torch.no_grad():
        unit = torch.eye(prompts.shape[1], device=prompts.device, dtype=prompts.dtype)
        values = apply_projection(module, attention.value, torch.cat([unit[:1] * 0.0, unit, prompts]), attention.heads)
        values = values.transpose(0, 1).flatten(1).double()
        bias, weight = values[0], values[1 : len(unit) + 1] - values[0]
        own_keys = project(block, attention, prompts[None], "key")[0][0].mean(0).double()
        like = nn.functional.cosine_similarity(own_keys[:, None], keys[None], dim=-1)
        average = tokens[like.topk(neighbors).indices].mean(1)
        _, scale, basis = torch.linalg.svd(outputs, full_matrices=False)
        basis = basis[scale > scale[0] * max(outputs.shape) * torch.finfo(prompts.dtype).eps]
        rest = values[len(unit) + 1 :]
        rest = rest - rest @ basis.T @ basis - bias
        return (1.0 - orthogonal) * average + orthogonal * rest @ torch.linalg.pinv(weight)


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


def _fill(parameters: VPTParameters, reservoirs: dict[int, Reservoir], dataloader: Iterable[Any], method: str) -> None:
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
        for index, reservoir in reservoirs.items():
            block = parameters.spec.blocks[index]
            hook = watch_input(reservoir, block.argument)
            handles.append(submodule(encoder, block.path).register_forward_pre_hook(hook, with_kwargs=True))
    _run_frozen(parameters, dataloader, handles)


def _run_frozen(parameters: VPTParameters, dataloader: Iterable[Any], handles: Iterable[Any]) -> None:
    """Run the encoder without adapters over all batches, and remove hooks afterwards."""
    encoder = parameters.encoder
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
    if "interpolate_pos_encoding" in accepted and tuple(batch[main].shape[-2:]) != parameters.spec.image_size:
        batch = {"interpolate_pos_encoding": True, **batch}
    device, dtype = parameters.device_and_dtype()
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
        if name in accepted
    }
