"""Trials shared by processes and machines: a journal tells which have ended, and locks tell which are running."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .grid import Range


logger = logging.getLogger(__name__)

JOURNAL = "optuna_journal.log"
# Where a trial's number is kept in the journal
_NUMBER = "number"
_POLL_SECONDS = 1.0


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


def open_journal(path: Path) -> Any:
    """Return Optuna's storage in a file that several machines may share; it is made where there is none."""
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


class Study:
    """A number of trials, each run once by whichever process takes it.

    Whoever runs a trial holds the lock of its file. The system frees the lock of a process that dies, so its trial is
    taken up again, with the same settings.

    Args:
        journal (`Path`): file of the journal; the locks are in a folder beside it.
        storage: the open journal.
        name (`str`): tells the study from the others in the journal.
        axes (`Mapping[str, list | Range]`): the values that settings may take.
        trials (`Sequence[Mapping]` or `int`): the settings of each trial, or how many TPE shall choose.
        maximize (`bool`): whether higher scores are better.
    """

    def __init__(
        self,
        journal: Path,
        storage: Any,
        name: str,
        axes: Mapping[str, list | Range],
        trials: Sequence[Mapping[str, Any]] | int,
        maximize: bool,
    ) -> None:
        optuna = import_optuna()
        self.name, self.axes, self.trials = name, axes, trials
        self._locks = journal.with_name(f"{journal.name}.locks")
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
        )

    def __len__(self) -> int:
        return self.trials if isinstance(self.trials, int) else len(self.trials)

    def _kept(self) -> dict[int, Any]:
        """What the journal holds of the trials that have begun, by number."""
        trials = self._study.get_trials(deepcopy=False)
        return {trial.user_attrs[_NUMBER]: trial for trial in trials if _NUMBER in trial.user_attrs}

    def ended(self) -> dict[int, dict[str, Any]]:
        """Return the settings of the trials that have ended, by number."""
        return {
            number: dict(trial.params)
            for number, trial in sorted(self._kept().items())
            if trial.state.is_finished() and number < len(self)
        }

    def try_run(self, number: int, run: Callable[[dict[str, Any]], float | None]) -> bool:
        """Run a trial, unless it has ended or another process is running it.

        Args:
            number: of the trial.
            run: gives the score from the settings, or None where the trial failed, which counts as worse than any score.
        """
        from optuna.trial import TrialState

        self._locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._locks / f"{self.name}-{number:04d}", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        try:
            kept = self._kept().get(number)
            if kept is not None and kept.state.is_finished():
                return False
            if kept is None:
                self._begin(number)
                kept = self._kept()[number]
            score = run(dict(kept.params))
            self._study.tell(kept.number, score, TrialState.PRUNED if score is None else None)
        finally:
            lock.release()
        return True

    def _begin(self, number: int) -> None:
        optuna = import_optuna()
        spaces = {name: _distribution(axis) for name, axis in self.axes.items()}
        if isinstance(self.trials, int):
            # Seeded by the number, as a sampler with the same seed would draw the same settings in every process
            self._study.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
            self._study.ask(spaces).set_user_attr(_NUMBER, number)
            return
        settings = dict(self.trials[number])
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=settings,
                distributions={name: spaces[name] for name in settings},
                user_attrs={_NUMBER: number},
            )
        )


def _distribution(axis: list | Range) -> Any:
    optuna = import_optuna()
    if not isinstance(axis, Range):
        return optuna.distributions.CategoricalDistribution(axis)
    if axis.whole:
        return optuna.distributions.IntDistribution(axis.first, int(axis.high), log=axis.low > 0)
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.low > 0)


def work(studies: Sequence[Study], run: Callable[[int, dict[str, Any]], float | None]) -> None:
    """Run what is left of the studies together with all other processes that do, and return when all has ended.

    The first trials of all studies come before the second ones.

    Args:
        studies: the same in every process.
        run: runs a trial from the study's position in the list and the settings; see `Study.try_run`.
    """
    if not PartialState().is_main_process:
        while (job := _from_main_process(None)) is not None:
            run(*job)
        return

    def run_everywhere(position: int, settings: dict[str, Any]) -> float | None:
        return run(*_from_main_process((position, settings)))

    while left := list(_left(studies)):
        ran = [studies[position].try_run(number, partial(run_everywhere, position)) for position, number in left]
        if not any(ran):
            logger.info("Waiting for %d trials of other processes.", len(left))
            time.sleep(_POLL_SECONDS)
    _from_main_process(None)


def _left(studies: Sequence[Study]) -> Iterable[tuple[int, int]]:
    ended = [study.ended() for study in studies]
    longest = max(map(len, studies), default=0)
    for number in range(longest):
        for position, study in enumerate(studies):
            if number < len(study) and number not in ended[position]:
                yield position, number


def _from_main_process(job: Any) -> Any:
    """What the main process gives, in all processes."""
    box = [job]
    broadcast_object_list(box)
    return box[0]
