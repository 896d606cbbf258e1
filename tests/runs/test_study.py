"""Trials by Optuna: which are run, in which order they are kept, and what is repeated after a break."""

import sys
from types import SimpleNamespace

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from vpt_peft.runs.grid import Grid, Range
from vpt_peft.runs.study import JOURNAL, run_study
from vpt_peft.runs.trials import Trial


class Killed(BaseException):
    """Ends the process as far as Optuna is concerned: its trial stays as running."""


@pytest.fixture
def grid(tmp_path):
    def make(**axes):
        return Grid({"output_dir": str(tmp_path)}, axes, [0], {})

    return make


class Runner:
    """Notes the settings of trials; scores are a function of x, and what stands in `raises` is raised at its turn."""

    def __init__(self, raises=None, failing=()):
        self.seen, self.raises, self.failing = [], raises or {}, failing

    def __call__(self, settings):
        self.seen.append(settings)
        if (error := self.raises.pop(len(self.seen), None)) is not None:
            raise error
        if settings["x"] in self.failing:
            # One seed did well, another did not
            return Trial(settings, metrics=[{"eval_score": 100.0}], errors={"0": "diverged"})
        return Trial(settings, folders=["a"], metrics=[{"eval_score": -((settings["x"] - 3.0) ** 2)}])

    @property
    def values(self):
        return [settings["x"] for settings in self.seen]


def study(grid, runner, sampler="grid", num_trials=None, maximize=True):
    run_study(grid, runner, "eval_score", maximize, sampler, num_trials)
    return runner.values


def test_a_grid_is_run_once_and_read_again_afterwards(grid, tmp_path):
    axes = grid(x=[1, 2], y=["a", "b", None])
    first = Runner()
    study(axes, first)
    assert sorted((each["x"], str(each["y"])) for each in first.seen) == [
        (x, y) for x in (1, 2) for y in ("None", "a", "b")
    ]
    second = Runner()
    study(axes, second)
    assert second.seen == first.seen and (tmp_path / JOURNAL).is_file()


def test_failed_trials_are_not_repeated_and_count_as_bad(grid, tmp_path):
    axes = grid(x=[1, 2, 3])
    values = study(axes, Runner(failing=[1, 2]))
    assert sorted(values) == [1, 2, 3] and study(axes, Runner(failing=[1, 2])) == values
    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL)))
    (kept,) = optuna.get_all_study_summaries(storage)
    assert kept.best_trial.params == {"x": 3}


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Killed(), OSError("disk")], ids=["ctrl-c", "killed", "disk"])
def test_an_interrupted_trial_is_repeated_with_the_same_settings(grid, sampler, error):
    axes = grid(x=[1, 2, 3, 4] if sampler == "grid" else Range(0.0, 8.0, False))
    broken = Runner(raises={3: error})
    with pytest.raises(type(error)):
        study(axes, broken, sampler, 4)
    ended, interrupted = broken.values[:2], broken.values[2]
    # A second break in the same trial must not lose it
    again = Runner(raises={3: type(error)()})
    with pytest.raises(type(error)):
        study(axes, again, sampler, 4)
    assert again.values == [*ended, interrupted]
    last = study(axes, Runner(), sampler, 4)
    assert last[:3] == [*ended, interrupted] and len(set(last)) == 4
    assert study(axes, Runner(), sampler, 4) == last


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_is_extended_draws_new_settings(grid, sampler):
    axes = grid(x=Range(0.0, 8.0, False))
    few = study(axes, Runner(), sampler, 3)
    more = study(axes, Runner(), sampler, 6)
    assert more[:3] == few and len(set(more)) == 6 and all(0 <= x <= 8 for x in more)


@pytest.mark.parametrize("maximize", [True, False])
def test_tpe_goes_where_scores_are_better(grid, maximize):
    runner = Runner()
    study(grid(x=Range(-8.0, 14.0, False)), runner, "tpe", 40, maximize)
    distances = sorted(abs(x - 3) for x in runner.values[20:])
    median = distances[10]
    assert median < 3 if maximize else median > 8


def test_fewer_trials_than_the_grid_has(grid):
    axes = grid(x=[1, 2, 3, 4, 5])
    few = study(axes, Runner(), num_trials=2)
    assert len(set(few)) == 2
    everything = study(axes, Runner(), num_trials=99)
    assert everything[:2] == few and sorted(everything) == [1, 2, 3, 4, 5]


def test_a_grid_that_grows_is_a_new_study(grid):
    study(grid(x=[1, 2]), Runner())
    assert sorted(study(grid(x=[1, 2, 3]), Runner())) == [1, 2, 3]


def test_nothing_varies(grid):
    seen = []

    def run(settings):
        seen.append(settings)
        return Trial(settings, metrics=[{"eval_score": 1.0}])

    run_study(grid(), run, "eval_score", True)
    assert seen == [{}]


def test_logarithmic_and_whole_ranges(grid):
    runner = Runner()
    study(grid(x=Range(1.0, 1000.0, True)), runner, "random", 40)
    assert all(isinstance(x, int) and 1 <= x <= 1000 for x in runner.values)
    assert 8 <= sum(x < 32 for x in runner.values) <= 32
    runner = Runner()
    study(grid(x=Range(0.0, 1000.0, False)), runner, "random", 40)
    assert sum(x < 32 for x in runner.values) < 8


def test_optuna_is_asked_for_by_name(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"need Optuna: pip install 'vpt_peft\[sweep\]'"):
        study(grid(x=[1]), Runner())


@pytest.mark.parametrize("is_main", [True, False])
def test_all_processes_run_what_the_main_one_chose(grid, tmp_path, monkeypatch, is_main):
    sent, received = [], [{"x": 5}, {"x": 2}, None]

    def broadcast(box):
        sent.append(box[0])
        if not is_main:
            box[0] = received.pop(0)

    monkeypatch.setattr("vpt_peft.runs.study.PartialState", lambda: SimpleNamespace(is_main_process=is_main))
    monkeypatch.setattr("vpt_peft.runs.study.broadcast_object_list", broadcast)
    runner = Runner()
    study(grid(x=[1, 2]), runner)
    if is_main:
        assert sent == [*runner.seen, None] and sorted(runner.values) == [1, 2]
    else:
        assert runner.values == [5, 2] and sent == [None] * 3 and not (tmp_path / JOURNAL).exists()
