"""Trials that processes share: each runs once, those of a killed process are taken up again, and none is lost."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from vpt_peft.runs.grid import Range
from vpt_peft.runs.search import full_grid
from vpt_peft.runs.study import Study, import_optuna, open_journal, work


AXES = {"x": [1, 2, 3], "y": ["a", "b", None]}
RANGES = {"x": Range(0.0, 8.0, False)}


@pytest.fixture
def study(tmp_path):
    def make(axes=AXES, trials=None, name="a", maximize=True):
        trials = full_grid(axes) if trials is None else trials
        journal = tmp_path / "journal.log"
        return Study(journal, open_journal(journal), name, axes, trials, maximize)

    return make


class Runner:
    """Notes what it runs; scores fall with the distance of x from 3, and what stands in `raises` is raised at its turn."""

    def __init__(self, raises=None, failing=()):
        self.seen, self.raises, self.failing = [], raises or {}, failing

    def __call__(self, position, settings):
        self.seen.append((position, settings))
        if (error := self.raises.pop(len(self.seen), None)) is not None:
            raise error
        return None if settings["x"] in self.failing else -((settings["x"] - 3.0) ** 2)

    @property
    def settings(self):
        return [settings for _, settings in self.seen]


def test_every_trial_runs_once_and_is_kept(study):
    runner = Runner()
    work([study()], runner)
    assert runner.settings == full_grid(AXES)
    again = Runner()
    work([study()], again)
    assert again.seen == [] and list(study().ended().values()) == full_grid(AXES)


def test_the_first_trials_of_all_studies_come_first(study):
    runner = Runner()
    work([study(trials=[{"x": 1}, {"x": 2}]), study(trials=[{"x": 3}], name="b")], runner)
    assert runner.seen == [(0, {"x": 1}), (1, {"x": 3}), (0, {"x": 2})]


def test_failed_trials_are_not_repeated_and_count_as_worse_than_any(study, tmp_path):
    work([study()], Runner(failing=[1, 2]))
    again = Runner()
    work([study()], again)
    assert again.seen == []
    optuna = import_optuna()
    kept = optuna.load_study(study_name="a", storage=open_journal(tmp_path / "journal.log"))
    assert kept.best_trial.params["x"] == 3


@pytest.mark.parametrize(
    "given", [{}, {"axes": RANGES, "trials": [{"x": 5.0}, {"x": 1.0}, {"x": 2.0}]}, {"axes": RANGES, "trials": 4}]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_trial_is_repeated_with_the_same_settings(study, given, error):
    broken = Runner(raises={3: error()})
    with pytest.raises(error):
        work([study(**given)], broken)
    # A second break in the same trial must not lose it
    again = Runner(raises={1: error()})
    with pytest.raises(error):
        work([study(**given)], again)
    last = Runner()
    work([study(**given)], last)
    assert again.settings == [broken.settings[2]] and last.settings[0] == broken.settings[2]
    everything = broken.settings[:2] + last.settings
    assert len(everything) == len(study(**given)) == len({json.dumps(each) for each in everything})
    assert list(study(**given).ended().values()) == everything


def test_a_search_that_is_extended_keeps_what_it_has(study):
    few, more = Runner(), Runner()
    work([study(axes=RANGES, trials=2)], few)
    work([study(axes=RANGES, trials=5)], more)
    assert len(more.seen) == 3 and len({each["x"] for each in few.settings + more.settings}) == 5
    assert len(study(axes=RANGES, trials=1).ended()) == 1


@pytest.mark.parametrize("maximize", [True, False])
def test_tpe_goes_where_scores_are_better(study, maximize):
    runner = Runner()
    work([study(axes={"x": Range(-8.0, 14.0, False)}, trials=40, maximize=maximize)], runner)
    median = sorted(abs(each["x"] - 3) for each in runner.settings[20:])[10]
    assert median < 3 if maximize else median > 8


def test_a_trial_that_another_process_runs_is_waited_for(study, monkeypatch):
    seen = []

    def run(settings):
        seen.append(settings)
        if len(seen) == 1:
            assert not study().try_run(0, run)
            assert study().try_run(1, run)
        return 0.0

    assert study().try_run(0, run)
    assert seen == full_grid(AXES)[:2] and list(study().ended()) == [0, 1]
    assert not study().try_run(1, run)


def test_optuna_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"need Optuna: pip install 'vpt_peft\[sweep\]'"):
        import_optuna()


@pytest.mark.parametrize("is_main", [True, False])
def test_all_ranks_run_what_the_main_one_chose(study, monkeypatch, is_main):
    sent, received = [], [(0, {"x": 5}), (0, {"x": 2}), None]

    def broadcast(box):
        sent.append(box[0])
        if not is_main:
            box[0] = received.pop(0)

    monkeypatch.setattr("vpt_peft.runs.study.PartialState", lambda: SimpleNamespace(is_main_process=is_main))
    monkeypatch.setattr("vpt_peft.runs.study.broadcast_object_list", broadcast)
    runner = Runner()
    if is_main:
        work([study(axes={"x": [1, 2]})], runner)
        assert sent == [*runner.seen, None] and runner.settings == [{"x": 1}, {"x": 2}]
    else:
        work([], runner)
        assert runner.settings == [{"x": 5}, {"x": 2}] and sent == [None] * 3


def run_both(folder, trials):
    """What a worker does: two studies whose trials take a quarter of a second, noted as they begin and end."""
    journal = folder / "journal.log"
    studies = [Study(journal, open_journal(journal), name, RANGES, trials, True) for name in "ab"]

    def note(event, position, settings):
        with open(folder / "events", "a") as file:
            file.write(json.dumps([event, os.getpid(), "ab"[position], settings["x"]]) + "\n")

    def run(position, settings):
        note("begin", position, settings)
        time.sleep(0.25)
        note("end", position, settings)
        return settings["x"]

    work(studies, run)


def events(folder):
    path = folder / "events"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("trials", [[{"x": float(x)} for x in range(6)], 6], ids=["listed", "tpe"])
def test_of_three_processes_one_is_killed_and_no_trial_is_lost_or_doubled(tmp_path, trials):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=run_both, args=(tmp_path, trials)) for _ in range(3)]
    try:
        for worker in workers:
            worker.start()
        victim = workers[0].pid

        def in_second_trial():
            return [event for event, pid, *_ in events(tmp_path) if pid == victim] == ["begin", "end", "begin"]

        wait_for(in_second_trial)
        os.kill(victim, signal.SIGKILL)
        for worker in workers:
            worker.join(timeout=120)
        assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
    found = events(tmp_path)
    begun = Counter(trial for event, _, *trial in map(_keyed, found) if event == "begin" for trial in trial)
    ended = Counter(trial for event, _, *trial in map(_keyed, found) if event == "end" for trial in trial)
    # All twelve ended once; the killed one's began twice, with the same settings
    assert len(ended) == 12 and set(ended.values()) == {1} and set(begun) == set(ended)
    assert sorted(begun.values()) == [1] * 11 + [2]
    lost = [_keyed(each)[2] for each in found if each[1] == victim][-1]
    assert begun[lost] == 2
    assert len({pid for _, pid, *_ in found}) == 3


def _keyed(event):
    return event[0], event[1], tuple(event[2:])
