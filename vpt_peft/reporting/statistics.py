"""Means, deviations and paired differences of a comparison's results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import pandas

# Where the penalty of PPT sets in
_PPT_PARAMETERS = 1e7


def ppt(score: float, parameters: float) -> float:
    """Return the performance-parameter trade-off of V-PETL Bench, M exp(-log10(P / 10^7 + 1)).

    Args:
        score: M, a share from 0 to 1.
        parameters: P, trainable ones without the head.
    """
    return score * math.exp(-math.log10(parameters / _PPT_PARAMETERS + 1))


def scores(results: pandas.DataFrame, column: str) -> pandas.DataFrame:
    """Return the tested scores, one row per draw, seed and row, one column per data set; NaN where a run failed."""
    tested = results[results["stage"] == "test"]
    return tested.pivot_table(index=["row", "draw", "seed"], columns="data", values=column, dropna=False)


def summarize(results: pandas.DataFrame, column: str, groups: Mapping[str, str] | None = None) -> pandas.DataFrame:
    """Return one row per row of the comparison.

    A row counts as a whole: where a run of a data set failed or has not ended, means over data sets are NaN.

    Args:
        results: of `read_results`.
        column: the tested score, such as "test_macro_f1".
        groups: the group of each data set, for the second mean of VTAB.

    Returns:
        Columns "mean" over data sets, "std" of that mean over draws and seeds, "group_mean" where there are groups,
        "parameters", "method_parameters" (without the head), "file_size", "seconds" of training, each a mean over
        data sets, "memory" (the most), "search_seconds" (of all searches), "ppt", "runs", "failed".
    """
    import pandas

    by_run = scores(results, column)
    names = list(by_run.columns)
    per_run = by_run.mean(axis=1, skipna=False)
    by_row = per_run.groupby("row")
    table = pandas.DataFrame({"mean": by_row.mean(), "std": by_row.std()})
    # One run that failed must not pass unseen in a mean over the others
    table.loc[by_run.isna().any(axis=1).groupby("row").any(), ["mean", "std"]] = math.nan
    if groups:
        of_group = by_run.T.groupby([groups[name] for name in names]).mean().T
        table["group_mean"] = of_group.mean(axis=1, skipna=False).groupby("row").mean().where(table["mean"].notna())
    tested = results[results["stage"] == "test"].assign(
        method_parameters=lambda frame: frame["parameters"] - frame["head_parameters"]
    )
    per_set = tested.groupby(["row", "data"])[["parameters", "method_parameters", "file_size", "seconds"]].mean()
    table = table.join(per_set.groupby("row").mean()).join(tested.groupby("row")["memory"].max())
    searched = results[results["stage"] == "search"].groupby("row")["total_seconds"].sum()
    table["search_seconds"] = searched.reindex(table.index, fill_value=0.0)
    table["ppt"] = [ppt(row["mean"], row["method_parameters"]) for _, row in table.iterrows()]
    table["runs"] = tested.groupby("row").size()
    table["failed"] = (tested["error"] != "").groupby(tested["row"]).sum()
    return table


def per_data(results: pandas.DataFrame, column: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Return mean and deviation over draws and seeds, one row per row, one column per data set."""
    by_run = scores(results, column).groupby("row")
    return by_run.mean(), by_run.std()


def differences(results: pandas.DataFrame, column: str, reference: str, level: float = 0.95) -> pandas.DataFrame:
    """Return how far every other row is from `reference`, with an interval.

    Runs are paired by data set, draw and seed, and seeds are averaged first, as they share their images. The interval
    is that of Student's t over data sets x draws; it needs two of them.

    Args:
        results: of `read_results`.
        column: the tested score.
        reference: the row that is subtracted.
        level: of the interval.

    Returns:
        Columns "difference", "low", "high", "pairs", "lowest" and "lowest_data", the data set with the lowest mean
        difference.
    """
    import pandas
    from scipy import stats

    by_draw = scores(results, column).groupby(["row", "draw"]).mean()
    rows = {}
    for row in by_draw.index.get_level_values("row").unique().drop(reference, errors="ignore"):
        apart = (by_draw.loc[row] - by_draw.loc[reference]).stack().dropna()
        if apart.empty:
            continue
        low = high = math.nan
        if len(apart) > 1:
            low, high = (
                stats.t.interval(level, len(apart) - 1, apart.mean(), stats.sem(apart))
                if apart.std()
                else (
                    apart.mean(),
                    apart.mean(),
                )
            )
        sets = apart.groupby("data").mean()
        rows[row] = {
            "difference": apart.mean(),
            "low": low,
            "high": high,
            "pairs": len(apart),
            "lowest": sets.min(),
            "lowest_data": sets.idxmin(),
        }
    return pandas.DataFrame.from_dict(rows, orient="index")
