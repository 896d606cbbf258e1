"""Search settings on the validation split, and look at the test split once, with the best of them.

The VPT paper chooses learning rate and weight decay from a grid this way (Jia et al. 2022, arXiv 2203.12119).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import write_json
from ..reporting import describe
from ..tasks import get_task
from ..training.evaluation import evaluate_model
from ..training.facts import add_test_results
from ..training.inference import load_adapter_model
from .grid import Grid
from .study import import_optuna, run_study
from .trials import RUN_RESULT, Trial, claim_folder, parse_run, read_result, run_trial, write_results


SWEEP_RESULTS = "sweep_results.json"


def sweep(grid: Grid, sampler: str = "grid", num_trials: int | None = None) -> tuple[list[Trial], Trial | None, str]:
    """Run trials of the grid, none of them twice, and test the best.

    Finished runs are kept in their folders and interrupted ones are resumed, so the same call continues a sweep. The
    score of a trial is the mean over seeds of `eval_<metric_for_best_model>`; trials with a failed run come last.
    `sweep_results.json` is written after each trial.

    Args:
        grid (`Grid`): the flags.
        sampler (`str`): "grid" goes through all settings; "random" and "tpe" choose among them.
        num_trials (`int`, *optional*): most trials; by default all of them with "grid", else 20.

    Returns:
        The trials, best first; the first of them, or None if no trial ended well; and the name of the score.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
        ValueError: nothing varies, or a trial is wrong in itself; nothing was run.
    """
    import_optuna()
    if not grid.axes:
        raise ValueError("nothing varies; give a flag several values, as in --learning_rate 1e-3 5e-3.")
    if num_trials is not None and num_trials < 1:
        raise ValueError(f"num_settings={num_trials} must be at least 1.")
    for settings in grid.trials() if sampler == "grid" or not grid.has_ranges else []:
        parse_run(grid, settings, grid.seeds[0])
    training = parse_run(grid, grid.example(), grid.seeds[0]).training
    metric, maximize = str(training.metric_for_best_model).removeprefix("eval_"), bool(training.greater_is_better)
    score = f"eval_{metric}"
    path = claim_folder(grid, SWEEP_RESULTS)
    done: dict[str, Trial] = {}

    def ranked() -> list[Trial]:
        # On few images many trials share the best score; the loss decides among them
        def rank(trial: Trial) -> tuple[bool, float, float]:
            value = trial.mean(score) or 0.0
            return bool(trial.errors), -value if maximize else value, trial.mean("eval_loss") or 0.0

        return sorted(done.values(), key=rank)

    def run(settings: dict[str, Any]) -> Trial:
        key = describe(settings)
        if key not in done:
            done[key] = run_trial(grid, settings, with_test=False)
            write_results(path, ranked(), metric=metric)
        return done[key]

    write_results(path, [], metric=metric)
    run_study(grid, run, score, maximize, sampler, num_trials)
    trials = ranked()
    best = None if trials[0].errors else trials[0]
    if best is not None:
        test_once(grid, best, metric)
        write_results(path, trials, metric=metric, best=best.settings)
    return trials, best, score


def test_once(grid: Grid, best: Trial, metric: str) -> None:
    """Evaluate the runs of the best trial on the test split, if the data have one, and save the results with them."""
    arguments = [parse_run(grid, best.settings, seed) for seed in grid.seeds]
    data, model = arguments[0].data, arguments[0].model
    if "test" not in get_task(model.task).read(data, token=model.token, cache_dir=model.cache_dir):
        return
    for run, metrics in zip(arguments, best.metrics, strict=True):
        if f"test_{metric}" not in metrics:
            folder = Path(run.training.output_dir or ".")
            classifier, processor = load_adapter_model(folder, token=model.token, cache_dir=model.cache_dir)
            batch_size = run.training.per_device_eval_batch_size
            classifier.to(run.training.device)  # type: ignore[arg-type]
            found = evaluate_model(classifier, processor, data, "test", batch_size, model.token, get_task(model.task))
            metrics |= {f"test_{name}": value for name, value in found.items()}
            keep_test_results(folder, metrics)


def keep_test_results(folder: Path, metrics: dict[str, float]) -> None:
    """Write the test metrics of a run where training writes them: its result files and its card."""
    if not PartialState().is_main_process:
        return
    test = {name: value for name, value in metrics.items() if name.startswith("test_")}
    everything = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    write_json(folder / "test_results.json", test)
    write_json(folder / "all_results.json", {**everything, **test})
    add_test_results(folder, test)
    write_json(folder / RUN_RESULT, {**(read_result(folder) or {}), "metrics": metrics})
