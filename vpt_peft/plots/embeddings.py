"""Points in two dimensions: prompts among patch tokens, and what heads read, coloured by class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..encoder.trace import in_eval
from ..tuners.vpt.parameters import find_parameters
from .figures import COLORS, PATCHES, PROMPTS, new_figure
from .gates import find_adapter


if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECTIONS = ("pca", "tsne")


def project(points: torch.Tensor, method: str = "pca", seed: int = 0) -> torch.Tensor:
    """Return points `(count, width)` in two dimensions, `(count, 2)`.

    Args:
        points (`torch.Tensor`): the points.
        method (`str`): "pca" or "tsne".
        seed (`int`): of t-SNE.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: unknown method, or fewer than three points.
    """
    if method not in PROJECTIONS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(PROJECTIONS)}.")
    if len(points) < 3:
        raise ValueError(f"{len(points)} points are too few to project.")
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this needs scikit-learn: pip install 'vpt_peft[train]'.") from error
    values = points.detach().double().cpu().numpy()
    if method == "pca":
        found = PCA(n_components=2, svd_solver="full").fit_transform(values)
    else:
        perplexity = min(30.0, (len(points) - 1) / 3)
        found = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)
    return torch.from_numpy(found)


def draw_prompts(
    model: nn.Module,
    pixel_values: torch.Tensor,
    blocks: Sequence[int] | None = None,
    method: str = "pca",
    adapter_name: str | None = None,
) -> Figure:
    """Draw the prompts of blocks among the tokens that enter these blocks.

    Args:
        model (`nn.Module`): a model with prompts.
        pixel_values (`torch.Tensor`): images `(batch, channels, height, width)`.
        blocks (`Sequence[int]`): blocks with prompts of their own; default: up to four, spread evenly.
        method (`str`): "pca" or "tsne".
        adapter_name (`str`): the adapter; default: the active one.

    Raises:
        ModuleNotFoundError: matplotlib or scikit-learn is not installed.
        ValueError: a block has no prompts of its own, or prompts are not tokens.
    """
    adapter, owner = find_adapter(model, adapter_name), find_parameters(model)
    assert owner is not None
    own = [
        index
        for index, block in enumerate(adapter.layout)
        if block is not None and block.source is not None and block.mode != "add"
    ]
    chosen = (
        list(blocks) if blocks is not None else [own[round(i * (len(own) - 1) / 3)] for i in range(4)] if own else []
    )
    chosen = list(dict.fromkeys(chosen))
    wrong = [index for index in chosen if index not in own]
    if wrong or not chosen:
        raise ValueError(f"blocks={chosen} must be blocks with prompt tokens of their own: {own}.")
    entered = _tokens_entering(model, owner, pixel_values, chosen, adapter.name)
    figure = new_figure(3.0 * len(chosen), 3.2)
    for ax, index in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        layout = adapter.layout[index]
        with torch.no_grad():
            prompts = adapter.prompts(layout.source, 1)[0].float()  # type: ignore[union-attr]
        tokens = entered[index].flatten(0, -2).float()
        points = project(torch.cat([tokens.to(prompts.device), prompts]), method)
        for part, color, label in (
            (points[: len(tokens)], PATCHES, "tokens"),
            (points[len(tokens) :], PROMPTS, "prompts"),
        ):
            ax.scatter(part[:, 0], part[:, 1], s=10, color=color, label=label, linewidths=0)
        ax.set(title=f"block {index + 1}", xticks=[], yticks=[])
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    return figure


def _tokens_entering(
    model: nn.Module, owner: Any, pixel_values: torch.Tensor, blocks: Sequence[int], name: str
) -> dict[int, torch.Tensor]:
    """What enters blocks in a forward pass with one adapter, without its prompts."""
    found: dict[int, torch.Tensor] = {}
    handles = []
    for index in blocks:
        spec = owner.spec.blocks[index]
        block = owner.encoder.get_submodule(spec.path)

        def keep(_: nn.Module, args: tuple, kwargs: dict, index: int = index, argument: str = spec.argument) -> None:
            found[index] = (kwargs[argument] if argument else args[0]).detach()

        # First in line, before prompts come in
        handles.append(block.register_forward_pre_hook(keep, prepend=True, with_kwargs=True))
    try:
        with in_eval(model), torch.no_grad(), owner.call([name]):
            owner.encode(pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    return found


def embeddings(model: nn.Module, dataloader: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the model's head reads, and the labels.

    Args:
        model (`nn.Module`): a classifier with a linear head, prompted or not.
        dataloader (`Iterable`): batches with "pixel_values" and "labels".

    Returns:
        Features `(images, width)` and labels `(images,)`.

    Raises:
        ValueError: there is no linear layer with the model's number of classes.
    """
    labels_wanted = getattr(getattr(model, "config", None), "num_labels", None)
    heads = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == labels_wanted
    ]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no linear layer of {labels_wanted} outputs to look at.")
    seen: list[torch.Tensor] = []
    features, labels = [], []
    handles = [head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for head in heads]
    device = next(model.parameters()).device
    try:
        with in_eval(model), torch.no_grad():
            for batch in dataloader:
                seen.clear()
                model(pixel_values=batch["pixel_values"].to(device))
                features.append(seen[-1].float().cpu())
                labels.append(torch.as_tensor(batch["labels"]).cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(features), torch.cat(labels)


def draw_embeddings(
    points: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    names: Mapping[int, str] | None = None,
    method: str = "tsne",
) -> Figure:
    """Draw class embeddings, one panel for each method.

    Args:
        points (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): by title, features and labels as [`embeddings`]
            gives them.
        names (`Mapping[int, str]`): names of the classes for the legend; default: their numbers.
        method (`str`): "tsne" or "pca".

    Raises:
        ModuleNotFoundError: matplotlib or scikit-learn is not installed.
        ValueError: unknown method, or too few points.
    """
    figure = new_figure(3.2 * len(points), 3.6)
    classes = sorted({int(label) for _, labels in points.values() for label in labels})
    markers = "osD^vP*X"
    for ax, (title, (features, labels)) in zip(
        figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True
    ):
        flat = project(features, method)
        for place, label in enumerate(classes):
            mine = flat[labels == label]
            # Colour and shape together tell more classes apart than there are colours
            ax.scatter(
                mine[:, 0],
                mine[:, 1],
                s=12,
                color=COLORS[place % len(COLORS)],
                marker=markers[(place // len(COLORS)) % len(markers)],
                label=(names or {}).get(label, str(label)),
                linewidths=0,
            )
        ax.set(title=title, xticks=[], yticks=[])
    if len(classes) <= 20:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            *handles, loc="outside lower center", ncols=min(len(classes), 10), frameon=False, handletextpad=0.1
        )
    return figure
