import math
from dataclasses import replace
from functools import partial

import pytest

from lfm.errors import UnknownName
from operators.artifact import Metrics, Model
from operators.searches.space import Dimension, Extent, Objective, Population, SearchError, Stop
from operators.searching import (
    SearchFailed,
    TrialFailed,
    best_of,
    judged_at,
    known_points,
    measured,
    purse_of,
    search,
    trained_until,
)
from operators.workspace import Outcome

LOSS = Objective(measure="loss", direction="minimize", on="text")
SIZE = Objective(measure="parameters", direction="minimize")
BASE = Model("here", "b" * 64, {"method": "TIES"})
SPACE = {"m.density": Dimension(uniform=(0.1, 1.0))}


def trial(name, loss, size=10, state="done", **others):
    about = {"sets": {"text": {"loss": loss}}, "parameters": size, "generate": False}
    made = {"result": Model("", name * 64, {"made": name}), "judged": Metrics("", "", about)}
    changes = {"m.density": others.pop("density", 0.5)}
    return Outcome(run=name, changes=changes, state=state, made=made if state == "done" else {}, **others)


def test_the_best_by_the_first_objective_is_handed_on_with_the_table_of_all():
    trials = [trial("", 3.0, 10), trial("a", 1.0, 30, density=0.2), trial("c", 0, state="failed", error="burst")]
    best = best_of(BASE, [LOSS, SIZE], [*trials, trial("d", 2.0, 20), trial("e", 2.5, 25)])
    assert (best.digest, best.uri, best.about["made"]) == ("a" * 64, "", "a")
    said = best.about["search"]
    assert said["best"] == "a"
    assert said["front"] == ["", "a", "d"]
    assert [o["name"] for o in said["objectives"]] == ["loss on text", "parameters"]
    assert [(t["run"], t["values"], t["state"]) for t in said["trials"]] == [
        ("", [3.0, 10.0], "done"),
        ("a", [1.0, 30.0], "done"),
        ("c", [], "failed"),
        ("d", [2.0, 20.0], "done"),
        ("e", [2.5, 25.0], "done"),
    ]
    assert (said["trials"][1]["changes"], said["trials"][2]["error"]) == ({"m.density": 0.2}, "burst")


def test_an_objective_may_be_to_be_large():
    large = Objective(measure="loss", direction="maximize", on="text")
    best = best_of(BASE, [large], [trial("", 3.0), trial("a", 1.0), trial("c", 4.0)])
    assert best.digest == "c" * 64


def test_as_it_is_written_may_be_the_best():
    first = Outcome(run="", changes={}, state="done", made={**trial("x", 1.0).made, "result": BASE})
    best = best_of(BASE, [LOSS], [first, trial("a", 2.0)])
    assert (best.uri, best.digest) == ("here", "b" * 64)


def test_a_search_of_which_all_trials_failed_fails():
    failed = [trial(n, 0, state="failed", error=f"part: {n} burst.") for n in "ab"]
    with pytest.raises(SearchFailed) as caught:
        best_of(BASE, [LOSS], [trial("", 1.0), *failed])
    assert str(caught.value) == "search: all 2 trials have failed, the first with: part: a burst. Narrow the space."


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (Objective(measure="lose", direction="minimize", on="text"), "Did you mean 'loss'?"),
        (Objective(measure="loss", direction="minimize", on="tex"), "Did you mean 'text'?"),
        (Objective(measure="generate", direction="minimize"), "measure of the evaluation is called 'generate'"),
    ],
)
def test_an_objective_that_was_not_measured_is_said(objective, said):
    with pytest.raises(UnknownName, match=said.replace("?", r"\?")):
        measured([objective], trial("a", 1.0))


class Fake:
    """Trials that burst below a density."""

    def run(self, changes):
        density = changes["m.density"]
        return trial("a", density, state="done" if density > 0.3 else "failed", error="burst")


def test_a_point_as_it_is_written_is_not_run_again_and_a_failed_one_raises():
    judge = partial(judged_at, Fake(), {"m.density": 0.9}, (7.0,), (LOSS,), None, report=print)
    assert judge({"m.density": 0.9}) == (7.0,)
    assert judge({"m.density": 0.5}) == (0.5,)
    with pytest.raises(TrialFailed, match="trial 'a': burst"):
        judge({"m.density": 0.2})


def test_a_trial_that_is_followed_reports_the_measure_and_one_that_was_stopped_has_no_values():
    class Followed:
        def run(self, changes, *, step, heard):
            assert step == "part"
            heard(1, {"loss": 3.0})
            heard(2, {"lr": 0.5})
            heard(3, {"loss": 2.0})
            return trial("a", 1.0, state="stopped")

    said = []
    stop = Stop(step="part", first=1, last=9)
    values = judged_at(
        Followed(), {}, (7.0,), (LOSS,), stop, {"m.density": 0.5}, lambda at, value: said.append((at, value))
    )
    assert (values, said) == ((), [(1, 3.0), (3, 2.0)])


def test_a_trial_that_rests_has_the_measure_there_and_one_that_fails_on_the_way_is_the_worst():
    class Resting:
        def run(self, changes):
            state = "done" if "part.rest_at" not in changes else "failed" if changes["a"] > 1 else "stopped"
            return trial("a", 1.5, state=state, error="burst", measures={"loss": 4.0})

    ways = [Population(step="part", every=1, last=1, direction=way) for way in ("minimize", "maximize")]
    rest = partial(trained_until, Resting(), (LOSS,))
    assert rest(ways[0], {"a": 1, "part.rest_at": 1}) == 4.0
    assert [rest(way, {"a": 2, "part.rest_at": 1}) for way in ways] == [math.inf, -math.inf]
    assert rest(ways[0], {"a": 1}) == (1.5,)
    other = replace(ways[0], measure="away")
    with pytest.raises(UnknownName, match="measure of step 'part' is called 'away'"):
        rest(other, {"a": 1, "part.rest_at": 1})


@pytest.mark.parametrize(("cost", "has"), [(0.0, None), (5.0, 3.0), (5.0, None)])
def test_what_a_search_may_cost_needs_prices(cost, has):
    class Priced:
        def spent(self):
            return has

    if cost and has is None:
        with pytest.raises(SearchError, match=r"search: max_cost=5.0, expected 0 without prices"):
            purse_of(Priced(), Extent(max_cost=cost), 1)
        return
    purse = purse_of(Priced(), Extent(max_cost=cost), 1)
    assert (purse.spent(), purse.over()) == (has or 0.0, False)


def test_what_was_tried_comes_first_and_as_it_is_written_where_it_lies_in_the_space():
    inside, outside = trial("", 1.0, density=0.5), trial("", 1.0, density=2.0)
    before = [trial("a", 1.0, density=0.7), trial("c", 1.0, state="interrupted", density=0.8)]
    assert [p["m.density"] for p in known_points(SPACE, inside, before)] == [0.5, 0.7, 0.8]
    assert [p["m.density"] for p in known_points(SPACE, outside, before)] == [0.7, 0.8]


def test_how_many_at_once_decides_nothing():
    params = {"extent": None, "num_trials": 5, "max_hours": 0.0, "concurrency": 3, "seed": 0}
    assert search.decisive(params).keys() == params.keys() - {"concurrency"}
