"""Tables of a comparison or a sweep, in markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..reporting import Shown, markdown_table
from ..reporting.statistics import differences, per_data, summarize
from ..tasks import Task
from ..tasks.base import Metric


if TYPE_CHECKING:
    import pandas


def metric_named(task: Task, name: str) -> Metric:
    """The metric of a task by its name."""
    return next(metric for metric in task.metrics if metric.name == name)


def shown_as(metric: Metric) -> Shown:
    """How scores of a metric are shown."""
    return Shown(metric.label, metric.scale, 2 if metric.percent else 3)


def _text(show: Shown, value: float, deviation: float = math.nan) -> str:
    if math.isnan(value):
        return "-"
    return show.text(value) + ("" if math.isnan(deviation) else f" ± {show.text(deviation)}")


def summary_table(
    results: pandas.DataFrame, column: str, metric: Metric, groups: Mapping[str, str] | None, rows: Sequence[str]
) -> str:
    """Return what each row reached and cost; see `summarize`."""
    table, show = summarize(results, column, groups), shown_as(metric)
    several = results["data"].nunique() > 1
    lines = []
    for row in rows:
        if row not in table.index:
            lines.append({"method": row, "runs": "0"})
            continue
        found = table.loc[row]
        line = {
            "method": row,
            f"mean {show.title}" if several else show.title: _text(show, found["mean"], found["std"]),
        }
        if groups:
            line["mean of groups"] = _text(show, found["group_mean"])
        line |= {
            "trainable": _count(found["method_parameters"]),
            "with head": _count(found["parameters"]),
            "file": _size(found["file_size"]),
            "s": f"{found['seconds']:.1f}",
            "memory": _size(found["memory"]),
        }
        if table["search_seconds"].any():
            line["search s"] = f"{found['search_seconds']:.0f}"
        if metric.percent and metric.higher_is_better:
            line["PPT"] = "-" if math.isnan(found["ppt"]) else f"{found['ppt']:.3f}"
        line["runs"] = f"{found['runs'] - found['failed']:.0f}"
        if table["failed"].any():
            line["failed"] = f"{found['failed']:.0f}"
        lines.append(line)
    return _table(lines, ["method"])


def data_table(
    results: pandas.DataFrame, column: str, metric: Metric, rows: Sequence[str], data: Sequence[str]
) -> str:
    """Return what each row reached on each data set."""
    (means, deviations), show = per_data(results, column), shown_as(metric)
    lines = [
        {"method": row}
        | {name: _text(show, means.at[row, name], deviations.at[row, name]) for name in data if name in means.columns}
        for row in rows
        if row in means.index
    ]
    return _table(lines, ["method"])


def difference_table(results: pandas.DataFrame, column: str, metric: Metric, rows: Sequence[str]) -> str:
    """Return how far the other rows are from the first; see `differences`."""
    reference, show = rows[0], shown_as(metric)
    found = differences(results, column, reference)
    lines = [
        {
            "method": str(row),
            f"minus {reference}": f"{show.scale * line['difference']:+.{show.digits}f}",
            "95 % interval": "-"
            if math.isnan(line["low"])
            else f"{show.scale * line['low']:+.{show.digits}f} to {show.scale * line['high']:+.{show.digits}f}",
            "lowest": f"{show.scale * line['lowest']:+.{show.digits}f} ({line['lowest_data']})",
            "pairs": f"{line['pairs']:.0f}",
        }
        for row, line in found.reindex([row for row in rows if row in found.index]).iterrows()
    ]
    return _table(lines, ["method", "lowest"]) if lines else ""


def trials_table(results: Sequence[Mapping[str, Any]], metric: str, task: Task) -> str:
    """Return the trials of a search, in the order given.

    Args:
        results: as `make_result` gives them; at least one.
        metric: by which settings are chosen, without a prefix.
        task: says how it is shown.
    """
    show = Shown("loss", digits=3) if metric == "loss" else shown_as(metric_named(task, metric))
    names = list(dict.fromkeys(name for each in results for name in each["run_info"]["settings"]))
    failed = any(each["run_info"]["error_msg"] for each in results)
    lines = []
    for each in results:
        found, settings = each["train_info"]["metrics"], each["run_info"]["settings"]
        line = {name: _value(settings[name]) if name in settings else "default" for name in names}
        line[f"validation {show.title}"] = _text(show, found.get(f"eval_{metric}", math.nan))
        if metric != "loss":
            line["validation loss"] = _text(Shown("", digits=3), found.get("eval_loss", math.nan))
        line["s"] = _text(Shown(""), found.get("train_runtime", math.nan))
        if failed:
            # The first sentence; the whole text is in the result's file
            line["failed"] = each["run_info"]["error_msg"].split(". ")[0]
        lines.append(line)
    return _table(lines, [*names, "failed"])


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _size(value: float) -> str:
    if not value or math.isnan(value):
        return "-"
    return f"{value / 1e6:,.2f} MB" if value < 1e7 else f"{value / 1e6:,.0f} MB"


def _table(lines: list[dict[str, str]], left: Sequence[str]) -> str:
    titles = dict.fromkeys(name for line in lines for name in line)
    return markdown_table([{title: line.get(title, "-") for title in titles} for line in lines], left=left)
