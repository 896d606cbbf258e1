"""Read a trained folder or Hub id back, evaluate it on a split, and predict images to a table."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, EvalPrediction

from ..files import RUN_RECORD
from ..methods.structure import Classifier, base_model
from .arguments import ModelArguments
from .data import DataArguments, DataError, load_image_dataset
from .hub import PUSHED
from .metrics import compute_metrics
from .model import build_baseline, load_backbone, load_image_processor, resolve_model_path
from .saving import load_trained, read_baseline_spec
from .transforms import ImageError, build_transform, collate_fn, to_rgb


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def local_folder(
    path_or_id: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Path:
    """The folder itself, or the Hub id's files fetched into the cache; without a network the cached ones are used.

    Raises:
        OSError: no such folder or Hub id, or neither network nor cached files.
        ValueError: it is neither a folder nor a well-formed Hub id.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        patterns = [f"{subfolder}/{pattern}" for pattern in PUSHED] if subfolder else list(PUSHED)
        try:
            fetched = snapshot_download(
                str(path_or_id), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=patterns
            )
        except OSError as error:
            raise OSError(f"{str(path_or_id)!r} is no folder, and cannot be fetched from the Hub: {error}") from error
        folder = Path(fetched)
    return folder / subfolder if subfolder else folder


def load_adapter_model(
    path_or_id: str | Path,
    base_model: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> tuple[Classifier, Any]:
    """Load whatever `train` saved, of any method, with its backbone, label names and image processor, in eval mode.

    Args:
        path_or_id: folder or Hub id of the adapter.
        base_model: backbone to use in place of the one it was trained on, a folder or Hub id.
        revision: branch, tag or commit of the adapter's repository.
        subfolder: folder inside of it.
        token: Hub token.
        cache_dir: where Hub downloads are kept.

    Returns:
        The model and its image processor.

    Raises:
        OSError: folder, Hub id or backbone cannot be found.
        ValueError: the folder holds no adapter, or weights that do not fit the backbone.
    """
    folder = local_folder(path_or_id, revision, subfolder, token, cache_dir)
    check_files(folder)
    source = {"token": token, "cache_dir": cache_dir}
    spec = read_baseline_spec(folder)
    model: Classifier
    if spec is None:
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{str(path_or_id)!r} holds no adapter_config.json; give the output folder of a training."
            )
        import vpt_peft  # noqa: F401 - registers the methods, which PeftConfig looks up by name

        config = PeftConfig.from_pretrained(str(folder))
        backbone = ModelArguments(base_model or config.base_model_name_or_path, config.revision, **source)
        base = load_backbone(backbone, _labels(folder, backbone))
        try:
            model = PeftModel.from_pretrained(base, str(folder))
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {str(path_or_id)!r} do not fit the backbone {backbone.model_name_or_path!r} with "
                f"{base.config.num_labels} labels: {str(error).splitlines()[-1].strip()} Check base_model, and that "
                "the folder has its config.json with the labels."
            ) from error
    elif spec.method == "full":
        backbone = ModelArguments(base_model or spec.base_model_name_or_path, spec.revision, **source)
        model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    else:
        backbone = ModelArguments(base_model or spec.base_model_name_or_path, spec.revision, **source)
        model = build_baseline(load_backbone(backbone, _labels(folder, backbone)), spec)
        load_trained(model, folder)
    has_processor = (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
    processor = AutoImageProcessor.from_pretrained(folder) if has_processor else load_image_processor(backbone)
    return model.eval(), processor


def check_files(folder: Path) -> None:
    """Read every JSON file and the head of every weights file, so that a damaged one is named.

    Raises:
        FileNotFoundError: there is an adapter_config.json, but no weights.
        ValueError: a file is damaged.
    """
    for path in sorted(folder.glob("*.json")):
        _parse(path)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again, or repeat the training.") from error
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("adapter_model.*")):
        raise FileNotFoundError(f"{folder} has an adapter_config.json, but no adapter_model.safetensors beside it.")


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); download it again, or repeat the training.") from error


def move_to(model: Classifier, device: str) -> Classifier:
    """Move the model to a device and return it.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return model.to(device)  # type: ignore[arg-type, return-value]
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used ({str(error).splitlines()[0]}); cpu always can."
        ) from error


def _labels(folder: Path, backbone: ModelArguments) -> dict[int, str]:
    """Label names of the adapter folder's config.json, else of the backbone's."""
    if not (folder / "config.json").is_file():
        logger.warning("%s has no config.json; label names and their number are taken from the backbone.", folder)
        source = resolve_model_path(backbone.model_name_or_path)
        config = AutoConfig.from_pretrained(source, token=backbone.token, cache_dir=backbone.cache_dir)
    else:
        config = AutoConfig.from_pretrained(folder)
    return dict(config.id2label)


def read_record(folder: str | Path) -> dict[str, Any]:
    """The arguments a folder was trained with, or {} where they are not known."""
    path = Path(folder) / RUN_RECORD
    return _parse(path) if path.is_file() else {}


def evaluate_model(
    model: Classifier,
    image_processor: Any,
    data: DataArguments,
    split: str = "test",
    batch_size: int = 64,
    token: str | None = None,
) -> dict[str, float]:
    """Accuracy, macro-F1 and loss of `model` on a split of a data set, as {"accuracy", "macro_f1", "loss", "samples"}.

    Labels are matched by name, so their order in the data may differ from that in training.

    Args:
        model: an image classifier of transformers, or a `PeftModel` of one.
        image_processor: prepares its images.
        data: the data, as for training.
        split: "train", "validation", "test", or any split of the data set by its own name.
        batch_size: images per forward pass.
        token: Hub token.

    Raises:
        DataError: no such split, or labels that the model does not know.
    """
    if split not in ("train", "validation", "test"):
        data, split = replace(data, test_split=split), "test"
    splits = load_image_dataset(data, token=token)
    if split not in splits:
        raise DataError(f"split={split!r} is not in {data.dataset_name!r}, which has {', '.join(splits)}.")
    chosen = splits[split]
    index = _label_index(model, chosen.features["label"])
    rows = chosen.with_transform(build_transform(image_processor, data.augmentation))
    device = next(model.parameters()).device
    logits, labels = [], []
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate_fn):
        with torch.no_grad():
            logits.append(model.eval()(pixel_values=batch["pixel_values"].to(device)).logits.float().cpu())
        labels.append(index[batch["labels"]])
    scores, truth = torch.cat(logits), torch.cat(labels)
    metrics = compute_metrics(EvalPrediction(predictions=scores.numpy(), label_ids=truth.numpy()))
    loss = torch.nn.functional.cross_entropy(scores, truth).item()
    return {**metrics, "loss": loss, "samples": len(truth)}


def label_names(model: Classifier) -> dict[int, str]:
    """The names of the model's labels by their numbers."""
    return {int(index): name for index, name in (base_model(model).config.id2label or {}).items()}


def _label_index(model: Classifier, labels: datasets.ClassLabel) -> torch.Tensor:
    """Where each label of the data is among the model's."""
    known = {name: int(index) for index, name in label_names(model).items()}
    unknown = [name for name in labels.names if name not in known]
    if unknown:
        raise DataError(
            f"the model does not know the labels {', '.join(map(repr, unknown[:5]))}; it knows "
            f"{', '.join(map(repr, list(known)[:5]))}{' ...' if len(known) > 5 else ''}. Evaluate on data of its classes."
        )
    return torch.tensor([known[name] for name in labels.names])


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among `paths` and, sorted, in all folders below them.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{str(path)!r} does not exist; give image files or folders.")
    if not found:
        raise FileNotFoundError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {', '.join(map(str, paths))}.")
    return found


def predict_images(
    model: Classifier,
    image_processor: Any,
    paths: Sequence[str | Path],
    top_k: int = 5,
    batch_size: int = 32,
    augmentation: str = "none",
) -> list[dict[str, Any]]:
    """Predict image files to rows {"image", "predictions": [{"label", "probability"}, ...], "error"}, best first.

    A file that cannot be read gets a row without predictions and the reason as its error.

    Args:
        model: an image classifier with label names in its config.
        image_processor: prepares its images.
        paths: image files.
        top_k: labels per image, at most all the model has.
        batch_size: images per forward pass.
        augmentation: as in training; its evaluation form decides between resizing and cropping.

    Raises:
        ValueError: top_k is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    transform, device = build_transform(image_processor, augmentation), next(model.parameters()).device
    names = label_names(model)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), batch_size):
        images, readable = [], []
        for path in paths[start : start + batch_size]:
            rows.append({"image": str(path), "predictions": [], "error": None})
            try:
                images.append(to_rgb(str(path)))
                readable.append(rows[-1])
            except ImageError as error:
                logger.warning("%s", error)
                rows[-1]["error"] = str(error)
        if not images:
            continue
        with torch.no_grad():
            logits = model.eval()(pixel_values=transform({"image": images})["pixel_values"].to(device)).logits
        best = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
        for row, values, indices in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
            row["predictions"] = [
                {"label": names[i], "probability": value} for i, value in zip(indices, values, strict=True)
            ]
    return rows


def as_table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """Rows of `predict_images` as text, "json" or "csv" (columns image, label_1, probability_1, ..., error).

    Raises:
        ValueError: another kind.
    """
    if kind == "json":
        return json.dumps(list(rows), indent=2) + "\n"
    if kind != "csv":
        raise ValueError(f"format={kind!r} is unknown; choose csv or json.")
    width = max((len(row["predictions"]) for row in rows), default=0)
    columns = [f"{name}_{rank}" for rank in range(1, width + 1) for name in ("label", "probability")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *columns, "error"])
    for row in rows:
        cells = [cell for p in row["predictions"] for cell in (p["label"], f"{p['probability']:.6f}")]
        writer.writerow([row["image"], *cells, *[""] * (2 * width - len(cells)), row["error"] or ""])
    return text.getvalue()
