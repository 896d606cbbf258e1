"""The linear probe: the optimum of logistic regression, the penalty chosen on validation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from vpt_peft.tasks import get_task
from vpt_peft.tasks.classification import TASK
from vpt_peft.training import probe
from vpt_peft.training.arguments import parse_args
from vpt_peft.training.train import train
from vpt_peft.training.trainer_inputs import start_head


pytest_plugins = ["training_fixtures"]


def blobs(images, classes, seed, spread=1.5):
    """Overlapping classes in 12 dimensions, far from the origin and of unequal scale."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = np.random.default_rng(0).normal(size=(classes, 12))
    features = 40 + 0.01 * np.arange(1, 13) * (centres[labels] + spread * rng.normal(size=(images, 12)))
    return SimpleNamespace(features=features, targets=[{"labels": int(label)} for label in labels])


def labels_of(dataset):
    return np.array([target["labels"] for target in dataset.targets])


def training(metric="accuracy", greater=True):
    return SimpleNamespace(seed=0, device="cpu", metric_for_best_model=metric, greater_is_better=greater)


def logits_of(head, dataset):
    with torch.no_grad():
        return head.double()(torch.tensor(dataset.features)).numpy()


@pytest.mark.parametrize("classes", [2, 5])
def test_each_fit_is_the_optimum(classes):
    data = blobs(100, classes, 1)
    features = torch.tensor(data.features)
    features = (features - features.mean(0)) / features.var(0).mean().sqrt()
    path = dict(
        zip(probe.PENALTIES, probe._regression_path(features, torch.tensor(labels_of(data)), classes), strict=True)
    )
    for penalty in (probe.PENALTIES[2], probe.PENALTIES[6]):
        weight, bias = path[penalty]
        found = torch.softmax(features @ weight.T + bias, -1).numpy()
        # Two classes are one difference of weights for scikit-learn, so half the penalty
        strength = (1 if classes > 2 else 2) / (penalty * len(found))
        expected = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(features.numpy(), labels_of(data))
        np.testing.assert_allclose(found, expected.predict_proba(features.numpy()), atol=2e-3)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_penalty_is_the_best_on_validation(metric):
    train_data, held = blobs(40, 4, 1, spread=3), blobs(80, 4, 2, spread=3)
    head = nn.Linear(12, 4)
    output = probe.fit_head(head, TASK, training(metric, metric != "loss"), train_data, held)
    centre, scale = train_data.features.mean(0), np.sqrt(train_data.features.var(0, ddof=1).mean())
    scaled, held_scaled = (train_data.features - centre) / scale, (held.features - centre) / scale
    references = [
        LogisticRegression(C=1 / (penalty * 40), max_iter=1000).fit(scaled, labels_of(train_data))
        for penalty in probe.PENALTIES
    ]
    found, wanted = logits_of(head, held), labels_of(held)
    if metric == "accuracy":
        best = max(each.score(held_scaled, wanted) for each in references)
        assert (found.argmax(-1) == wanted).mean() == pytest.approx(best, abs=0.0126)
    else:
        losses = [-each.predict_log_proba(held_scaled)[range(80), wanted].mean() for each in references]
        loss = nn.functional.cross_entropy(torch.tensor(found), torch.tensor(wanted)).item()
        assert loss == pytest.approx(min(losses), rel=0.02) and max(losses) > 1.2 * min(losses)
    # The loss on the training images is reported, and is that of the head
    own = nn.functional.cross_entropy(torch.tensor(logits_of(head, train_data)), torch.tensor(labels_of(train_data)))
    assert output.training_loss == pytest.approx(own.item(), rel=1e-3)


def test_without_validation_images_folds_choose():
    data, fresh = blobs(60, 3, 1, spread=3), blobs(300, 3, 2, spread=3)
    head = nn.Linear(12, 3)
    probe.fit_head(head, TASK, training(), data, None)
    chosen = (logits_of(head, fresh).argmax(-1) == labels_of(fresh)).mean()
    probe.fit_head(head, TASK, training(), data, fresh)
    best = (logits_of(head, fresh).argmax(-1) == labels_of(fresh)).mean()
    assert best - 0.05 <= chosen <= best


def test_folds_hold_every_class():
    labels = torch.tensor([0] * 5 + [1] * 10 + [2] * 6)
    folds = probe._folds(labels, seed=3)
    assert sorted(torch.cat(folds).tolist()) == list(range(21))
    assert {tuple(labels[fold].bincount(minlength=3).tolist()) for fold in folds} <= {(1, 2, 1), (1, 2, 2)}
    assert not torch.equal(torch.cat(folds), torch.cat(probe._folds(labels, seed=4)))


def test_classes_without_images_are_never_said():
    data = blobs(40, 4, 1)
    head = nn.Linear(12, 7)
    probe.fit_head(head, TASK, training(), data, data)
    assert set(logits_of(head, data).argmax(-1)) <= {0, 1, 2, 3}


def test_a_run_gives_what_scikit_learn_does(make_arguments, tmp_path):
    arguments = make_arguments(method="linear", num_train_epochs=None, feature_cache_dir=str(tmp_path / "features"))
    assert arguments.method.solver == "lbfgs"
    metrics = train(arguments)
    splits = TASK.read(arguments.data)
    arrays = {}
    for folder in (tmp_path / "features").iterdir():
        array = np.load(folder / "features.npy")
        arrays.setdefault(len(array), []).append(array)
    (features,), labels = arrays[96], {name: np.array(split["label"]) for name, split in splits.items()}
    assert len(arrays[50]) == 2
    scores = []
    for first, second in (arrays[50], arrays[50][::-1]):
        fits = [
            LogisticRegression(C=10.0**power, max_iter=3000).fit(features, labels["train"]) for power in range(-3, 5)
        ]
        best = max(fits, key=lambda fit: fit.score(first, labels["validation"]))
        scores.append((best.score(first, labels["validation"]), best.score(second, labels["test"])))
    validation, test = max(scores)
    # Among 96 images two penalties that are equal on validation may differ by two of the 50 test images
    assert metrics["eval_accuracy"] >= validation - 1e-9
    assert metrics["test_accuracy"] >= test - 0.041
    assert metrics["train_runtime"] > 0 and 0 < metrics["train_loss"] < 2.3


@pytest.mark.parametrize(
    "given", [{"learning_rate": 0.1}, {"num_train_epochs": 2}, {"optim": "sgd"}, {"max_steps": 3}]
)
def test_who_sets_the_optimizer_gets_it(given):
    assert parse_args({"method": "linear", **given}).method.solver == "optimizer"
    assert parse_args({"method": "linear", "solver": "lbfgs", **given}).method.solver == "lbfgs"


class Reader(nn.Module):
    """Logits of a linear head on the images themselves; noise shows whether it runs in training mode."""

    def __init__(self, classes):
        super().__init__()
        self.config = SimpleNamespace(num_labels=classes)
        self.noise, self.head = nn.Dropout(0.5), nn.Linear(12, classes)

    def forward(self, pixel_values):
        return self.head(self.noise(pixel_values))


def test_a_head_starts_as_the_regression_with_the_least_loss_in_cross_validation():
    data = blobs(60, 3, 1, spread=3)
    model = Reader(3).train()
    features, labels = torch.tensor(data.features, dtype=torch.float32), torch.tensor(labels_of(data))
    batches = [{"pixel_values": features[part], "labels": labels[part]} for part in torch.arange(60).split(25)]
    probe.start_as_probe(model, model.head, batches, seed=3)
    assert model.training
    centre, scale = data.features.mean(0), np.sqrt(data.features.var(0, ddof=1).mean())
    scaled, folds = (data.features - centre) / scale, [fold.numpy() for fold in probe._folds(labels, seed=3)]

    def fit(rows, penalty):
        return LogisticRegression(C=1 / (penalty * len(rows)), max_iter=3000).fit(scaled[rows], labels_of(data)[rows])

    def loss(penalty):
        held = [(fold, fit(np.setdiff1d(np.arange(60), fold), penalty)) for fold in folds]
        return -sum(
            f.predict_log_proba(scaled[rows])[range(len(rows)), labels_of(data)[rows]].sum() for rows, f in held
        )

    best = min(probe.PENALTIES, key=loss)
    assert probe.PENALTIES[0] > best > probe.PENALTIES[-1]
    with torch.no_grad():
        found = model.head(features).softmax(-1).numpy()
    np.testing.assert_allclose(found, fit(np.arange(60), best).predict_proba(scaled), atol=5e-3)


@pytest.mark.parametrize("method", ["vpt", "bias"])
def test_a_run_may_start_at_the_probe(make_arguments, tmp_path, method):
    scores = {}
    for start in ("zero", "probe"):
        arguments = make_arguments(
            method=method, head_init=start, learning_rate=1e-9, max_steps=1, output_dir=str(tmp_path / start)
        )
        scores[start] = train(arguments, with_test=False)["eval_accuracy"]
    assert scores["zero"] < 0.3 < 0.5 < scores["probe"]


def test_boxes_and_masks_have_no_probe(make_arguments):
    arguments = make_arguments(head_init="probe")
    with pytest.raises(ValueError, match="head_init='probe' is for a linear head .* use 'zero'"):
        start_head(get_task("object-detection"), Reader(3), [], arguments.method, arguments.training)


def test_only_a_linear_head_on_features_is_fitted(make_arguments):
    arguments = make_arguments(method="linear", num_train_epochs=None, cache_features=False, max_steps=2)
    assert probe.layer_to_fit(arguments.method, None, []) is None
    with pytest.raises(ValueError, match="solver='lbfgs' has no effect with method='vpt'"):
        parse_args({"method": "vpt", "solver": "lbfgs"})
