"""What the page and `lfm show` say of a search."""

import math

import pytest

from pipelines.__main__ import main
from pipelines.findings import search, searched_table, searches, value_text
from pipelines.lineage import StepState
from pipelines.page.document import document
from pipelines.page.searches import axis_of
from pipelines.view import seconds
from tests.pipelines.test_page import CHAIN, Page, Told, losses

LOSS = {"name": "loss on text", "measure": "loss", "on": "text", "direction": "minimize"}
SIZE = {"name": "parameters", "measure": "parameters", "on": "", "direction": "minimize"}


def trial(run, density, values, way="ties", **others):
    method = {"name": way, **({"scale": 2.0} if way == "linear" else {})}
    changes = {"merged.method": method, **({"merged.density": density} if density is not None else {})}
    usual = {"state": "done", "error": "", "seconds": 3.0, "computed": 2, "reused": 3}
    return {"run": run, "changes": changes, "values": values, **usual, **others}


def noted(objectives, best, front, trials):
    return {"search": {"objectives": objectives, "best": best, "front": front, "trials": trials}}


TWO = noted(
    [LOSS, SIZE],
    "r~found~b",
    ["", "r~found~b"],
    [
        trial("", 0.2, [2.0, 10.0]),
        trial("r~found~a", 0.5, [2.5, 12.0]),
        trial("r~found~b", None, [1.5, 11.0], way="linear"),
        trial("r~found~c", 0.9, [], state="failed", error="merged: it <burst> [b]"),
    ],
)


@pytest.fixture
def page(store):
    steps = {"a": {"data": "text"}, "search_1": {"result": "a", "judged": "a"}, "gated": {"model": "search_1"}}

    def made(about):
        told = Told(store, steps).done("a").done("search_1", losses(2.0, 1.5, 1.5, name="best"), **about)
        told.done("gated", **about).finish()
        return Page(document(told.account()))

    return made


def test_a_search_is_told_with_its_trials_across_its_fields_the_best_so_far_the_front_and_a_table(page):
    found = page(TWO)
    assert "search_1 4 trials, 1 failed; the best has loss on text 1.5, parameters 11" in found.text
    ways = [a["class"].removeprefix("trial ") for a in found.all("path") if a.get("class", "").startswith("trial ")]
    assert sorted(ways) == sorted(["best", "unbeaten", "tried"] * 2)  # in the plot and in its legend
    told = [a.get("aria-label", "") for a in found.all("svg")]
    assert "Trials across merged.method, merged.density, loss on text, parameters" in told
    assert "loss on text from 2 to 1.5 in 4 trials" in told
    assert "parameters against loss on text: 2 of 3 trials are unbeaten" in told
    assert "merged: it <burst> [b]" in found.text
    assert "linear(scale=2)" in found.text
    assert found.text.count("4 trials, 1 failed") == 1  # the note has travelled on, and is told once
    assert "Curves" not in found.text  # what it measured is drawn there


def test_with_one_objective_there_is_no_front(page):
    found = page(noted([LOSS], "", [""], [trial("", 0.2, [2.0]), trial("r~found~a", 0.5, [2.5])]))
    assert "2 trials; the best has loss on text 2" in found.text
    assert not [a for a in found.all("svg") if "against" in a.get("aria-label", "")]
    assert "unbeaten" not in {a.get("class", "").removeprefix("trial ") for a in found.all("path")}


def test_one_trial_alone_makes_no_trouble(page):
    assert "1 trials; the best has" in page(noted([LOSS], "", [""], [trial("", 0.2, [0.0])])).text


def test_numbers_lie_on_a_scale_and_anything_else_one_above_the_other():
    axis = axis_of("density", [0.0, 1.0, 0.5, None])
    low, high, middle, missing = axis.places
    assert high < middle < low < missing  # the larger the higher; below all what is not set
    assert math.isclose(low - middle, middle - high)
    assert axis.marks[-1] == (missing, "not set")
    words = axis_of("way", ["b", "a", None, "b", True])
    assert len(set(words.places)) == 4
    assert sorted(text for _, text in words.marks) == ["True", "a", "b", "not set"]


def test_the_table_has_a_row_for_each_trial_and_marks_those_that_count():
    one = search(TWO)
    table = searched_table(one)
    assert [c.header for c in table.columns] == [
        "trial", "merged.method", "merged.density", "loss on text", "parameters", "state", "took", "ran", "reused", "",
    ]  # fmt: skip
    cells = [[str(c) for c in column.cells] for column in table.columns]
    assert cells[1] == ["ties", "ties", "linear(scale=2)", "ties"]
    assert cells[2] == ["0.2", "0.5", "", "0.9"]
    assert cells[3] == ["2", "2.5", "1.5", ""]
    assert cells[6] == ["", *[seconds(3.0)] * 3]
    assert cells[-1] == ["unbeaten", "", "best", "merged: it <burst> \\[b]"]


def test_a_note_that_travels_on_is_one_search_and_another_s_note_is_none():
    states = {n: StepState(state="done", data={"about": TWO}) for n in ("found", "gated")}
    assert [step for step, _ in searches(states)] == ["found"]
    assert search({"search": "mine"}) is None
    assert search({"search": {"trials": []}}) is None
    assert search({}) is None


def test_values_are_written_short():
    values = (0.123456, 4, "warm", True, {"name": "ties"}, {"name": "ties", "density": 0.25})
    assert [value_text(v) for v in values] == ["0.1235", "4", "warm", "True", "ties", "ties(density=0.25)"]


def test_a_schedule_is_written_as_what_changes_when():
    changes = [{"at": 2, "values": {}}, {"at": 4, "values": {"learning_rate": 0.123456, "dropout": 0.1}}]
    assert value_text(changes) == "at 4 learning_rate 0.1235, dropout 0.1"
    assert value_text(changes[:1]) == "unchanged"
    assert value_text([1, 2]) == "[1, 2]"


@pytest.mark.parametrize("why", [{}, {"why": "TIES: density=2.0, expected 0 < density <= 1."}])
def test_a_trial_that_was_stopped_or_had_no_plan_can_be_shown(store, capsys, why):
    told = Told(store, {} if why else CHAIN)
    if not why:
        told.done("a")
    told.tell("finished", status="failed" if why else "stopped", **why)
    assert ("failed" if why else "stopped") in Page(document(told.account())).text
    assert main(["show", told.run, "--store", store.storage.uri]) == 0
    assert why.get("why", "stopped") in capsys.readouterr().out
