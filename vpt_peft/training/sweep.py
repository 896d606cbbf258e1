"""Search settings on the validation split, and look at the test split once, with the best of them.

The VPT paper chooses learning rate and weight decay from a grid this way (Jia et al. 2022, arXiv 2203.12119).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import write_json
from ..tasks import get_task
from .evaluation import evaluate_model
from .facts import add_test_results
from .grid import Grid, Range, describe
from .inference import load_adapter_model
from .runs import RUN_RESULT, Setting, claim_folder, parse_cell, read_result, run_setting, write_results


SWEEP_RESULTS = "sweep_results.json"
SAMPLERS = ("grid", "random", "tpe")


def sweep(grid: Grid, sampler: str = "grid", num_settings: int | None = None) -> tuple[list[Setting], Setting | None]:
    """Run settings of the grid, none of them twice, and test the best; return them, best first, and the best.

    Ended runs are kept in their folders and a run that broke off is gone on with, so the same call continues a sweep.
    A setting's score is the mean over seeds of `eval_<metric_for_best_model>`; settings with a failed run come last.
    `sweep_results.json` is written after each setting.

    Args:
        grid: the flags.
        sampler: "grid" goes through all settings; "random" and "tpe" (Optuna's) choose among them.
        num_settings: most settings to try; default: all of them with "grid", else 20.

    Returns:
        The settings, and the first of them, or None if no setting ended well.

    Raises:
        ModuleNotFoundError: the sampler needs Optuna, which is not installed.
        ValueError: nothing varies, or a setting is wrong in itself; nothing was run.
    """
    if not grid.axes:
        raise ValueError("nothing varies; give a flag several values, as in --learning_rate 1e-3 5e-3.")
    if num_settings is not None and num_settings < 1:
        raise ValueError(f"num_settings={num_settings} must be at least 1.")
    cells = grid.cells() if sampler == "grid" or not grid.has_ranges else []
    for cell in cells:
        parse_cell(grid, cell, grid.seeds[0])
    metric = str(grid.common.get("metric_for_best_model", "accuracy")).removeprefix("eval_")
    sign = -1 if metric == "loss" else 1
    study = None if sampler == "grid" else _make_study(sampler, sign)
    path = claim_folder(grid, SWEEP_RESULTS)
    done: dict[str, Setting] = {}

    def rank(row: Setting) -> tuple[bool, float, float]:
        # On few images many settings share the best accuracy; the loss decides among them
        return bool(row.errors), -sign * (row.mean(f"eval_{metric}") or 0.0), row.mean("eval_loss") or 0.0

    write_results(path, [], metric=metric)
    for number in range(num_settings or (20 if study else len(cells))):
        if study is None and number == len(cells):
            break
        trial = study.ask() if study else None
        settings = (
            {name: _suggest(trial, name, values) for name, values in grid.axes.items()} if trial else cells[number]
        )
        key = describe(settings)
        if key not in done:
            done[key] = run_setting(grid, settings, with_test=False)
            write_results(path, sorted(done.values(), key=rank), metric=metric)
        if study is not None and done[key].errors:
            study.tell(trial, state=_state_of_failures())
        elif study is not None:
            study.tell(trial, done[key].mean(f"eval_{metric}"))

    rows = sorted(done.values(), key=rank)
    best = None if rows[0].errors else rows[0]
    if best is not None:
        test_once(grid, best)
        write_results(path, rows, metric=metric, best=best.settings)
    return rows, best


def _make_study(sampler: str, sign: int) -> Any:
    """Optuna's study; the seed is fixed, so that a sweep that is started again asks for the same settings."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"sampler={sampler!r} needs Optuna: pip install 'vpt_peft[sweep]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = optuna.samplers.RandomSampler(seed=0) if sampler == "random" else optuna.samplers.TPESampler(seed=0)
    return optuna.create_study(sampler=chosen, direction="maximize" if sign > 0 else "minimize")


def _state_of_failures() -> Any:
    from optuna.trial import TrialState

    # Counts as worse than any score, where FAIL would not count at all
    return TrialState.PRUNED


def _suggest(trial: Any, name: str, values: list | Range) -> Any:
    if not isinstance(values, Range):
        return values[trial.suggest_categorical(name, range(len(values)))]
    if values.whole:
        return trial.suggest_int(name, int(values.low), int(values.high), log=values.low > 0)
    return trial.suggest_float(name, values.low, values.high, log=values.low > 0)


def test_once(grid: Grid, best: Setting) -> None:
    """Evaluate the best setting's runs on the test split, if the data have one, and put it into their folders."""
    arguments = [parse_cell(grid, best.settings, seed) for seed in grid.seeds]
    data, model = arguments[0].data, arguments[0].model
    if "test" not in get_task(model.task).read(data, token=model.token, cache_dir=model.cache_dir):
        return
    for run, metrics in zip(arguments, best.metrics, strict=True):
        if "test_accuracy" not in metrics:
            folder = Path(run.training.output_dir or ".")
            classifier, processor = load_adapter_model(folder, token=model.token, cache_dir=model.cache_dir)
            batch_size = run.training.per_device_eval_batch_size
            classifier.to(run.training.device)  # type: ignore[arg-type]
            found = evaluate_model(classifier, processor, data, "test", batch_size, model.token)
            metrics |= {f"test_{name}": value for name, value in found.items()}
            keep_test_results(folder, metrics)


def keep_test_results(folder: Path, metrics: dict[str, float]) -> None:
    """Write a run's test metrics where a training writes them: its result files and its card."""
    if not PartialState().is_main_process:
        return
    test = {name: value for name, value in metrics.items() if name.startswith("test_")}
    everything = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    write_json(folder / "test_results.json", test)
    write_json(folder / "all_results.json", {**everything, **test})
    add_test_results(folder, test)
    write_json(folder / RUN_RESULT, {**(read_result(folder) or {}), "metrics": metrics})
