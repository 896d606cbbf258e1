"""transformers' Trainer with parameter groups, small checkpoints, and a stop at a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME

from .arguments import MethodArguments, VPTTrainingArguments
from .checkpoints import BASELINE_CONFIG, load_trained, save_trained
from .optim import make_optimizer
from .processes import (
    are_finite,
    count_own,
    count_rows,
    first_rows,
    mean_over_processes,
    pad_over_processes,
    share_step,
)


class TrainingDiverged(RuntimeError):
    """The loss is not finite; nothing of the step was applied or saved."""


class FiniteValues(TrainerCallback):
    """Stops before a checkpoint is saved whose evaluation loss or weights are not finite."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = (kwargs.get("metrics") or {}).get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the evaluation loss is {loss} after step {state.global_step}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Gradients overflow before the loss does
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        is_last = control.should_save or control.should_training_stop or state.global_step >= state.max_steps
        if is_last and not are_finite(trained):
            raise TrainingDiverged(f"weights are not finite after step {state.global_step}")

    # Whether to save is decided at the one or at the other
    on_epoch_end = on_step_end


class ReadableProgress(ProgressCallback):
    """transformers' progress bar without its log, and without the bars of past evaluations."""

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.leave = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        pass


class EpochLines(TrainerCallback):
    """One readable line per log while training; what an epoch logs and what it evaluates share one.

    Args:
        metrics: names of the metrics to show beside the losses.
    """

    def __init__(self, metrics: Sequence[str] = ()) -> None:
        self.metrics = tuple(metrics)
        self.begun: list[str] = []
        self.trains = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trains = state.is_local_process_zero

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trains = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # The program itself reports the totals at the end
        if not self.trains or not logs or "train_runtime" in logs:
            return
        if "loss" in logs:
            self.begun.append(f"training loss {logs['loss']:.4g}")
        if "eval_loss" in logs:
            self.begun.append(f"validation loss {logs['eval_loss']:.4g}")
        named = {name: logs[f"eval_{name}"] for name in self.metrics if f"eval_{name}" in logs}
        self.begun += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in named.items()]
        # An evaluation that follows completes the line
        if self.begun and ("eval_loss" in logs or not control.should_evaluate):
            tqdm.write(f"epoch {logs.get('epoch', 0.0):g}: {', '.join(self.begun)}")
            self.begun = []


class VPTTrainer(Trainer):
    """Trainer for models of `build_model`.

    Args:
        method (`MethodArguments`): gives learning rates and weight decays of prompts and head.
        metrics (`Sequence[str]`): names of the metrics to show while training.
        kwargs: as of `transformers.Trainer`.
    """

    args: VPTTrainingArguments
    model: Any

    def __init__(self, *, method: MethodArguments, metrics: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.method = method
        self._measurable: Any = self.preprocess_logits_for_metrics
        # Weights of our own, as not every model's loss heeds a number of items
        self.model_accepts_loss_kwargs = False
        self._weights: Iterator[float] = iter(())
        self._weight = 1.0
        self.add_callback(FiniteValues())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ReadableProgress())
        self.pop_callback(PrinterCallback)
        self.add_callback(EpochLines(metrics))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the Hub repository before anything is trained.

        Raises:
            OSError: the Hub cannot be reached or refuses; the message says how to go on.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except (OSError, HTTPError) as error:
            raise OSError(
                f"push_to_hub: the repository cannot be made ({str(error).strip().splitlines()[0]}); nothing was "
                "trained. Check the network, hub_model_id and the token (hf auth login, or HF_TOKEN), or train "
                "without push_to_hub and then run: vpt-peft push <output_dir> <user/name>"
            ) from error

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer that `args.optim` names, with prompts, head and rest in groups of their own."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = make_optimizer(trained, self.method, self.args)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return the batches of one optimizer step, each image once."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        batches, weights = share_step(self.accelerator, batches)
        self._weights = iter(weights)
        return batches, items

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the loss as in the base class, times the weight of the batch."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss * self._weight
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step as in the base class.

        Raises:
            TrainingDiverged: the loss is not finite in some process. The weights are still those of the step before.
        """
        self._weight = next(self._weights, 1.0)
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            self._weight = 1.0
        joint = mean_over_processes(self.accelerator, loss)
        if not torch.isfinite(joint).all():
            raise TrainingDiverged(f"the training loss is {joint.item()} at step {self.state.global_step + 1}")
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """One batch of an evaluation; images that only fill up the last one do not count."""
        predictions: Any
        loss, predictions, targets = super().prediction_step(model, inputs, *args, **kwargs)
        if self.accelerator.num_processes > 1 and predictions is not None and not torch.is_tensor(targets):
            # Lists of boxes and masks differ between processes; only what is measured of them can be gathered
            self.preprocess_logits_for_metrics = None
            predictions = pad_over_processes(self.accelerator, self._measurable(predictions, targets))
            targets = torch.zeros(count_rows(inputs), device=self.args.device)
        own = count_own(self.accelerator, inputs)
        if loss is not None and own < count_rows(inputs):
            with torch.no_grad(), self.compute_loss_context_manager():
                counted = self._prepare_inputs(first_rows(inputs, max(own, 1)))
                loss = self.compute_loss(model, counted).detach()
        return loss, predictions, targets

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Sharded training gathers the weights itself and hands them over
        if state_dict is not None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        save_trained(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if (Path(resume_from_checkpoint) / BASELINE_CONFIG).is_file():
            load_trained(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint or ""
        if (Path(best) / BASELINE_CONFIG).is_file():
            load_trained(self.model, best)
        else:
            super()._load_best_model()
