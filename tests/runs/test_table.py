"""Tables of trials: means, deviations, titles and units as the task has them."""

from types import SimpleNamespace

from vpt_peft.runs.table import trials_table
from vpt_peft.runs.trials import Trial
from vpt_peft.tasks.base import Metric


TASK = SimpleNamespace(
    metrics=(Metric("mean_iou", "Mean IoU", "mean_iou"), Metric("rmse", "Error", "rmse", False, False))
)


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_mean_and_deviation_in_the_units_of_the_task():
    metrics = [
        {
            "eval_mean_iou": 0.5,
            "test_rmse": 0.25,
            "eval_loss": 1.5,
            "trainable_parameters": 1234,
            "train_runtime": 2.0,
        },
        {
            "eval_mean_iou": 0.6,
            "test_rmse": 0.75,
            "eval_loss": 2.5,
            "trainable_parameters": 1234,
            "train_runtime": 4.0,
        },
    ]
    trials = [
        Trial({"learning_rate": 1e-3}, ["a", "b"], metrics),
        Trial({"learning_rate": 0.5}, ["c"], metrics[:1], {"1": "loss is nan. Lower the rate."}),
        Trial({"learning_rate": 2.0}, errors={"0": "a | b", "1": "out of memory"}),
    ]
    results = ["eval_mean_iou", "eval_loss", "test_rmse", "test_mean_iou", "trainable_parameters", "train_runtime"]
    header, _, both, one, none = cells(trials_table(trials, results, TASK).replace(r"\|", "/"))
    assert header == [
        "learning_rate", "runs", "validation mean IoU (%)", "validation loss", "test error", "trainable parameters",
        "seconds", "failed",
    ]  # fmt: skip
    assert both == ["0.001", "2", "55.00 ± 7.07", "2.000 ± 0.707", "0.500 ± 0.354", "1,234", "3.0 ± 1.4", ""]
    assert one == ["0.5", "1", "50.00", "1.500", "0.250", "1,234", "2.0", "seed 1: loss is nan"]
    assert none == ["2", "0", "-", "-", "-", "-", "-", "seed 0: a / b; seed 1: out of memory"]


def test_only_what_failed_has_a_column():
    header, _, row = cells(trials_table([Trial({"method": "vpt"}, ["a"], [{"eval_rmse": 2.0}])], ["eval_rmse"], TASK))
    assert header == ["method", "runs", "validation error"] and row == ["vpt", "1", "2.000"]
