"""Features cached on disk: a memory-mapped array per data split, named after everything it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data.splits import dataset_fingerprint
from ..methods.structure import Classifier, base_model, find_head
from ..tasks import Task
from .features import FEATURES, SplitPoint
from .optim import split_trainable


class FeaturesTooLarge(OSError):
    """There is no room for the features."""


class CachedFeatures(Dataset):
    """Cached features with their targets: {"cached_features": (..., hidden)} and the targets of the task.

    Args:
        path: the array.
        targets: one mapping per image.
    """

    def __init__(self, path: Path, targets: Sequence[Mapping[str, Any]]) -> None:
        self.features = np.load(path, mmap_mode="r")
        self.targets = list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {FEATURES: torch.from_numpy(self.features[index].copy()), **self.targets[index]}


class FeatureCache:
    """Stores the features at a split point, under a name made from everything they depend on.

    Args:
        model (`Classifier`): the model that trains, in the state it starts with.
        split_point (`SplitPoint`): where its frozen part ends.
        preprocessing (`Mapping`): what was done to the images, JSON-able.
        folder (`Path`): where the arrays go.
        limit_bytes (`int`): most bytes that folder may hold.
        autocast (`torch.dtype`, *optional*): the dtype the forward pass runs in under autocast.
    """

    def __init__(
        self,
        model: Classifier,
        split_point: SplitPoint,
        preprocessing: Mapping[str, Any],
        folder: Path,
        limit_bytes: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.split_point, self.folder = model, split_point, folder
        self.limit_bytes, self.autocast = limit_bytes, autocast
        self._key = {
            "model": _frozen_hash(model),
            "split_point": split_point.name,
            "preprocessing": preprocessing,
            "dtype": str(autocast or torch.float32),
            "versions": [torch.__version__, transformers.__version__],
        }

    def store(self, split: datasets.Dataset, transformed: datasets.Dataset, task: Task) -> CachedFeatures:
        """Return the split's features, computed now unless an earlier run of the same key did.

        Args:
            split: images and targets as read; gives the fingerprint and the targets.
            transformed: the same images as model input.
            task: makes batches of `transformed`.

        Raises:
            FeaturesTooLarge: they would exceed the limit or the free space; sizes and folder are named.
            ValueError: the split point ran more than once.
        """
        key = {**self._key, "dataset": dataset_fingerprint(split), "rows": len(split)}
        text = json.dumps(key, sort_keys=True, default=str)
        entry = self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        path = entry / "features.npy"
        if not path.is_file():
            self._compute(transformed, task, entry, text)
        elif (entry / "key.json").read_text(encoding="utf-8") != text:
            raise OSError(f"cached features in {entry} belong to another run; delete that folder.")
        os.utime(entry)
        return CachedFeatures(path, task.targets(split))

    def _compute(self, rows: datasets.Dataset, task: Task, entry: Path, key: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        device = next(self.model.parameters()).device
        scratch = Path(tempfile.mkdtemp(prefix=".computing-", dir=self.folder))
        try:
            array, start = None, 0
            for batch in DataLoader(rows, batch_size=32, collate_fn=task.collate):
                features = self._features(batch["pixel_values"].to(device)).float().cpu().numpy()
                if array is None:
                    shape = (len(rows), *features.shape[1:])
                    self._make_space(int(np.prod(shape)) * 4)
                    array = np.lib.format.open_memmap(scratch / "features.npy", "w+", np.float32, shape)
                array[start : start + len(features)] = features
                start += len(features)
            assert array is not None
            array.flush()
            (scratch / "key.json").write_text(key, encoding="utf-8")
            try:
                os.rename(scratch, entry)
            except OSError:
                # Another process was faster
                if not entry.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else next(iter(kwargs.values())))

        # First among the hooks, so that prompts of the same block are not yet there
        handle = self.split_point.module.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(pixel_values.device.type, self.autocast, self.autocast is not None):
                self.model(pixel_values=pixel_values)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ValueError(f"{self.split_point.name} ran {len(caught)} times")
        return caught[0]

    def _make_space(self, needed: int) -> None:
        """Delete what was used longest ago until the limit is kept."""
        entries = sorted((path for path in self.folder.iterdir() if path.name[0] != "."), key=_last_use)
        sizes = {entry: sum(path.stat().st_size for path in entry.iterdir()) for entry in entries}
        if needed > self.limit_bytes:
            raise FeaturesTooLarge(
                f"cached features need {needed / 1e9:.3g} GB, and feature_cache_limit_gb allows "
                f"{self.limit_bytes / 1e9:.3g} GB"
            )
        while entries and sum(sizes.values()) + needed > self.limit_bytes:
            oldest = entries.pop(0)
            shutil.rmtree(oldest, ignore_errors=True)
            del sizes[oldest]
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise FeaturesTooLarge(
                f"cached features need {needed / 1e9:.3g} GB, and {self.folder} has {free / 1e9:.3g} GB free"
            )


def _last_use(entry: Path) -> float:
    return entry.stat().st_mtime


def default_cache_dir() -> Path:
    """`vpt_peft/features` in the Hugging Face cache folder."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "vpt_peft" / "features"


def _frozen_hash(model: Classifier) -> str:
    """A hash of the frozen weights outside the head, and of the config but for its labels."""
    base = base_model(model)
    digest = hashlib.sha256(type(base).__name__.encode())
    config = base.config.to_dict()
    for name in ("id2label", "label2id", "num_labels", "_name_or_path"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    trained = {id(p) for group in split_trainable(model).values() for p in group.values()}
    of_head = {id(p) for module in find_head(base).values() for p in module.parameters()}
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        if id(tensor) not in trained and id(tensor) not in of_head:
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
