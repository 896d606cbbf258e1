"""Search default recipes: methods x data sets x pre-trainings, the same settings of a method on all of them.

    python -m benchmarks.recipe_search --output_dir search            # runs, or goes on where it was interrupted
    python -m benchmarks.recipe_search --output_dir search --report   # shows what has ended so far

Any number of processes may work on one folder. Nothing is tested: recipes are chosen by their mean rank on validation.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas

from vpt_peft.methods import METHODS
from vpt_peft.reporting.results import read_results
from vpt_peft.runs.comparison import Comparison
from vpt_peft.runs.search import search_space
from vpt_peft.training.arguments import MethodArguments

from .recipe_data import prepare


ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("linear", "vpt", "lora", "gated_vpt", "vpt_shallow", "bias", "full")},
    "vpt+bias": {"method": "vpt", "bias": ["value", "output", "mlp", "norm"]},
    "vpt+rank": {"method": "vpt", "prompt_rank": 4},
    **{name: {"method": name} for name in ("vpt+lora", "adapter", "partial")},
}
# The papers' way for MAE, whose class token was never trained; heads of other methods read that token
_STARTS: dict[str, dict[str, Any]] = {"mae": {"pooling": "image_prompt", "pool_before_norm": True}}
_IMAGES = {"max_train_samples": 200, "max_eval_samples": 200}


def available_rows() -> dict[str, dict[str, Any]]:
    """Return the rows whose methods and flags this version has."""
    flags = {each.name for each in fields(MethodArguments)}
    return {name: row for name, row in ROWS.items() if row["method"] in METHODS and row.keys() <= flags}


def make_search(output_dir: Path, shared: Path, size: int, num_trials: int, epochs: Sequence[float]) -> Comparison:
    """Return the search; data and backbones are made where they are not there yet.

    Args:
        output_dir: of everything.
        shared: holds `datasets/` and `models/`.
        size: image size of the ViT-Tiny; the embedded backbone has its own.
        num_trials: settings per method.
        epochs: numbers of epochs among which is searched.
    """
    data, backbones = prepare(shared.resolve(), output_dir.resolve(), size)
    rows = available_rows()
    pools = any("pooling" in METHODS[row["method"]].flags for row in rows.values())
    return Comparison(
        common={"seed": 0, **_IMAGES, "feature_cache_dir": str(output_dir.resolve() / "features")},
        rows=rows,
        data={
            f"{name}-{start}": {
                "dataset_name": folder,
                "model_name_or_path": backbone,
                **(_STARTS.get(start, {}) if pools else {}),
            }
            for start, backbone in backbones.items()
            for name, folder in data.items()
        },
        spaces={
            name: {**search_space(row["method"]), "num_train_epochs": list(epochs), "head_init": ["zero", "probe"]}
            for name, row in rows.items()
        },
        output_dir=output_dir / "comparison",
        seeds=[0],
        num_trials=num_trials,
    )


def rank_settings(results: pandas.DataFrame, score: str) -> pandas.DataFrame:
    """Return the settings of every method with their mean rank and mean score over the data sets, best first.

    Ranks are among the settings of one method on one data set; a failed run is last. Only settings that have ended on
    all data sets on which the method has results are comparable, so "sets" counts them.

    Args:
        results: of `read_results`.
        score: the column by which settings are chosen, more being better.
    """
    found = results[results["stage"] == "search"].copy()
    found["setting"] = [", ".join(f"{k}={v}" for k, v in each.items()) or "default" for each in found["settings"]]
    found["rank"] = found.groupby(["row", "data"])[score].rank(ascending=False, na_option="bottom")
    best = found.groupby(["row", "data"])[score].transform("max")
    found["below_best"] = best - found[score]
    table = found.groupby(["row", "setting"]).agg(
        mean_rank=("rank", "mean"),
        score=(score, "mean"),
        below_best=("below_best", "mean"),
        sets=("data", "nunique"),
        hours=("total_seconds", lambda seconds: seconds.sum() / 3600),
    )
    return table.sort_values(["row", "mean_rank"]).reset_index()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds datasets/ and models/")
    parser.add_argument("--size", type=int, default=112, help="image size of the ViT-Tiny")
    parser.add_argument("--num_trials", type=int, default=8, help="settings per method")
    parser.add_argument("--epochs", type=float, nargs="+", default=[10.0, 20.0, 40.0], help="values searched")
    parser.add_argument("--report", action="store_true", help="show what has ended, and run nothing")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not options.report:
        search = make_search(options.output_dir, options.shared, options.size, options.num_trials, options.epochs)
        search.check()
        search.search()
    results = read_results(options.output_dir / "comparison")
    print(rank_settings(results, "eval_accuracy").to_markdown(index=False, floatfmt=".3f"))
    print(f"\n{len(results)} runs, {results['total_seconds'].sum() / 3600:.2f} hours of one process.")


if __name__ == "__main__":
    main()
