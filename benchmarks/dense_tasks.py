"""What prompts bring to segmentation, detection and instances: methods with the same head, steps and search of a rate.

    python -m benchmarks.dense_tasks --output_dir dense                       # runs, or goes on where it was interrupted
    python -m benchmarks.dense_tasks --output_dir dense --seeds 0 1 2         # adds the seeds that are missing
    python -m benchmarks.dense_tasks --output_dir dense --report              # shows what has ended so far

The head's rate is searched with the head alone, and all methods have it. Then each searches its own rate on the
validation split, trains with the one chosen on training and validation images, and is tested once for each seed. Any
number of processes may work on one folder.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from vpt_peft.reporting.results import read_results
from vpt_peft.runs.comparison import Comparison
from vpt_peft.tasks import get_task


logger = logging.getLogger(__name__)

# Peak rates that are tried: of the head where it is alone, else of what trains beside it
RATES = {
    "linear": [3e-3, 1e-2],
    "vpt": [5e-3, 2e-2],
    "vpt+bias": [2e-3, 8e-3],
    "lora": [1e-3, 4e-3],
    "full": [1e-4, 3e-4],
}
_TITLES = {"linear": "head only", "vpt": "VPT-deep", "vpt+bias": "VPT-deep and biases", "lora": "LoRA", "full": "full"}
DATA: dict[str, dict[str, Any]] = {
    "camvid": {"task": "semantic-segmentation", "image_size": [128, 160], "max_steps": 100},
    "bccd": {"task": "object-detection", "image_size": [240, 320], "max_steps": 150},
    "nuclei": {"task": "instance-segmentation", "image_size": [224, 224], "max_steps": 100},
}
_COMMON = {
    "augmentation": "resize_crop_flip",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "weight_decay": 0.01,
}


def comparisons(name: str, output_dir: Path, shared: Path, seeds: Sequence[int], **flags: Any) -> list[Comparison]:
    """Run the search of the head's rate, and return the comparisons of a data set: of the head alone, and of the others.

    Args:
        name: key of `DATA`.
        output_dir: of everything; each data set has a folder there.
        shared: holds `datasets/` and `models/`.
        seeds: of the tested runs.
        flags: of training; they override those of `DATA`.

    Raises:
        RuntimeError: no rate of the head led to a result.
    """
    common = {
        **_COMMON,
        "model_name_or_path": str(shared / "models" / "vit-tiny-patch16-224"),
        "cache_dir": str(output_dir / "cache"),
        **DATA[name],
        **flags,
    }

    def make(methods: Sequence[str], **more: Any) -> Comparison:
        return Comparison(
            common={**common, **more},
            rows={method: {"method": method} for method in methods},
            data={name: {"dataset_name": str(shared / "datasets" / name)}},
            spaces={method: {"learning_rate": RATES[method]} for method in methods},
            output_dir=output_dir / name,
            seeds=seeds,
            sampler="grid",
            with_default=False,
        )

    head = make(["linear"])
    head.check()
    head.search()
    chosen = head.chosen("linear", name)
    if chosen is None:
        raise RuntimeError(f"{name}: no rate of the head led to a result; see {head.output_dir / 'results'}.")
    return [head, make([method for method in RATES if method != "linear"], head_learning_rate=chosen["learning_rate"])]


def table(results: pandas.DataFrame, name: str, stage: str) -> str:
    """Return the runs of a data set that ended as markdown: means over the seeds, and the share of the way to full.

    Args:
        results: of `read_results`.
        name: key of `DATA`.
        stage: "test", or "search" for the best trial of each method on the validation split.
    """
    task = get_task(DATA[name]["task"])
    ended = results[results["error"] == ""]
    searched = ended[ended["stage"] == "search"].sort_values(f"eval_{task.best_metric}").groupby("row").tail(1)
    shown, split = (searched, "eval") if stage == "search" else (ended[ended["stage"] == "test"], "test")
    if shown.empty:
        return ""
    means = shown.groupby("row")[f"{split}_{task.best_metric}"].mean()
    lines = []
    for row in (row for row in RATES if row in means):
        found, chosen = shown[shown["row"] == row], searched[searched["row"] == row]
        beside = found["parameters"].iloc[0] - found["head_parameters"].iloc[0]
        line = {"": _TITLES[row], "beside the head": f"{beside:,}"}
        for metric in task.metrics:
            values = metric.scale * found[f"{split}_{metric.name}"]
            line[metric.label] = f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")
        if {"linear", "full"} <= set(means.index):
            way = (means[row] - means["linear"]) / (means["full"] - means["linear"])
            line["of the way"] = f"{way:.0%}"
        line["rate"] = f"{chosen['settings'].iloc[0]['learning_rate']:g}"
        line["seeds"] = str(len(found))
        lines.append(line)
    return pandas.DataFrame(lines).fillna("-").to_markdown(index=False, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds datasets/ and models/")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first is the search's, too")
    parser.add_argument("--report", action="store_true", help="show what has ended, and run nothing")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output_dir, shared = options.output_dir.resolve(), options.shared.resolve()
    for name in options.data:
        if not options.report:
            head, others = comparisons(name, output_dir, shared, options.seeds)
            others.search()
            head.test()
            others.test()
        try:
            results = read_results(output_dir / name)
            for stage, title in (("search", "best of the search, validation"), ("test", "test")):
                print(f"\n{name}, {title}\n\n{table(results, name, stage) or 'nothing yet'}", flush=True)
        except FileNotFoundError:
            logger.info("%s: nothing has ended.", name)


if __name__ == "__main__":
    main()
