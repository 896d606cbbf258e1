"""Methods on data sets, each with the same search: chosen on validation, retrained on train + validation, tested once.

This is the protocol of VTAB (Zhai et al. 2019, arXiv 1910.04867), which the VPT paper follows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data.suites import Suite
from ..methods import METHODS
from ..reporting import describe
from ..reporting.results import RESULTS
from ..tasks import Task, get_task
from ..tasks.base import DEFAULT_TASK
from ..training.arguments import Arguments, parse_args
from .grid import Range, safe_name
from .results import Place, read_result, result_path
from .search import plan
from .study import JOURNAL, Study, open_journal, work
from .trials import run_once


logger = logging.getLogger(__name__)

RUNS = "runs"
# The last weights count, as nothing is left to choose others by once the validation images are trained on
_TRAINED_TO_THE_END: dict[str, Any] = {"eval_strategy": "no", "load_best_model_at_end": False}
_DEFAULTS: dict[str, Any] = {**_TRAINED_TO_THE_END, "save_strategy": "no", "disable_tqdm": True}


@dataclass
class Comparison:
    """What is compared, and how.

    Args:
        common (`Mapping`): flags of all runs.
        rows (`Mapping[str, Mapping]`): flags of each row of the table, by its name.
        data (`Mapping[str, Mapping]`): flags of each data set, by its short name.
        spaces (`Mapping[str, Mapping]`): what the search of each row varies; empty where nothing is searched.
        output_dir (`Path`): where runs, results and, unless `storage` is given, the journal go.
        seeds (`Sequence[int]`): a tested run is made with each; the search takes the first.
        draws (`Sequence[int]`): values of `split_seed`, each another draw of the images; likewise.
        sampler (`str`): "grid", "random" or "tpe".
        num_trials (`int`, *optional*): most trials of each search.
        with_default (`bool`): the first trial of a search changes nothing.
        storage (`Path`, *optional*): the journal that the processes of one comparison share.
        suite (`Suite`, *optional*): what the data sets are, where they have a name together.
    """

    common: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Mapping[str, Any]]
    spaces: Mapping[str, Mapping[str, list | Range]]
    output_dir: Path
    seeds: Sequence[int] = (42,)
    draws: Sequence[int] = (0,)
    sampler: str = "random"
    num_trials: int | None = None
    with_default: bool = True
    storage: Path | None = None
    suite: Suite | None = None
    _chosen: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict, init=False)

    @cached_property
    def task(self) -> Task:
        """The task of all runs."""
        return get_task(self.common.get("task", DEFAULT_TASK))

    @cached_property
    def _example(self) -> Arguments:
        return self.arguments(*self.pairs[0], "search", {})

    @property
    def groups(self) -> dict[str, str] | None:
        """The group of each data set, where they are a suite with groups."""
        return self.suite.groups if self.suite is not None else None

    @property
    def metric(self) -> str:
        """The metric by which settings are chosen, without a prefix."""
        return str(self._example.training.metric_for_best_model).removeprefix("eval_")

    @property
    def maximize(self) -> bool:
        """Whether more of it is better."""
        return bool(self._example.training.greater_is_better)

    def _plan(self, row: str) -> list[dict[str, Any]] | int:
        return plan(self.spaces[row], self.sampler, self.num_trials, self.with_default)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every row with every data set."""
        return [(row, data) for row in self.rows for data in self.data]

    def arguments(self, row: str, data: str, stage: str, settings: Mapping[str, Any]) -> Arguments:
        """Return the arguments of one run.

        Raises:
            ValueError: the values do not go together.
        """
        folder = self.output_dir / RUNS / Place(row, data, stage, settings).name
        first = {"seed": self.seeds[0], "split_seed": self.draws[0]}
        given = {**_DEFAULTS, **self.common, **self.data[data], **self.rows[row], **first}
        given = {name: value for name, value in given.items() if name in self.rows[row] or self._reads(row, name)}
        if stage == "test":
            given |= self._chosen.get((row, data), {})
            if self.has_test(data):
                given |= {"train_on_validation": True, **_TRAINED_TO_THE_END}
        return parse_args({**given, **settings, "output_dir": str(folder)})

    def _reads(self, row: str, flag: str) -> bool:
        """Whether a flag that all rows share is for this one: what only some methods read is for theirs."""
        readers = [each for each in self.rows if flag in METHODS[self._method(each)].flags]
        return not readers or row in readers

    def _method(self, row: str) -> str:
        return str(self.rows[row].get("method", self.common.get("method", "vpt")))

    def check(self) -> None:
        """Parse the arguments of a trial of every row and data set, so that mistakes show before anything runs.

        Raises:
            FileExistsError: output_dir holds other files.
            NotADirectoryError: it is a file.
            ValueError: the values do not go together.
        """
        folder = self.output_dir
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"output_dir={str(folder)!r} is a file; give a folder.")
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
        if names and not {RUNS, RESULTS, JOURNAL} & set(names):
            raise FileExistsError(
                f"output_dir={str(folder)!r} holds files of no comparison or sweep; give an empty or another folder."
            )
        for row, data in self.pairs:
            trials = self._plan(row) if self.spaces.get(row) else []
            for settings in trials if isinstance(trials, list) and trials else [{}]:
                self.arguments(row, data, "search", settings)

    def has_test(self, data: str) -> bool:
        """Whether a data set has a test split; without one, tested runs are scored on validation images."""
        if data not in self._tested:
            arguments = parse_args({**_DEFAULTS, **self.common, **self.data[data]})
            model = arguments.model
            found = self.task.read(arguments.data, token=model.token, cache_dir=model.cache_dir)
            self._tested[data] = "test" in found
            if not self._tested[data]:
                logger.warning("%s has no test split; the last runs are scored on its validation images.", data)
        return self._tested[data]

    @cached_property
    def _tested(self) -> dict[str, bool]:
        return {}

    @cached_property
    def _journal(self) -> Path:
        return self.storage or self.output_dir / JOURNAL

    @cached_property
    def _open_journal(self) -> Any:
        return open_journal(self._journal)

    def _study(self, row: str, data: str, stage: str, axes: Mapping[str, list | Range], trials: Any) -> Study:
        flags = {**self.common, **self.data[data], **self.rows[row], **self._chosen.get((row, data), {})}
        key = [stage, self.sampler, flags, {name: str(axis) for name, axis in axes.items()}]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:8]
        name = safe_name(f"{stage}-{row}-{data}")
        maximize = self.maximize if stage == "search" else self.task.higher_is_better
        return Study(self._journal, self._open_journal, f"{name}-{digest}", axes, trials, maximize)

    def search(self) -> None:
        """Run the searches, together with all other processes that do."""
        pairs = [pair for pair in self.pairs if self.spaces.get(pair[0])]
        if not pairs:
            return
        main, studies = PartialState().is_main_process, []
        if main:
            for row, data in pairs:
                studies.append(self._study(row, data, "search", self.spaces[row], self._plan(row)))
        work(studies, lambda position, settings: self._run(*pairs[position], "search", settings))
        for pair in pairs:
            best = next(iter(self.ranked(*pair)), None)
            if best is not None and best["train_info"]["status"] == "success":
                self._chosen[pair] = best["run_info"]["settings"]

    def test(self) -> None:
        """Run what was chosen with every draw and seed, together with all other processes that do."""
        axes: dict[str, list | Range] = {"split_seed": list(self.draws), "seed": list(self.seeds)}
        pairs = [pair for pair in self.pairs if not self.spaces.get(pair[0]) or self.chosen(*pair) is not None]
        studies = []
        if PartialState().is_main_process:
            trials = [{"split_seed": draw, "seed": seed} for draw in self.draws for seed in self.seeds]
            studies = [self._study(*pair, "test", axes, trials) for pair in pairs]
        work(studies, lambda position, settings: self._run(*pairs[position], "test", settings))

    def chosen(self, row: str, data: str) -> dict[str, Any] | None:
        """Return the settings that the search chose, or None where every trial failed or nothing was searched."""
        return self._chosen.get((row, data))

    def longest_chosen(self) -> dict[str, list[str]]:
        """Return the data sets on which a row chose the most epochs searched: training may not have converged."""
        found: dict[str, list[str]] = {}
        for (row, data), settings in self._chosen.items():
            axis = self.spaces[row].get("num_train_epochs", [])
            most = axis.high if isinstance(axis, Range) else max(axis, default=0)
            if settings.get("num_train_epochs", 0) == most > 0:
                found.setdefault(row, []).append(data)
        return found

    def ranked(self, row: str, data: str) -> list[dict[str, Any]]:
        """Return the results of a search, best first; on few images many share a score, and the loss decides."""
        trials = self._plan(row)
        if isinstance(trials, list):
            paths = [result_path(self.output_dir, Place(row, data, "search", settings)) for settings in trials]
        else:
            paths = sorted((self.output_dir / RESULTS / row / data / "search").glob("*.json"))
        results = [result for path in paths if (result := read_result(path)) is not None]

        def rank(result: Mapping[str, Any]) -> tuple[bool, float, float]:
            metrics = result["train_info"]["metrics"]
            value = metrics.get(f"eval_{self.metric}", 0.0)
            failed = result["train_info"]["status"] != "success"
            return failed, -value if self.maximize else value, metrics.get("eval_loss", 0.0)

        return sorted(results, key=rank)

    def _run(self, row: str, data: str, stage: str, settings: dict[str, Any]) -> float | None:
        logger.info("Run: %s on %s, %s: %s.", row, data, stage, describe(settings))
        place = Place(row, data, stage, settings)
        try:
            arguments = self.arguments(row, data, stage, settings)
            result = run_once(arguments, place, self.output_dir, with_test=stage == "test")
        except KeyboardInterrupt:
            logger.warning("Finished runs are kept in %s; the same command continues.", self.output_dir)
            raise
        if result["train_info"]["status"] != "success":
            logger.warning("%s failed: %s", place.name, result["run_info"]["error_msg"])
            return None
        metrics = result["train_info"]["metrics"]
        name = self.metric if stage == "search" else self.task.best_metric
        tested = stage == "test" and f"test_{name}" in metrics
        score = metrics[f"test_{name}" if tested else f"eval_{name}"]
        logger.info("  %s %s %.4f.", "test" if tested else "validation", name.replace("_", " "), score)
        return score
