"""Tables that read well as plain text, and metrics of any task with their titles and units."""

import sys

import pytest

from vpt_peft.reporting import describe, markdown_table, metric_names, shown


def test_a_table_is_markdown_and_aligned():
    rows = [{"method": "vpt", "value": "1.5"}, {"method": "a|b", "value": "1,000.25"}, {"method": "lora", "value": ""}]
    lines = markdown_table(rows, left=["method"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [line.replace(r"\|", "/").strip("|").split("|") for line in lines]
    assert [[cell.strip() for cell in row] for row in cells if ":" not in row[0]] == [
        ["method", "value"],
        ["vpt", "1.5"],
        ["a/b", "1,000.25"],
        ["lora", ""],
    ]
    rule = cells[1]
    assert rule[0].startswith(":") and not rule[0].endswith(":") and rule[1].endswith(":")
    assert cells[2][0].startswith(" vpt ") and cells[2][1].endswith(" 1.5 ")
    # Text stays as it is written, also where it looks like a number
    assert "| 1.50 " in markdown_table([{"x": "1.50"}], left=["x"]) and "1e-3" in markdown_table([{"x": "1e-3"}])


@pytest.mark.parametrize("missing", ["pandas", "tabulate"])
def test_a_missing_package_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"tables need {missing}: pip install 'vpt_peft\[train\]'"):
        markdown_table([{"x": "1"}])


def test_metrics_are_found_among_the_figures_of_an_evaluation():
    results = {
        "epoch": 2.0, "eval_loss": 0.5, "eval_mean_iou": 0.4, "eval_runtime": 1.0, "eval_samples": 50,
        "eval_samples_per_second": 9.0, "eval_steps_per_second": 1.0, "test_rmse": 3.0, "test_loss": 1.0,
        "train_loss": 0.1, "eval_model_preparation_time": 0.1,
    }  # fmt: skip
    assert metric_names(results, "eval") == ["mean_iou"] and metric_names(results, "test") == ["rmse"]


@pytest.mark.parametrize(
    ("name", "values", "title", "text"),
    [
        ("eval_mean_iou", [0.25, 0.5], "validation mean_iou (%)", "25.00"),
        ("test_macro_f1", [0.0, 1.0], "test macro_f1 (%)", "0.00"),
        ("test_rmse", [0.25, 1.5], "test rmse", "0.250"),
        ("eval_loss", [0.25, 0.5], "validation loss", "0.250"),
        ("trainable_parameters", [12345.0], "trainable parameters", "12,345"),
        ("train_runtime", [1234.56], "seconds", "1,234.6"),
        ("epoch", [2.0], "epoch", "2.000"),
    ],
)
def test_titles_and_units(name, values, title, text):
    column = shown(name, values)
    assert (column.title, column.text(values[0])) == (title, text)


def test_settings_as_a_line():
    assert describe({"learning_rate": 0.001, "method": "vpt"}) == "learning_rate=0.001, method=vpt"
    assert describe({}) == "as given"
