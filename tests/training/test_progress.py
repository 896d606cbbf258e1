"""What a training run shows while it runs."""

from __future__ import annotations

import re

import pytest


pytest_plugins = ["training_fixtures"]


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_one_line_per_epoch(run, capsys, disable_tqdm):
    metrics, _ = run(disable_tqdm=disable_tqdm, num_train_epochs=2)
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line]
    pattern = r"epoch (\d): training loss [\d.]+, validation loss [\d.]+, accuracy ([\d.]+), macro f1 [\d.]+"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [match and match[1] for match in found] == ["1", "2"]
    assert abs(max(float(match[2]) for match in found) - metrics["eval_accuracy"]) < 1e-3
    bars = [part for part in re.split(r"[\r\n]", captured.err) if "%|" in part and "Loading weights" not in part]
    assert bool(bars) != disable_tqdm


def test_lines_where_nothing_is_evaluated(run, capsys):
    run(disable_tqdm=True, num_train_epochs=2, eval_strategy="no", load_best_model_at_end=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [re.fullmatch(r"epoch (\d): training loss [\d.]+", line)[1] for line in lines] == ["1", "2"]
