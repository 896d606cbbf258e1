"""The page itself, in Gradio."""

from __future__ import annotations

import base64
import html
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas

from ..data.images import DataError, ImageError, to_rgb
from ..methods import PROMPT_METHODS
from ..plots.figures import new_figure
from .jobs import TrainingFailed, run_training
from .serving import Adapters, as_image
from .uploads import root_of, unpack_images


MOST_IMAGES = 64
COLUMNS = ["image", "adapter", "answer"]


def ask(adapters: Adapters, files: list[str] | None, names: list[str]) -> tuple[pandas.DataFrame, str, str]:
    """Return a row per image and adapter, pictures of the first image as HTML, and a line about what was done."""
    if not files:
        return pandas.DataFrame(columns=COLUMNS), "", "Drop one or more images first."
    if not names:
        return pandas.DataFrame(columns=COLUMNS), "", "Choose at least one adapter."
    images, readable, refused = [], [], []
    for path in files[:MOST_IMAGES]:
        try:
            images.append(to_rgb(path))
            readable.append(Path(path).name)
        except ImageError:
            refused.append(Path(path).name)
    rows, pictures, costs = [], [], []
    for name in names if images else ():
        found, seconds = adapters.ask(name, images, top_k=1)
        for image, predictions in zip(readable, found, strict=True):
            rows.append([image, name, ", ".join(map(in_words, predictions)) or "nothing"])
        pictures += adapters.pictures(name, images[0])
        kilobytes = adapters.served[name].file_bytes / 1000
        costs.append(f"{name} {kilobytes:,.0f} kB, {1000 * seconds / len(images):.1f} ms per image")
    said = [f"{len(images)} images, {len(names)} adapters on one frozen backbone ({'; '.join(costs)})."]
    if refused:
        said.append(f"Not readable as images: {', '.join(refused)}.")
    if len(files) > MOST_IMAGES:
        said.append(f"Only the first {MOST_IMAGES} of {len(files)} images were read.")
    return pandas.DataFrame(rows, columns=COLUMNS), as_html(pictures), " ".join(said)


def in_words(prediction: dict[str, Any]) -> str:
    """Return a finding as text: its label, and how sure the model is."""
    sure = prediction.get("probability", prediction.get("score"))
    return str(prediction.get("label")) + ("" if sure is None else f" ({sure:.0%})")


def as_html(pictures: list[tuple[Any, str]]) -> str:
    """Return pictures with captions, each as wide as the page."""
    parts = []
    for picture, caption in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        source = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(caption)
        parts.append(
            f'<figure style="margin:0 0 1em"><img alt="{text}" style="width:100%" src="data:image/png;base64,{source}">'
            f'<figcaption style="font-size:.9em">{text}</figcaption></figure>'
        )
    return "".join(parts)


def train(
    adapters: Adapters, archive: str | None, name: str, method: str, prompts: float, epochs: float
) -> Iterator[tuple[str, str]]:
    """Train on an uploaded zip file, or on digits without one; yield the curves so far and a line about the state."""
    curves = ""
    folder = Path(tempfile.mkdtemp(prefix="vpt_peft_app_"))
    try:
        data, limit = "digits", ["--max_train_samples", "200"]
        if archive:
            (folder / "images").mkdir()
            yield curves, f"{unpack_images(archive, folder / 'images')} images unpacked."
            data, limit = str(root_of(folder / "images")), []
        flags = ["--model_name_or_path", str(adapters.base_model or "embedded"), "--dataset_name", data, *limit]
        flags += [
            "--method",
            method,
            "--num_virtual_tokens",
            str(int(prompts)),
            "--num_train_epochs",
            str(int(epochs)),
        ]
        flags += ["--disable_tqdm", "True", "--save_total_limit", "1"]
        yield curves, "Training ..."
        for history in run_training(flags, folder / "run"):
            curves = draw_history(history)
            yield curves, "Training ..."
        added = adapters.add(folder / "run", name.strip() or "mine")
        yield curves, f"Done. The adapter is called {added!r}; choose it on the first tab."
    except (DataError, TrainingFailed, OSError, ValueError) as error:
        yield curves, f"This did not work: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def curves_of(history: list[dict[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Return the Trainer's log as points (epoch, value) by the name of the curve: training loss, validation metrics."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            is_metric = key.startswith("eval_") and not key.endswith(("runtime", "per_second", "samples", "loss"))
            if key == "loss" or is_metric:
                name = "training loss" if key == "loss" else key.removeprefix("eval_").replace("_", " ")
                points = curves.setdefault(name, [])
                # The last evaluation, of the best weights, comes a second time
                if not points or points[-1][0] < entry["epoch"]:
                    points.append((entry["epoch"], value))
    return curves


def draw_history(history: list[dict[str, float]]) -> str:
    """Return the curves of the Trainer's log as HTML, the loss beside the metrics."""
    curves = curves_of(history)
    figure = new_figure(8.5, 3.2)
    panels = figure.subplots(1, 2)
    for name, points in curves.items():
        panels[int(name != "training loss")].plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    for ax, title in zip(panels, ("training loss", "validation"), strict=True):
        ax.set(title=title, xlabel="epoch")
        ax.grid(alpha=0.3)
        ax.locator_params(axis="x", integer=True)
    if len(curves) > 2:
        panels[1].legend(frameon=False)
    return as_html([(as_image(figure), f"{len(curves.get('training loss', []))} epochs")])


def build(adapters: Adapters) -> Any:
    """Return the page, a `gradio.Blocks`.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
    """
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the page needs Gradio: pip install 'vpt_peft[app]'.") from error

    with gr.Blocks(title="vpt_peft", analytics_enabled=False) as page:
        gr.Markdown("# vpt_peft\nOne frozen backbone, a few kilobytes of prompts for each task.")
        with gr.Tab("Ask"):
            with gr.Row():
                with gr.Column(scale=1):
                    files = gr.File(label="Images", file_count="multiple", elem_id="images")
                    chosen = gr.CheckboxGroup(
                        list(adapters.served), value=list(adapters.served), label="Adapters", elem_id="adapters"
                    )
                    button = gr.Button("Ask", variant="primary", elem_id="ask")
                with gr.Column(scale=2):
                    said = gr.Markdown(elem_id="said")
                    table = gr.Dataframe(headers=COLUMNS, label="Answers", wrap=True, elem_id="answers")
                    inside = gr.HTML(elem_id="inside")
            button.click(lambda files, names: ask(adapters, files, names), [files, chosen], [table, inside, said])
        with gr.Tab("Train"):
            with gr.Row():
                with gr.Column(scale=1):
                    archive = gr.File(label="Zip of folders, one per class (without: digits)", elem_id="archive")
                    name = gr.Textbox("mine", label="Name of the adapter", elem_id="name")
                    method = gr.Dropdown(list(PROMPT_METHODS), value="vpt", label="Method")
                    prompts = gr.Slider(1, 100, 10, step=1, label="Prompts")
                    epochs = gr.Slider(1, 50, 5, step=1, label="Epochs", elem_id="epochs")
                    start = gr.Button("Train", variant="primary", elem_id="train")
                with gr.Column(scale=2):
                    state = gr.Markdown(elem_id="state")
                    plot = gr.HTML(elem_id="curves")

            def run(*inputs: Any) -> Iterator:
                yield from train(adapters, *inputs)

            started = start.click(run, [archive, name, method, prompts, epochs], [plot, state], concurrency_limit=1)
            started.then(lambda: gr.CheckboxGroup(list(adapters.served), value=list(adapters.served)), None, chosen)
        # Adapters that others have trained meanwhile
        page.load(lambda: gr.CheckboxGroup(list(adapters.served), value=list(adapters.served)), None, chosen)
    return page


def launch(adapters: Adapters, host: str, port: int) -> None:
    """Serve the page until it is interrupted."""
    page = build(adapters)
    import gradio as gr

    page.queue(default_concurrency_limit=4)
    # Fonts of the system: the page works without a network
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_name=host, server_port=port, share=False, theme=theme, footer_links=[], max_file_size="500mb")
