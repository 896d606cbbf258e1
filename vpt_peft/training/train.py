"""The training program, read from top to bottom: data, model, features, Trainer, results, card."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import EarlyStoppingCallback, set_seed

from ..data.checks import warn_once
from ..files import written_beside
from ..methods.structure import Classifier, base_model
from ..tasks import Task, get_task
from .arguments import Arguments, VPTTrainingArguments
from .checkpoints import WRITTEN, save_trained
from .facts import write_card
from .feature_cache import FeatureCache, FeaturesTooLarge, default_cache_dir
from .features import FEATURES, CachedForward, SplitPoint, find_split_point
from .model import build_model, check_trainable, load_image_processor, resolve_model_path
from .output import claim_output_dir, full_disk_explained, prepare_output_dir
from .probe import fit_head, layer_to_fit
from .report import describe_run, expected_bytes, measure_step
from .resume import last_checkpoint
from .trainer import TrainingDiverged, VPTTrainer
from .trainer_inputs import start_head, start_prompts, trainer_inputs


logger = logging.getLogger(__name__)


def train(arguments: Arguments, with_test: bool = True) -> dict[str, float]:
    """Train, evaluate and save one adapter (or baseline) as `arguments` say, and return all metrics.

    `output_dir` then holds the best weights with the labels, the image processor, the card, `train_results.json`,
    `eval_results.json`, `test_results.json` where there is a test split, `all_results.json`, and
    `training_config.json`, which repeats the run. Under `accelerate launch` only the main process writes.

    Args:
        arguments: as parsed.
        with_test: evaluate on the test split too; left out while runs are still being chosen.

    Raises:
        ValueError: the arguments do not fit the model or the data; nothing was written.
        OSError: model or data cannot be found, or output_dir cannot be used.
        TrainingDiverged: the loss is not finite; earlier checkpoints are kept.
    """
    model_args, data_args, method, training, _ = arguments
    task, state = get_task(model_args.task), PartialState()
    record = arguments.record()
    checkpoint = prepare_output_dir(training, record) if state.is_main_process else None
    # Every process resumes from what the main one found, before anything new is written
    state.wait_for_everyone()
    if not state.is_main_process and training.resume_from_checkpoint is not None:
        checkpoint = prepare_output_dir(training, record)

    # Data
    set_seed(training.seed)
    with training.main_process_first(desc="reading the data"):
        splits = task.read(data_args, token=model_args.token, cache_dir=model_args.cache_dir)
    if not with_test:
        splits.pop("test", None)
    if data_args.train_on_validation:
        splits["train"] = datasets.concatenate_datasets([splits["train"], splits.pop("validation")])
    classes = task.id2label(splits["train"])
    images = {name: len(split) for name, split in splits.items()}
    processor = task.prepare_processor(load_image_processor(model_args), data_args)
    rows = {
        name: task.rows(split, processor, data_args.augmentation, train=name == "train", seed=training.seed)
        for name, split in splits.items()
    }

    # Model; seeded again, so that the head starts alike whatever reading the data drew
    set_seed(training.seed)
    model = build_model(model_args, method, classes, processor)
    counts = check_trainable(model, method.method)
    split_point = None
    if method.cache_features and task.has_cached_features and features_can_be_fed(training):
        split_point = find_split_point(model, method, data_args.augmentation)
    start_prompts(task, model, rows["train"], method, training)
    start_head(task, model, rows["train"], method, training)

    output_dir = Path(training.output_dir or ".")
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(claim_output_dir(training, record, checkpoint))
        stack.enter_context(full_disk_explained(output_dir))
        inputs: dict[str, Any] = dict(rows)
        if split_point is not None:
            model.to(training.device)  # type: ignore[arg-type]
            inputs = cache_splits(stack, task, model, split_point, splits, rows, processor, arguments)
        trainer = VPTTrainer(
            method=method,
            metrics=[metric.name for metric in task.metrics],
            processing_class=processor,
            **trainer_inputs(task, model, training, inputs["train"], inputs.get("validation")),
        )
        if method.early_stopping_patience is not None:
            training.restore_callback_states_from_checkpoint = True
            trainer.add_callback(EarlyStoppingCallback(method.early_stopping_patience))
        expected = 0.0
        probe = layer_to_fit(method, split_point, inputs["train"])
        if probe is None:
            # In every process: the losses of some models wait for one another's numbers of masks
            cost = measure_step(trainer)
            expected = expected_bytes(trainer, counts, cost)
            if trainer.is_world_process_zero():
                logger.info(describe_run(trainer, counts, cost))

        # Training
        set_seed(training.seed)
        try:
            if probe is not None:
                result = fit_head(probe, task, training, inputs["train"], inputs.get("validation"))
            else:
                result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except TrainingDiverged as error:
            raise TrainingDiverged(what_to_lower(error, arguments)) from error
        saved_bytes = 0
        if trainer.is_world_process_zero():
            trained = trainer.accelerator.unwrap_model(trainer.model)
            saved_bytes = save_result(trained, model_args.model_name_or_path, processor, output_dir)

        # Results
        metrics = {
            **result.metrics,
            "trainable_parameters": counts.trainable,
            "head_parameters": counts.head,
            "total_parameters": counts.total,
            "expected_bytes": expected,
            "saved_bytes": saved_bytes,
            "train_samples": images["train"],
        }
        trainer.save_metrics("train", metrics)
        for split, prefix in (("validation", "eval"), ("test", "test")):
            if split in inputs:
                found = trainer.evaluate(inputs[split], metric_key_prefix=prefix)
                found[f"{prefix}_samples"] = images[split]
                trainer.save_metrics(prefix, found)
                metrics |= found
        trainer.save_state()
        if trainer.is_world_process_zero():
            model_class = type(base_model(trained)).__name__
            write_card(arguments, counts, metrics, classes, images, processor, model_class, saved_bytes)
    return metrics


def features_can_be_fed(training: VPTTrainingArguments) -> bool:
    """Whether the forward pass runs as it is written: not twice, not compiled, not split over devices."""
    wrapped = training.gradient_checkpointing or training.torch_compile or training.deepspeed
    return not wrapped and training.n_gpu <= 1


def cache_splits(
    stack: contextlib.ExitStack,
    task: Task,
    model: Classifier,
    split_point: SplitPoint,
    splits: datasets.DatasetDict,
    rows: Mapping[str, datasets.Dataset],
    processor: Any,
    arguments: Arguments,
) -> dict[str, Any]:
    """Cache the features of every split, and let the model start from them until `stack` is closed.

    Returns:
        By split the features, or the images as they are where features are too large or not exact.
    """
    _, data_args, method, training, _ = arguments
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    folder = Path(method.feature_cache_dir) if method.feature_cache_dir else default_cache_dir()
    preprocessing = {"augmentation": data_args.augmentation, "image_processor": processor.to_dict()}
    cache = FeatureCache(model, split_point, preprocessing, folder, int(method.feature_cache_limit_gb * 1e9), autocast)
    try:
        with training.main_process_first(desc="computing features"):
            cached = {name: cache.store(split, rows[name], task) for name, split in splits.items()}
    except (FeaturesTooLarge, ValueError) as error:
        warn_once(f"Features are not cached, so every epoch runs the whole model: {error}.")
        return dict(rows)
    probe = range(min(4, len(rows["train"])))
    images = task.collate([rows["train"][index] for index in probe])["pixel_values"].to(training.device)
    features = task.collate([cached["train"][index] for index in probe])[FEATURES].to(training.device)
    forward = CachedForward(model, split_point, images.shape[1:])
    with forward, torch.autocast(images.device.type, autocast, autocast is not None):
        exact = forward.is_exact(images, features, 1e-4 if autocast is None else 2e-2)
    if not exact:
        warn_once("Features are not cached, so every epoch runs the whole model: they would not be exact.")
        return dict(rows)
    stack.enter_context(forward)
    logger.info("Starts from features before the %s, cached in %s.", split_point.name, folder)
    return cached


def what_to_lower(error: TrainingDiverged, arguments: Arguments) -> str:
    """Return the error's message with the settings that make a loss diverge, and where the last good weights are."""
    method, training = arguments.method, arguments.training
    rates = {"learning_rate": training.learning_rate}
    for name in ("prompt_learning_rate", "head_learning_rate", "base_learning_rate"):
        if getattr(method, name) is not None:
            rates[name] = getattr(method, name)
    shown = ", ".join(f"{name}={value:g}" for name, value in rates.items())
    checkpoint = last_checkpoint(training.output_dir or ".")
    kept = (
        f"The last good checkpoint is {checkpoint}."
        if checkpoint
        else "No checkpoint was saved yet, and no weights were written."
    )
    half = " fp16 overflows easily: try bf16." if training.fp16 else ""
    clip = f"max_grad_norm={training.max_grad_norm:g}"
    return f"{error}. Lower the learning rate ({shown}) or {clip}.{half} {kept}"


def save_result(model: Classifier, backbone: str, processor: Any, output_dir: Path) -> int:
    """Save weights, configuration and image processor whole or not at all; return the bytes of the weights.

    Raises:
        OSError: the folder cannot be written; what was there before is untouched, and so are the checkpoints.
    """
    if isinstance(model, PeftModel):
        # A name that any library can load: they do not know the package's own backbones
        model.peft_config[model.active_adapter].base_model_name_or_path = resolve_model_path(backbone)
    with written_beside(output_dir) as folder:
        save_trained(model, folder)
        processor.save_pretrained(folder)
        # PEFT's own card; ours follows when the metrics are known
        (folder / "README.md").unlink(missing_ok=True)
        written = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name in WRITTEN:
        if name not in written:
            (output_dir / name).unlink(missing_ok=True)
    return sum(size for name, size in written.items() if name.endswith(".safetensors"))
