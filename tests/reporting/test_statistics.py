"""Means, deviations, paired intervals and PPT, against numbers worked out by hand."""

import math

import pandas
import pytest

from vpt_peft.reporting.statistics import differences, per_data, ppt, scores, summarize


def run(row, data, draw, seed, score, stage="test", **more):
    return {
        "row": row,
        "data": data,
        "stage": stage,
        "settings": {},
        "seed": seed,
        "draw": draw,
        "error": "" if score is not None else "diverged",
        "parameters": 1000,
        "head_parameters": 100,
        "file_size": 4000,
        "seconds": 2.0,
        "total_seconds": 5.0,
        "memory": 1e6,
        "test_accuracy": math.nan if score is None else score,
        **more,
    }


@pytest.fixture
def results():
    found = []
    # By row: (data a, data b) of two draws with two seeds each
    for row, values in (
        ("linear", {(0, 0): (0.5, 0.7), (0, 1): (0.5, 0.9), (1, 0): (0.6, 0.8), (1, 1): (0.6, 0.8)}),
        ("vpt", {(0, 0): (0.6, 0.9), (0, 1): (0.6, 0.9), (1, 0): (0.9, 0.8), (1, 1): (0.7, 0.8)}),
    ):
        for (draw, seed), (a, b) in values.items():
            found += [run(row, "a", draw, seed, a), run(row, "b", draw, seed, b, parameters=3000, seconds=4.0)]
    found += [run("vpt", "a", 0, 0, None, "search", total_seconds=60.0)] * 3
    return pandas.DataFrame(found)


def test_ppt_is_the_formula_of_its_paper():
    assert ppt(0.8, 0) == 0.8
    assert ppt(0.8, 9e7) == pytest.approx(0.8 * math.exp(-1))
    assert ppt(0.5, 1e7) == pytest.approx(0.5 * math.exp(-math.log10(2)))


def test_summary(results):
    table = summarize(results, "test_accuracy", {"a": "natural", "b": "structured"})
    assert table.loc["linear", "mean"] == pytest.approx((0.6 + 0.7 + 0.7 + 0.7) / 4)
    assert table.loc["linear", "std"] == pytest.approx(0.05)
    assert table.loc["vpt", "mean"] == pytest.approx((0.75 + 0.75 + 0.85 + 0.75) / 4)
    assert table.loc["vpt", "group_mean"] == pytest.approx(table.loc["vpt", "mean"])
    assert dict(table.loc["vpt", ["parameters", "method_parameters", "seconds", "runs", "failed"]]) == {
        "parameters": 2000,
        "method_parameters": 1900,
        "seconds": 3.0,
        "runs": 8,
        "failed": 0,
    }
    assert table["search_seconds"].to_dict() == {"linear": 0.0, "vpt": 180.0}
    assert table.loc["vpt", "ppt"] == pytest.approx(ppt(0.775, 1900))


def test_both_means_of_vtab():
    found = pandas.DataFrame([run("vpt", data, 0, 0, score) for data, score in (("a", 0.3), ("b", 0.6), ("c", 0.9))])
    table = summarize(found, "test_accuracy", {"a": "natural", "b": "natural", "c": "structured"})
    assert table.loc["vpt", "mean"] == pytest.approx(0.6)
    assert table.loc["vpt", "group_mean"] == pytest.approx((0.45 + 0.9) / 2)


@pytest.mark.parametrize("lost", ["failed", "missing"])
def test_a_row_with_a_lost_run_has_no_mean(results, lost):
    rows = results[(results["row"] == "vpt") & (results["data"] == "b") & (results["seed"] == 1)].index
    if lost == "failed":
        results.loc[rows[0], ["test_accuracy", "error"]] = [math.nan, "diverged"]
    else:
        results = results.drop(rows[0])
    table = summarize(results, "test_accuracy", {"a": "natural", "b": "structured"})
    assert math.isnan(table.loc["vpt", "mean"]) and math.isnan(table.loc["vpt", "group_mean"])
    assert not math.isnan(table.loc["linear", "mean"])
    assert table.loc["vpt", "failed"] == (lost == "failed")


def test_per_data(results):
    means, deviations = per_data(results, "test_accuracy")
    assert means.loc["linear"].to_dict() == pytest.approx({"a": 0.55, "b": 0.8})
    assert deviations.loc["linear", "b"] == pytest.approx(math.sqrt(0.02 / 3))


def test_differences_are_paired_by_data_and_draw(results):
    found = differences(results, "test_accuracy", "linear")
    assert list(found.index) == ["vpt"]
    # a: 0.1 and 0.2, b: 0.1 and 0.0, over 4 pairs
    line = found.loc["vpt"]
    assert line["difference"] == pytest.approx(0.1) and line["pairs"] == 4
    half = 3.182446 * math.sqrt((0.01 + 0.01) / 3) / 2
    assert (line["low"], line["high"]) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    assert line["lowest_data"] == "b" and line["lowest"] == pytest.approx(0.05)
    # The spread over draws that both share does not widen the interval
    shifted = results.assign(test_accuracy=results["test_accuracy"] + 0.3 * results["draw"])
    assert differences(shifted, "test_accuracy", "linear").loc["vpt", "high"] == pytest.approx(line["high"])


def test_one_pair_has_no_interval(results):
    one = results[(results["data"] == "a") & (results["draw"] == 0)]
    line = differences(one, "test_accuracy", "linear").loc["vpt"]
    assert line["pairs"] == 1 and math.isnan(line["low"])
    assert len(scores(one, "test_accuracy")) == 4
