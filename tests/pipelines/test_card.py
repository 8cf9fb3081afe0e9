"""What an evaluation noted, as the one reader tells it to the card, the terminal and the page."""

import pytest
from rich.console import Console

from pipelines.ancestry import ancestry
from pipelines.card import model_card
from pipelines.findings import Measured, cells, columns, evaluation, measured_table, measurements
from pipelines.lineage import StepState
from pipelines.store import Result

NOTED = {
    "sets": {
        "chat": {"documents": 12, "digest": "7f", "loss": 1.25, "perplexity": 3.4903, "tokens": 90},
        "mail": {"documents": 3, "loss": 2, "chrf": 0.5},
    },
    "generate": 0,
}
TABLED = [["chat", "12", "1.25", "3.49", "", ""], ["mail", "3", "2", "", "", "0.5"]]


def test_an_evaluation_is_read_set_by_set_with_its_numbers():
    assert evaluation(NOTED) == [
        Measured(on="chat", documents=12, values={"loss": 1.25, "perplexity": 3.4903, "tokens": 90.0}),
        Measured(on="mail", documents=3, values={"loss": 2.0, "chrf": 0.5}),
    ]
    found = evaluation(NOTED)
    assert [cells(one, columns(found)) for one in found] == TABLED


def test_what_is_measured_of_edits_has_columns_only_where_there_are_edits():
    sets = {**NOTED["sets"], "carried facts": {"documents": 2, "efficacy": 0.5, "score": 0.25, "facts": {"score": 1}}}
    found = evaluation({"sets": sets})
    assert columns(found) == ("loss", "perplexity", "exact_match", "chrf", "efficacy", "score")
    assert cells(found[2], columns(found)) == ["carried facts", "2", "", "", "", "", "0.5", "0.25"]


@pytest.mark.parametrize(
    "noted", [{}, {"sets": 3}, {"sets": ["chat"]}, {"sets": {"chat": 1.0}}, {"sets": {"train": {"rows": 5}}}]
)
def test_what_other_operators_note_is_no_evaluation(noted):
    assert evaluation(noted) == []


def test_the_terminal_and_the_card_say_the_same_of_an_evaluation(store):
    components = {"operator": "make", "method": None}
    model = {"kind": "model", "digest": "m" * 64, "uri": ""}
    store.commit(Result(fingerprint="f1", kind="model", digest=model["digest"], run="r", step="made", inputs={},
                        components=components))  # fmt: skip
    for step, about in (("measured", NOTED), ("counted", {"sets": {"train": {"rows": 5}}})):
        store.commit(Result(fingerprint=step, kind="metrics", digest=step, run="r", step=step, inputs={"model": model},
                            components=components, about=about))  # fmt: skip
    card = model_card(store, ancestry(store, model["digest"]), name="story")
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert [[c.strip() for c in line.strip("|").split("|")] for line in rows[2:]] == [["measured", *r] for r in TABLED]

    run = {"made": StepState(state="done"), "measured": StepState(state="done", data={"about": NOTED})}
    console = Console(width=200)
    with console.capture() as said:
        console.print(measured_table(measurements(run)))
    head, *lines = said.get().splitlines()
    assert head.split() == ["measured", "on", "documents", "loss", "perplexity", "exact", "match", "chrf"]
    assert [line.split() for line in lines] == [["measured", *filter(None, r)] for r in TABLED]
