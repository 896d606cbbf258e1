"""The trials of a grid, chosen by Optuna and kept in a journal, so that the same command continues them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .grid import Grid, Range
from .trials import Trial


JOURNAL = "optuna_journal.log"
SAMPLERS = ("grid", "random", "tpe")


def run_study(
    grid: Grid,
    run: Callable[[dict[str, Any]], Trial],
    metric: str,
    maximize: bool,
    sampler: str = "grid",
    num_trials: int | None = None,
) -> None:
    """Run the trials of a grid, those that ended in an earlier call first.

    Args:
        grid (`Grid`): the flags.
        run: runs one trial from its settings. Called again for a trial that ended, it only reads what was kept.
        metric (`str`): what the samplers go by, as it is named in the results.
        maximize (`bool`): whether more of it is better.
        sampler (`str`): "grid" goes through all settings; "random" and "tpe" choose among them.
        num_trials (`int`, *optional*): most trials; by default all of them with "grid", else 20.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    optuna = import_optuna()
    if not PartialState().is_main_process:
        while (settings := _from_main_process(None)) is not None:
            run(settings)
        return

    def objective(trial: Any) -> float:
        outcome = run(_from_main_process({name: _suggest(trial, name, axis) for name, axis in grid.axes.items()}))
        score = outcome.mean(metric)
        if outcome.errors or score is None:
            # Counts as worse than any score, where a failed trial would be run again
            raise optuna.TrialPruned
        return score

    study = _open_study(grid, metric, maximize, sampler)
    ended = [trial.params for trial in study.trials if trial.state.is_finished() and trial.state.name != "FAIL"]
    for settings in ended:
        run(_from_main_process({name: settings[name] for name in grid.axes}))
    total = num_trials or (len(grid.trials()) if sampler == "grid" else 20)
    if sampler == "grid":
        total = min(total, len(grid.trials()))
    if len(ended) < total:
        _repeat_interrupted(study)
        study.optimize(objective, n_trials=total - len(ended))
    _from_main_process(None)


def import_optuna() -> Any:
    """Return the module.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sweep and compare need Optuna: pip install 'vpt_peft[sweep]'.") from error
    return optuna


def _from_main_process(settings: Mapping[str, Any] | None) -> Any:
    """What the main process gives, in all processes."""
    box = [settings]
    broadcast_object_list(box)
    return box[0]


def _open_study(grid: Grid, metric: str, maximize: bool, sampler: str) -> Any:
    """The study of these axes in the journal of the output folder."""
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = optuna.storages.journal.JournalFileBackend(str(grid.output_dir / JOURNAL))
    # Optuna allows no other values of a parameter in the same study
    key = json.dumps([sampler, metric, {name: str(axis) for name, axis in grid.axes.items()}], sort_keys=True)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=hashlib.sha256(key.encode()).hexdigest()[:16],
        direction="maximize" if maximize else "minimize",
        load_if_exists=True,
    )
    if sampler == "grid":
        study.sampler = optuna.samplers.GridSampler(grid.axes, seed=0)
    else:
        # A new sampler with the same seed would draw the same settings again
        kind = optuna.samplers.RandomSampler if sampler == "random" else optuna.samplers.TPESampler
        study.sampler = kind(seed=len(study.trials))
    return study


def _repeat_interrupted(study: Any) -> None:
    """Put trials that were interrupted or killed into the queue."""
    from optuna.trial import TrialState, create_trial

    repeated = {trial.system_attrs.get("repeats") for trial in study.trials}
    for trial in study.trials:
        if trial.state in (TrialState.FAIL, TrialState.RUNNING) and trial.params and trial.number not in repeated:
            study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    # Those of the sampler, which knows the trial's place in the grid by them
                    system_attrs={**trial.system_attrs, "fixed_params": trial.params, "repeats": trial.number},
                )
            )


def _suggest(trial: Any, name: str, axis: list | Range) -> Any:
    if not isinstance(axis, Range):
        return trial.suggest_categorical(name, axis)
    if axis.whole:
        return trial.suggest_int(name, axis.first, int(axis.high), log=axis.low > 0)
    return trial.suggest_float(name, axis.low, axis.high, log=axis.low > 0)
