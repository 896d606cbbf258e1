"""Which settings a search tries."""

import pytest

from vpt_peft.methods import METHODS
from vpt_peft.runs.grid import Range
from vpt_peft.runs.search import full_grid, plan, search_space, spread
from vpt_peft.training.arguments import parse_args


AXES = {"rate": Range(1e-4, 1e-1, False), "prompts": Range(1.0, 8.0, True), "drop": Range(0.0, 0.5, False)}
LISTS = {"init": ["random", "tokens"], "epochs": [10.0, 20.0, 40.0, 80.0]}


def test_settings_are_spread_over_every_axis():
    found = spread({**AXES, **LISTS}, 16)
    for epochs in LISTS["epochs"]:
        assert sum(each["epochs"] == epochs for each in found) == 4
    assert sum(each["init"] == "tokens" for each in found) == 8
    # Logarithmic: as many in each power of ten; linear from 0
    for low, high in ((1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1)):
        assert 5 <= sum(low <= each["rate"] < high for each in found) <= 6
    assert sum(each["drop"] < 0.25 for each in found) == 8
    assert all(isinstance(each["prompts"], int) and 1 <= each["prompts"] <= 8 for each in found)
    assert {each["prompts"] for each in found} >= {1, 2, 3, 4, 6}


def test_the_same_seed_gives_the_same_settings_and_more_begin_with_them():
    assert spread(AXES, 5) == spread(AXES, 11)[:5] != spread(AXES, 5, seed=1)
    assert len(spread(AXES, 1)) == 1 and spread(AXES, 0) == spread({}, 3) == []


def test_plans():
    assert plan(LISTS, "grid", None) == full_grid(LISTS) and len(plan(LISTS, "grid", 3)) == 3
    assert full_grid(LISTS)[:2] == [{"init": "random", "epochs": 10.0}, {"init": "random", "epochs": 20.0}]
    assert plan(AXES, "random", 3) == spread(AXES, 3) and len(plan(AXES, "random", None)) == 20
    assert plan(AXES, "random", 3, with_default=True) == [{}, *spread(AXES, 2)]
    assert plan(AXES, "tpe", 7) == 7
    with pytest.raises(ValueError, match="rate=0.0001:0.1 is a range"):
        plan(AXES, "grid", None)


@pytest.mark.parametrize("method", METHODS)
def test_the_space_of_every_method_is_made_of_its_flags(method):
    space = search_space(method)
    assert "num_train_epochs" in space and "weight_decay" in space
    for settings in spread(space, 8):
        arguments = parse_args({"method": method, **settings})
        assert all(arguments.given[name] == value for name, value in settings.items())
