"""Several adapters on one frozen backbone, asked at the same time by several users."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from PIL import Image

# From where it is: without torchvision, transformers 5.9 exports a stand-in
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..plots import draw_attention, draw_gates, gate_openings
from ..tasks import Task, get_task
from ..training.inference import backbone_name, load_adapter_model, local_folder, read_record
from ..tuners import VPTConfig


@dataclass(frozen=True)
class Served:
    """One adapter that can be asked.

    Args:
        name: as the page shows it.
        model: that holds it.
        task: what it does.
        processor: prepares its images.
        augmentation: as in training; its evaluation form is used.
        id2label: its labels.
        file_bytes: size of its weights on disk.
    """

    name: str
    model: PeftModel
    task: Task
    processor: Any
    augmentation: str
    id2label: dict[int, str]
    file_bytes: int


class AsAdapter:
    """A model seen through one adapter, without switching it: others may ask the same model meanwhile."""

    def __init__(self, served: Served) -> None:
        self._model, self._name = served.model, served.name
        self.config = SimpleNamespace(id2label=served.id2label)

    def __call__(self, pixel_values: torch.Tensor, **inputs: Any) -> Any:
        return self._model(pixel_values=pixel_values, adapter_names=[self._name] * len(pixel_values), **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Adapters:
    """Adapters on one backbone.

    Args:
        base_model: backbone to use instead of the one that the first adapter was trained on.
    """

    def __init__(self, base_model: str | None = None) -> None:
        self.base_model = base_model
        self.served: dict[str, Served] = {}
        self._base: Any = None
        # PEFT keeps one method in a model: one for each, which share the backbone's weights
        self._models: dict[str, PeftModel] = {}
        self._adding = threading.Lock()

    def add(self, path_or_id: str | Path, name: str | None = None) -> str:
        """Load an adapter and return its name.

        Args:
            path_or_id: folder or Hub id.
            name: default: the last part of the path, with a number where it is taken.

        Raises:
            OSError: it cannot be found.
            ValueError: it is no prompt adapter, or one of another backbone.
        """
        folder = local_folder(path_or_id)
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"{str(path_or_id)!r} holds no adapter_config.json; give folders or Hub ids of adapters.")
        record = read_record(folder)
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, VPTConfig):
            raise ValueError(f"{str(path_or_id)!r} is an adapter of {config.peft_type}; give adapters of prompts.")
        backbone = backbone_name(str(config.base_model_name_or_path))
        with self._adding:
            wanted = name or Path(path_or_id).name
            found = wanted = wanted.replace(".", "_")
            while found in self.served:
                found = f"{wanted}_{len(self.served) + 1}"
            if self.base_model is not None and backbone != self.base_model:
                raise ValueError(
                    f"{str(path_or_id)!r} is of the backbone {backbone!r}, the page runs {self.base_model!r}; "
                    "start another page for it."
                )
            if self._base is None:
                loaded, _ = load_adapter_model(folder, backbone)
                self._base, self.base_model = loaded.unload(), backbone  # type: ignore[operator]
            model = self._models.get(str(config.peft_type))
            if model is None:
                shared = {id(tensor): tensor for tensor in (*self._base.parameters(), *self._base.buffers())}
                model = PeftModel.from_pretrained(copy.deepcopy(self._base, shared), str(folder), adapter_name=found)
                self._models[str(config.peft_type)] = model.eval()
            else:
                model.load_adapter(str(folder), found)
                model.eval()
            self.served[found] = Served(
                found,
                model,
                get_task(record.get("task", get_task().pipeline_tag)),
                AutoImageProcessor.from_pretrained(folder),
                record.get("augmentation", "none"),
                dict(config.id2label or self._base.config.id2label),
                sum(path.stat().st_size for path in folder.glob("adapter_model.*")),
            )
        return found

    @torch.no_grad()
    def ask(self, name: str, images: Sequence[Image.Image], top_k: int = 3) -> tuple[list[list[dict]], float]:
        """Return what an adapter finds in each RGB image, and the seconds this took."""
        served = self.served[name]
        start = time.perf_counter()
        found = served.task.predict(AsAdapter(served), served.processor, images, served.augmentation, top_k)
        return found, time.perf_counter() - start

    def pictures(self, name: str, image: Image.Image) -> list[tuple[Image.Image, str]]:
        """Return what can be seen of an adapter at work on an image: attention over it, gates; with captions."""
        served, drawn = self.served[name], []
        pixels = served.processor(image, return_tensors="pt")["pixel_values"]
        try:
            figure = draw_attention(served.model, pixels, adapter_name=name, image=image)
            drawn.append((as_image(figure), f"{name}: where the class token looks"))
        except ValueError:
            # No class token, windows, or nothing among the tokens: there is no such picture
            pass
        try:
            gate_openings(served.model, name)
        except ValueError:
            return drawn
        return [*drawn, (as_image(draw_gates(served.model, name)), f"{name}: gates")]


def as_image(figure: Any) -> Image.Image:
    """Return a matplotlib figure as an RGB image."""
    figure.set_dpi(110)
    figure.canvas.draw()
    return Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("RGB")
