"""Load a model of transformers for a task, with a fresh head where the checkpoint has none for these classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..methods.structure import find_head


def load_pretrained(
    loader: Any, path: str, config: Any, id2label: Mapping[int, str], source: Mapping[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """Load a model in float32 with a head for `id2label`.

    Args:
        loader: class of transformers with `from_pretrained`.
        path: Hub id or folder.
        config: the checkpoint's configuration; it gets the classes.
        id2label: the classes.
        source: `revision`, `token` and `cache_dir`.

    Returns:
        The model, and the names of the head's weights that the checkpoint does not hold.

    Raises:
        ValueError: weights other than the head's are missing or have another shape than the configuration says.
        OSError: there is no such model.
    """
    config.id2label, config.label2id = dict(id2label), {name: number for number, name in id2label.items()}
    with quiet_loading():
        model, info = loader.from_pretrained(
            path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **source
        )
    head = find_head(model)
    # Buffers whose shape follows from the classes, such as the weights of a loss, have their values from there too
    fitted = {mismatch[0] for mismatch in info["mismatched_keys"]} - {name for name, _ in model.named_buffers()}
    drawn = {*info["missing_keys"], *fitted}
    wrong = sorted(key for key in drawn if not any(key == name or key.startswith(f"{name}.") for name in head))
    if wrong:
        raise ValueError(
            f"model_name_or_path={path!r} does not hold the backbone's weights {', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''}; choose a checkpoint that fits its config.json."
        )
    return model, drawn


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' table of weights that do not fit: a new head is expected, anything else is raised."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
