"""The benchmark of dense tasks: what is compared with what, and its table."""

import pandas
import pytest

from benchmarks import dense_tasks
from benchmarks.dense_tasks import DATA, RATES, comparisons, table
from vpt_peft.runs.comparison import Comparison


def result(row, stage, rate, seed=0, **metrics):
    head = 100 if row != "full" else 40
    return {
        "row": row, "stage": stage, "error": "", "seed": seed, "settings": {"learning_rate": rate},
        "parameters": {"linear": 100, "vpt": 130, "full": 1040}[row], "head_parameters": head, **metrics,
    }  # fmt: skip


def scores(split, mean_iou):
    return {f"{split}_mean_iou": mean_iou, f"{split}_mean_accuracy": 0.5, f"{split}_pixel_accuracy": 0.75}


def test_the_table():
    rows = [
        result("linear", "search", 0.01, **scores("eval", 0.30)),
        result("linear", "search", 0.003, **scores("eval", 0.20)),
        result("linear", "test", 0, **scores("test", 0.40)),
        result("vpt", "search", 0.02, **scores("eval", 0.35)),
        result("vpt", "test", 0, **scores("test", 0.44)),
        result("vpt", "test", 0, seed=1, **scores("test", 0.46)),
        result("full", "search", 1e-4, **scores("eval", 0.36)),
        result("full", "test", 0, **scores("test", 0.60)),
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table(pandas.DataFrame(rows), "camvid", "test").splitlines()
    ]
    found = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert list(found) == ["head only", "VPT-deep", "full"]
    assert found["VPT-deep"]["mean IoU (%)"] == "45.00 ± 1.41" and found["VPT-deep"]["seeds"] == "2"
    assert found["VPT-deep"]["of the way"] == "25%" and found["VPT-deep"]["beside the head"] == "30"
    assert found["head only"]["rate"] == "0.01" and found["full"]["beside the head"] == "1,000"
    searched = table(pandas.DataFrame(rows), "camvid", "search")
    assert "30.00" in searched and "20.00" not in searched and "83%" in searched
    assert table(pandas.DataFrame(rows[:1]), "camvid", "test") == ""


@pytest.mark.parametrize("name", DATA)
def test_all_have_the_head_of_the_first_search(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Comparison, "search", lambda self: self._chosen.update({("linear", name): {"learning_rate": 0.01}})
    )
    monkeypatch.setattr(Comparison, "has_test", lambda self, data: True)
    head, others = comparisons(name, tmp_path, tmp_path, [0, 1])
    assert [*head.rows, *others.rows] == list(RATES)
    others.check()
    for row in others.rows:
        tried = others.arguments(row, name, "search", {"learning_rate": 0.002})
        assert (tried.method.head_learning_rate, tried.training.learning_rate) == (0.01, 0.002)
        assert tried.training.max_steps == DATA[name]["max_steps"] and not tried.data.train_on_validation
        tested = others.arguments(row, name, "test", {"seed": 1, "split_seed": 0})
        assert tested.data.train_on_validation and tested.training.seed == 1
        assert tested.training.max_steps == DATA[name]["max_steps"]
    assert head.arguments("linear", name, "test", {}).training.learning_rate == 0.01
    monkeypatch.setattr(Comparison, "search", lambda self: None)
    with pytest.raises(RuntimeError, match="no rate of the head"):
        dense_tasks.comparisons(name, tmp_path, tmp_path, [0])
