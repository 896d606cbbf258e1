"""A linear probe taken to its optimum: multinomial logistic regression on cached features, by L-BFGS."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import EvalPrediction
from transformers.trainer_utils import TrainOutput

from ..plots.embeddings import embeddings
from ..tasks import Task
from .arguments import MethodArguments, VPTTrainingArguments
from .feature_cache import CachedFeatures
from .features import SplitPoint


logger = logging.getLogger(__name__)

# L2 penalties on the weights, for features whose variance is 1 on average; the strongest first, as it is fitted fastest
PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(2, -11, -1))
_FOLDS = 5
_MAX_ITERATIONS = 200


def layer_to_fit(method: MethodArguments, split_point: SplitPoint | None, train_dataset: Any) -> nn.Linear | None:
    """Return the head of a linear probe on cached features, if L-BFGS is asked for and it is one linear layer."""
    if method.solver != "lbfgs" or split_point is None or not isinstance(train_dataset, CachedFeatures):
        return None
    return (
        split_point.module if isinstance(split_point.module, nn.Linear) and train_dataset.features.ndim == 2 else None
    )


def fit_head(
    head: nn.Linear,
    task: Task,
    training: VPTTrainingArguments,
    train_dataset: CachedFeatures,
    eval_dataset: CachedFeatures | None,
) -> TrainOutput:
    """Fit a linear head; the penalty is that with the best `metric_for_best_model`, and among equals the least loss.

    It is chosen on `eval_dataset`, and without one by cross-validation over the training images. The result depends on
    no learning rate, batch size or order of images; the seed draws the folds.

    Args:
        head: changed in place.
        task: measures.
        training: gives metric, seed and device.
        train_dataset: features `(images, width)` and labels to fit.
        eval_dataset: likewise, to choose on.

    Returns:
        As of `Trainer.train`: the loss on the training images, and "train_runtime".
    """
    start = time.perf_counter()
    features, labels = _tensors(train_dataset, training.device)
    scale, centre = _spread(features)
    features = (features - centre) / scale
    if eval_dataset is not None:
        held, held_labels = _tensors(eval_dataset, training.device)
        parts = [((features, labels), (held - centre) / scale)]
    else:
        folds = _folds(labels, training.seed)
        rest = [torch.cat(folds[:index] + folds[index + 1 :]) for index in range(len(folds))]
        parts = [((features[r], labels[r]), features[f]) for r, f in zip(rest, folds, strict=True)]
        held_labels = labels[torch.cat(folds)]

    def merit(logits: Iterable[torch.Tensor]) -> tuple[float, float]:
        joined = torch.cat(list(logits))
        loss = F.cross_entropy(joined, held_labels).item()
        prediction = EvalPrediction(joined.cpu().numpy(), held_labels.cpu().numpy())
        found = {**task.compute_metrics()(prediction, compute_result=True), "loss": loss}
        value = found[str(training.metric_for_best_model).removeprefix("eval_")]
        return (value if training.greater_is_better else -value), -loss

    paths = [_regression_path(*fitted, head.out_features) for fitted, _ in parts]
    merits = {
        penalty: merit(F.linear(held, *solution) for (_, held), solution in zip(parts, solutions, strict=True))
        for penalty, *solutions in zip(PENALTIES, *paths, strict=True)
    }
    best = max(merits, key=lambda penalty: merits[penalty])
    weight, bias = dict(zip(PENALTIES, _regression_path(features, labels, head.out_features), strict=True))[best]
    loss = F.cross_entropy(F.linear(features, weight, bias), labels).item()
    _fill(head, weight / scale, bias, centre)
    seconds = time.perf_counter() - start
    logger.info("Fitted the head by L-BFGS in %.1f s; chose the penalty %.2g of %d.", seconds, best, len(PENALTIES))
    return TrainOutput(0, loss, {"train_loss": loss, "train_runtime": seconds})


@torch.no_grad()
def start_as_probe(model: nn.Module, head: nn.Linear, batches: Iterable[Mapping[str, Any]], seed: int) -> None:
    """Let a linear head start as the logistic regression on what it reads of the model as it is.

    The penalty is the one with the least loss in cross-validation.

    Args:
        model: runs once on all batches, in evaluation mode.
        head: changed in place.
        batches: model inputs with "labels" `(batch,)`.
        seed: draws the folds.
    """
    features, targets = embeddings(model, batches)
    features, targets = features.to(head.weight.device, torch.float64), targets.to(head.weight.device)
    scale, centre = _spread(features)
    features = (features - centre) / scale
    folds = _folds(targets, seed)
    losses = torch.zeros(len(PENALTIES))
    for index, held in enumerate(folds):
        rest = torch.cat(folds[:index] + folds[index + 1 :])
        for place, solution in enumerate(_regression_path(features[rest], targets[rest], head.out_features)):
            losses[place] += F.cross_entropy(F.linear(features[held], *solution), targets[held], reduction="sum")
    best = int(losses.argmin())
    weight, bias = next(islice(_regression_path(features, targets, head.out_features), best, None))
    _fill(head, weight / scale, bias, centre)


def _spread(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The one scale by which features have a variance of 1 on average, and their centre."""
    return features.var(0).mean().sqrt().clamp_min(1e-12), features.mean(0)


@torch.no_grad()
def _fill(head: nn.Linear, weight: torch.Tensor, bias: torch.Tensor, centre: torch.Tensor) -> None:
    """Set a head to weights for features from which their centre is taken."""
    head.weight.copy_(weight)
    head.bias.copy_(bias - weight @ centre)


def _tensors(dataset: CachedFeatures, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([target["labels"] for target in dataset.targets], device=device)
    return torch.tensor(dataset.features, dtype=torch.float64, device=device), labels


def _folds(labels: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Deal the row numbers to folds in which each class has the same share, up to one image."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    dealt = shuffled[labels[shuffled].argsort(stable=True)]
    return [dealt[fold::_FOLDS] for fold in range(min(_FOLDS, len(labels)))]


def _regression_path(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield weight `(classes, width)` and bias `(classes,)` for each penalty, each fit starting from the one before."""
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    for penalty in PENALTIES:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=_MAX_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )

        def closure(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        yield weight.detach().clone(), bias.detach().clone()
