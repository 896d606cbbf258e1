"""What a training run shows while it runs."""

from __future__ import annotations

import re

from vpt_peft.training.trainer import ReadableProgress, VPTTrainer


pytest_plugins = ["training_fixtures"]


def test_lines_of_words(run, capsys):
    metrics, _ = run(disable_tqdm=False, num_train_epochs=2)
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == [
        "epoch 1, training",
        "epoch 1, validation",
        "epoch 2, training",
        "epoch 2, validation",
    ]
    assert re.fullmatch(r"epoch 1, training: loss [\d.]+", lines[0])
    accuracies = [float(re.search(r"accuracy ([\d.]+), macro f1 [\d.]+$", line).group(1)) for line in lines[1::2]]
    assert abs(max(accuracies) - metrics["eval_accuracy"]) < 1e-3
    assert "{'" not in shown


def test_not_without_a_bar(run, monkeypatch):
    seen = []
    original = VPTTrainer.train
    monkeypatch.setattr(
        VPTTrainer, "train", lambda self, **kw: (seen.append(self.callback_handler.callbacks), original(self, **kw))[1]
    )
    run(disable_tqdm=True)
    assert seen and not any(isinstance(callback, ReadableProgress) for callback in seen[0])
