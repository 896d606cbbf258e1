"""What a comparison or a sweep found: tables to print and to keep, and a picture."""

from __future__ import annotations

import logging

from ..files import write_whole
from ..plots.comparison import draw_comparison
from ..reporting import describe
from ..reporting.results import read_results
from .comparison import Comparison
from .published import published_table
from .table import data_table, difference_table, metric_named, shown_as, summary_table, trials_table


logger = logging.getLogger(__name__)

REPORT = "report.md"
PICTURE = "report.png"


def report(comparison: Comparison, searched: bool) -> tuple[str, bool]:
    """Return the tables as markdown, and whether anything ended well; both go into the output folder too.

    Args:
        comparison: all of whose runs have ended.
        searched: begin with the trials of the search, best first.
    """
    results = read_results(comparison.output_dir)
    results = results[results["row"].isin(comparison.rows) & results["data"].isin(comparison.data)]
    task, rows, data = comparison.task, list(comparison.rows), list(comparison.data)
    metric = metric_named(task, task.best_metric)
    tested = results[(results["stage"] == "test") & (results["error"] == "")]
    column = (
        f"test_{metric.name}"
        if f"test_{metric.name}" in tested and tested[f"test_{metric.name}"].notna().any()
        else f"eval_{metric.name}"
    )
    parts = []
    if searched:
        parts += [trials_table(comparison.ranked(*pair), comparison.metric, task) for pair in comparison.pairs]
        for pair in comparison.pairs:
            if (best := comparison.chosen(*pair)) is not None:
                parts.append(f"Best on {pair[1]}: {describe(best)}\n")
    parts += [
        f"{row} chose the most epochs searched on {', '.join(names)}; more may do better.\n"
        for row, names in comparison.longest_chosen().items()
    ]
    failures = results[(results["error"] != "")]
    parts += [
        f"{row['row']} on {row['data']} failed with {describe(row['settings'])}: {row['error'].split('. ')[0]}\n"
        for _, row in failures.iterrows()
        if row["stage"] == "test" or not searched
    ]
    if not tested.empty:
        tested_on = "test" if column.startswith("test_") else "validation"
        draws, seeds = len(comparison.draws), len(comparison.seeds)
        runs = "one run each"
        if draws * seeds > 1:
            runs = f"mean ± standard deviation, draws of images: {draws}, seeds: {seeds}"
        parts.append(f"{shown_as(metric).title} on {tested_on} images; {runs}:\n")
        parts.append(summary_table(results, column, metric, comparison.groups, rows))
        if len(data) > 1:
            parts.append(data_table(results, column, metric, rows, data))
        if len(rows) > 1:
            parts.append(difference_table(results, column, metric, rows))
        if comparison.suite is not None:
            parts.append(published_table(comparison.suite))
        try:
            draw_comparison(results, column, shown_as(metric), rows, comparison.output_dir / PICTURE)
        except ModuleNotFoundError as error:
            logger.info("No picture: %s", error)
    text = "\n".join(part for part in parts if part)
    write_whole(comparison.output_dir / REPORT, text)
    return text, not tested.empty
