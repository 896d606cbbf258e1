"""The training program, read from top to bottom: data, model, features, Trainer, results, card, push."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, set_seed

from ..files import written_beside
from ..methods import PROMPT_METHODS
from ..methods.structure import Classifier
from .arguments import Arguments, MethodArguments, VPTTrainingArguments
from .card import RunFacts, write_card
from .data import load_image_dataset
from .feature_cache import FeatureCache, collate_features, default_cache_dir
from .features import Cut, FeatureFeed, find_cut
from .hub import push_adapter
from .metrics import compute_metrics, preprocess_logits_for_metrics
from .model import build_model, check_trainable, load_image_processor
from .output import claim_output_dir, full_disk_explained, last_checkpoint, prepare_output_dir
from .report import describe_run, measure_step
from .saving import save_trained
from .trainer import TrainingDiverged, VPTTrainer
from .transforms import build_transform, collate_fn


logger = logging.getLogger(__name__)


def train(arguments: Arguments, with_test: bool = True) -> dict[str, float]:
    """Train, evaluate and save one adapter (or baseline) as `arguments` say, and return all metrics.

    `output_dir` then holds the best weights, the image processor, `config.json` with the label names, the card,
    `train_results.json`, `eval_results.json`, `test_results.json` where there is a test split, `all_results.json`, and
    `training_config.json`, which repeats the run. Under `accelerate launch` only the main process writes.

    Args:
        arguments: as parsed.
        with_test: evaluate on the test split too; left out where runs are still chosen among.

    Raises:
        ValueError: the arguments do not fit the model or the data; nothing was written.
        OSError: model or data cannot be found, or output_dir cannot be used.
        TrainingDiverged: the loss is not finite; earlier checkpoints are kept.
    """
    model_args, data_args, method, training, _ = arguments
    state = PartialState()
    checkpoint = prepare_output_dir(training) if state.is_main_process else None
    # Every process resumes from what the main one found, before anything new is written
    state.wait_for_everyone()
    if not state.is_main_process and training.resume_from_checkpoint is not None:
        checkpoint = prepare_output_dir(training)

    set_seed(training.seed)
    with training.main_process_first(desc="reading the data"):
        splits = load_image_dataset(data_args, token=model_args.token, cache_dir=model_args.cache_dir)
    if not with_test:
        splits.pop("test", None)
    labels = dict(enumerate(splits["train"].features["label"].names))
    processor = load_image_processor(model_args)
    rows = {
        name: split.with_transform(
            build_transform(processor, data_args.augmentation, train=name == "train", seed=training.seed)
        )
        for name, split in splits.items()
    }

    # Drawn here, so that the head starts alike whatever the data needed of the generators
    set_seed(training.seed)
    model = build_model(model_args, method, labels)
    counts = check_trainable(model, method.method)
    cut = find_cut(model, method, data_args.augmentation) if method.cache_features else None
    if method.init_method not in (None, "random"):
        start_prompts(model, rows["train"], method, training)
    output_dir = Path(training.output_dir or ".")
    with contextlib.ExitStack() as feed:
        if state.is_main_process:
            feed.enter_context(claim_output_dir(training, arguments.record()))
        feed.enter_context(full_disk_explained(output_dir))
        inputs, collate = dict(rows), collate_fn
        if cut is not None:
            model.to(training.device)  # type: ignore[arg-type]
            inputs = cache_splits(feed, model, cut, splits, rows, processor, arguments)
            collate = collate_features
        trainer = VPTTrainer(
            method=method,
            model=model,
            args=training,
            train_dataset=inputs["train"],
            eval_dataset=inputs["validation"],
            data_collator=collate,
            processing_class=processor,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if method.early_stopping_patience is not None:
            training.restore_callback_states_from_checkpoint = True
            trainer.add_callback(EarlyStoppingCallback(method.early_stopping_patience))
        if trainer.is_world_process_zero():
            logger.info(describe_run(trainer, counts, measure_step(trainer)))

        set_seed(training.seed)
        try:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except TrainingDiverged as error:
            raise TrainingDiverged(what_to_lower(error, arguments)) from error

        if trainer.is_world_process_zero():
            saved_bytes = save_result(trainer.accelerator.unwrap_model(trainer.model), processor, output_dir)
        sizes = {f"{name}_samples": len(split) for name, split in splits.items()}
        metrics: dict[str, float] = {}
        for name, split, values in (
            ("train", None, {**result.metrics, "trainable_parameters": counts.trainable}),
            ("eval", inputs["validation"], None),
            ("test", inputs.get("test"), None),
        ):
            if values is None and split is None:
                continue
            values = values or trainer.evaluate(split, metric_key_prefix=name)
            values[f"{name}_samples"] = sizes["validation_samples" if name == "eval" else f"{name}_samples"]
            trainer.save_metrics(name, values)
            metrics |= values
        trainer.save_state()

    if trainer.is_world_process_zero():
        facts = RunFacts(
            arguments,
            counts,
            metrics,
            labels,
            {name: len(split) for name, split in splits.items()},
            processor,
            saved_bytes,
            metrics["train_runtime"],
            hyper_parameters(arguments),
        )
        write_card(facts, output_dir)
        if training.push_to_hub:
            push_adapter(
                output_dir,
                training.hub_model_id or output_dir.resolve().name,
                token=training.hub_token,
                private=bool(training.hub_private_repo),
                revision=training.hub_revision,
            )
    return metrics


def start_prompts(
    model: Classifier, rows: datasets.Dataset, method: MethodArguments, training: VPTTrainingArguments
) -> None:
    """Set the prompts to features of training images."""
    from .. import initialize_prompts

    model.to(training.device)  # type: ignore[arg-type]
    loader = DataLoader(rows, batch_size=training.per_device_eval_batch_size, collate_fn=collate_fn)
    initialize_prompts(model, loader, method=str(method.init_method), seed=training.seed)


def cache_splits(
    feed: contextlib.ExitStack,
    model: Classifier,
    cut: Cut,
    splits: datasets.DatasetDict,
    rows: Mapping[str, datasets.Dataset],
    processor: Any,
    arguments: Arguments,
) -> dict[str, Any]:
    """Store the features of every split and let the model start from them until `feed` is closed."""
    _, data_args, method, training, _ = arguments
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    folder = Path(method.feature_cache_dir) if method.feature_cache_dir else default_cache_dir()
    preprocessing = {"augmentation": data_args.augmentation, "image_processor": processor.to_dict()}
    cache = FeatureCache(model, cut, preprocessing, folder, int(method.feature_cache_limit_gb * 1e9), autocast)
    with training.main_process_first(desc="computing features"):
        stored = {name: cache.store(split, rows[name], collate_fn) for name, split in splits.items()}
    logger.info("Features before the %s are in %s.", cut.name, folder)
    probe = rows["validation"]
    count = min(4, len(probe))
    images = collate_fn([probe[index] for index in range(count)])["pixel_values"].to(training.device)
    starting_late = feed.enter_context(FeatureFeed(model, cut, images.shape[1:]))
    features = collate_features([stored["validation"][index] for index in range(count)])
    if autocast is None:
        starting_late.check(images, features["cached_features"].to(training.device))
    return stored


def what_to_lower(error: TrainingDiverged, arguments: Arguments) -> str:
    """The error's message with the settings that make a loss diverge, and where the last good weights are."""
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
    clip = f"max_grad_norm (now {training.max_grad_norm:g})"
    return f"{error}. Lower the learning rate ({shown}) or {clip}.{half} {kept}"


def save_result(model: Classifier, processor: Any, output_dir: Path) -> int:
    """Save weights, configs and image processor whole or not at all; return the bytes of the weights.

    Raises:
        OSError: the folder cannot be written; what was there before is untouched, and so are the checkpoints.
    """
    with written_beside(output_dir) as folder:
        save_trained(model, folder)
        processor.save_pretrained(folder)
        # PEFT's own card; ours follows when the metrics are known
        (folder / "README.md").unlink(missing_ok=True)
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def hyper_parameters(arguments: Arguments) -> dict[str, Any]:
    """What was given, or filled in by the recipe, about method and training, for the card."""
    names = {item.name for item in (*fields(MethodArguments), *fields(VPTTrainingArguments))}
    hidden = {"hub_model_id", "hub_private_repo", "push_to_hub", "feature_cache_dir", "report_to", "run_name"}
    shown = {name: value for name, value in arguments.record().items() if name in names - hidden}
    if arguments.method.method in PROMPT_METHODS:
        shown.setdefault("num_virtual_tokens", arguments.method.num_virtual_tokens)
    return {"method": arguments.method.method, "recipe": arguments.method.recipe, **shown}
