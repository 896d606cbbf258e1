"""Load what a training run saved, of any method, from a folder or the Hub."""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

# From where it is: without torchvision, transformers 5.9 exports a stand-in
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..data.transforms import check_processor
from ..embedded import EMBEDDED_FOLDERS
from ..files import RUN_RECORD, open_regular, read_json
from ..methods.structure import Classifier
from ..peft_model import read_config
from ..tasks import get_task
from ..tasks.base import DEFAULT_TASK
from .arguments import ModelArguments
from .checkpoints import labels_of_adapter, load_trained, read_baseline_spec
from .model import build_baseline, load_backbone, load_image_processor, resolve_model_path


logger = logging.getLogger(__name__)

# What a run leaves for others; checkpoints, pickles, logs and the Trainer's state are not among it
SHARED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "vpt_peft_*.json",
    "*_results.json",
    "*.png",
    "README.md",
)


def local_folder(
    path_or_id: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Path:
    """Return the folder itself, or the cached files of a Hub id; without a network those that are in the cache.

    Raises:
        OSError: no such folder or Hub id, or neither network nor cached files.
        ValueError: it is neither a folder nor a well-formed Hub id.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        patterns = [f"{subfolder}/{pattern}" for pattern in SHARED_FILES] if subfolder else list(SHARED_FILES)
        try:
            fetched = snapshot_download(
                str(path_or_id), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=patterns
            )
        except OSError as error:
            raise OSError(f"{str(path_or_id)!r} is not a folder, and the Hub did not give it: {error}") from error
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
    """Load whatever `train` saved, with its backbone, label names and image processor, in eval mode.

    Args:
        path_or_id: folder or Hub id of the adapter.
        base_model: backbone to use instead of the one it was trained on, a folder or Hub id.
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
    record = read_record(folder)
    task = get_task(record.get("task", DEFAULT_TASK))
    source: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "task": task.pipeline_tag,
        "decoder": record.get("decoder"),
    }
    has_processor = (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
    processor = _load_processor(folder) if has_processor else None
    spec = read_baseline_spec(folder)
    model: Classifier
    if spec is None:
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{str(path_or_id)!r} holds no adapter_config.json; give the output folder of a training run."
            )
        config = _load_config(folder)
        name = base_model or config.base_model_name_or_path
        if not isinstance(name, str):
            raise ValueError(f"{folder}: base_model_name_or_path={name!r} names no backbone; give base_model.")
        backbone = ModelArguments(base_model or backbone_name(name), config.revision, **source)
        base = load_backbone(backbone, _labels(folder, backbone), processor)
        try:
            model = PeftModel.from_pretrained(base, str(folder))
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {str(path_or_id)!r} do not fit the backbone {backbone.model_name_or_path!r} with "
                f"{base.config.num_labels} labels: {str(error).splitlines()[-1].strip()} Check base_model, and that "
                "the labels are in adapter_config.json or config.json."
            ) from error
    elif spec.method == "full":
        backbone = ModelArguments(base_model or spec.base_model_name_or_path, spec.revision, **source)
        model = task.auto_class.from_pretrained(folder, dtype=torch.float32)
    else:
        backbone = ModelArguments(base_model or spec.base_model_name_or_path, spec.revision, **source)
        model = build_baseline(load_backbone(backbone, _labels(folder, backbone), processor), spec)
        load_trained(model, folder)
    return model.eval(), processor or load_image_processor(backbone)


def backbone_name(recorded: str) -> str:
    """Return a backbone as it is found here: the package's own lie at another path on every machine."""
    path = Path(recorded)
    if path.parts[-3:-1] == ("vpt_peft", "embedded"):
        return next((name for name, folder in EMBEDDED_FOLDERS.items() if folder == path.name), recorded)
    return recorded


def check_files(folder: Path) -> None:
    """Read every JSON file and the header of every weights file, so that a damaged one is named.

    Raises:
        FileNotFoundError: there is an adapter_config.json, but no weights.
        ValueError: a file is damaged.
    """
    for path in sorted(folder.glob("*.json")):
        if any(fnmatch(path.name, pattern) for pattern in SHARED_FILES):
            read_json(path)
    for path in sorted(folder.glob("*.safetensors")):
        open_regular(path).close()
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again, or repeat the training.") from error
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("adapter_model.*")):
        raise FileNotFoundError(f"{folder} has an adapter_config.json, but no adapter_model.safetensors beside it.")


def _load_config(folder: Path) -> PeftConfig:
    import vpt_peft  # noqa: F401 - registers the methods, which PeftConfig looks up by name

    config = read_config(folder)
    if config is None:
        path = folder / "adapter_config.json"
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error}); correct the field.") from error
    return config


def _load_processor(folder: Path) -> Any:
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: its image processor cannot be made ({type(error).__name__}: {error}); correct "
            "preprocessor_config.json, or take the backbone's."
        ) from error
    check_processor(processor)
    return processor


def _labels(folder: Path, backbone: ModelArguments) -> dict[int, str]:
    """Return the labels of the adapter's configuration, else of the folder's config.json, else of the backbone."""
    labels = labels_of_adapter(folder) if (folder / "adapter_config.json").is_file() else None
    if labels is not None:
        return labels
    if (folder / "config.json").is_file():
        try:
            labels = {int(number): str(name) for number, name in AutoConfig.from_pretrained(folder).id2label.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'} cannot be used ({error}); download it again.") from error
        if sorted(labels) != list(range(len(labels))):
            raise ValueError(f"{folder / 'config.json'}: the keys of id2label must be 0 to {len(labels) - 1}.")
        return labels
    logger.warning("%s has no labels; their names and number are taken from the backbone.", folder)
    source = resolve_model_path(backbone.model_name_or_path)
    config = AutoConfig.from_pretrained(source, token=backbone.token, cache_dir=backbone.cache_dir)
    return dict(config.id2label)


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the arguments a folder was trained with, or {} where they are not known."""
    path = Path(folder) / RUN_RECORD
    return read_json(path) if path.exists() else {}


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
