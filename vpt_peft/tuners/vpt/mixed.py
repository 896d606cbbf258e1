"""One batch, many adapters: which rows belong to which adapter, and prompts of different lengths side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vpt_peft.active import BASE
from vpt_peft.encoder.inputs import IMAGE_INPUTS
from vpt_peft.fields import refuse

from .config import VPTConfig


class MixedBatch:
    """The adapters of the images of one batch.

    Args:
        names: One adapter name per image; "__base__" for none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.adapters = [name for name in dict.fromkeys(names) if name != BASE]
        self._rows: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._index: dict[tuple, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def rows(self, name: str, device: torch.device) -> torch.Tensor:
        """Indices of an adapter's images."""
        key = (name, device)
        if key not in self._rows:
            found = [row for row, owner in enumerate(self.names) if owner == name]
            self._rows[key] = torch.tensor(found, dtype=torch.long, device=device)
        return self._rows[key]

    def _places(self, shapes: tuple[tuple[str, int, int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each image's prompts are among all of them, and which of these places hold no prompt."""
        longest = max(length for _, _, length in shapes)
        places = torch.zeros(len(self.names), longest, dtype=torch.long)
        empty = torch.ones(len(self.names), longest, dtype=torch.bool)
        start = 0
        for name, sets, length in shapes:
            images = [row for row, owner in enumerate(self.names) if owner == name]
            for number, row in enumerate(images):
                first = start + (number * length if sets > 1 else 0)
                places[row, :length] = torch.arange(first, first + length)
                empty[row, :length] = False
            start += sets * length
        return places, empty

    def spread(self, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts side by side.

        Args:
            parts: Prompts per adapter: `(1, prompts, width)`, or one set per image of the adapter.

        Returns:
            Prompts per image, `(batch, longest, width)`, and a boolean mask `(batch, longest)` of the places that hold
            none, `None` if all are taken.
        """
        shapes = tuple((name, part.shape[0], part.shape[1]) for name, part in parts.items())
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts.values()])
        key = (shapes, flat.device)
        if key not in self._index:
            places, empty = self._places(shapes)
            hidden = empty.to(flat.device) if bool(empty.any()) else None
            self._index[key] = places.to(flat.device), hidden
        places, hidden = self._index[key]
        return flat[places], hidden


def spread_heads(mixed: MixedBatch, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys or values per adapter `(sets, heads, prompts, head_dim)` spread over the images of a mixed batch."""
    heads = next(iter(parts.values())).shape[1]
    spread, hidden = mixed.spread({name: part.transpose(1, 2).flatten(2) for name, part in parts.items()})
    return spread.unflatten(-1, (heads, -1)).transpose(1, 2), hidden


def additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An additive attention mask `(batch, 1, 1, places)` from a boolean one `(batch, places)`."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


def for_images_of(mixed: MixedBatch | None, name: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`after` for the images of one adapter, `before` for the others of a mixed batch; both `(batch, ...)`."""
    if mixed is None:
        return after
    rows = mixed.rows(name, before.device)
    return before.index_copy(0, rows, after[rows])


def per_image(mixed: MixedBatch | None, name: str, temperature: torch.Tensor) -> torch.Tensor:
    """A temperature `(1,)`, in a mixed batch as `(batch,)` with 1 for the images of other adapters."""
    if mixed is None:
        return temperature
    rows = mixed.rows(name, temperature.device)
    ones = temperature.new_ones(len(mixed.names))
    return ones.index_copy(0, rows, temperature.expand(len(rows)))


def check_mixed_batch(
    names: object,
    configs: Mapping[str, VPTConfig],
    known: Sequence[str],
    training: bool,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[str, ...]:
    """The adapter names of a call of the model, checked.

    Args:
        names: What the caller gave, one adapter name per image.
        configs: The prompt adapters of the model.
        known: All adapters of the model.
        training: Whether the model is in training mode.
        args, kwargs: The call's other arguments.

    Raises:
        TypeError: Not a list of names.
        ValueError: A name is unknown, their number is not that of the images, labels are given, or an adapter changes
            the whole image.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names={names!r} must be a list with one adapter name per image.")
    images = next((kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None), args[0] if args else None)
    count = images.shape[0] if isinstance(images, torch.Tensor) else len(names)
    unknown = sorted(set(names) - set(known) - {BASE})
    whole = [n for n in set(names) & set(configs) if configs[n].prompt_location in ("pad", "channel")]
    refuse(
        (training, "adapter_names is for inference: call model.eval() first."),
        (unknown,
         f"adapter_names holds {unknown}, but the model's adapters are {sorted(known)} (and '{BASE}' for none)."),
        (len(names) != count,
         f"adapter_names has {len(names)} names for {count} images; give one per image. nn.DataParallel splits images "
         "but not names: start one process per GPU (torchrun) instead."),
        (kwargs.get("labels") is not None,
         "labels: a mixed batch (adapter_names) has no common loss; leave them out."),
        (whole, f"adapter_names: {whole} change the whole image; run their images in a batch of their own."),
    )  # fmt: skip
    return tuple(names)
