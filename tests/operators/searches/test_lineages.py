from operators.searches.lineages import Lineage, resting
from operators.searches.space import Population

EVERY_TWO = Population(step="part", every=2, last=5)


def test_a_lineage_tells_what_a_run_of_it_changes():
    first = Lineage(start={"part.learning_rate": 0.1, "part.method.dropout": 0.0})
    assert first.changes(EVERY_TWO, 2) == {**first.start, "part.rest_at": 2}
    rested = Lineage(start=first.start, at=2)
    later = rested.on({"part.learning_rate": 0.1, "part.method.dropout": 0.3})
    assert later.now == {"part.learning_rate": 0.1, "part.method.dropout": 0.3}
    assert later.changes(EVERY_TWO, None) == {
        **first.start,
        "part.midway": [{"at": 2, "values": {"dropout": 0.3}}],
    }
    assert rested.on(rested.now).changes(EVERY_TWO, 4)["part.midway"] == [{"at": 2, "values": {}}]
    assert Lineage.of(later.text()) == later


def test_it_rests_up_to_the_last_time_and_then_goes_on_to_its_end():
    rests = [Lineage(start={}, at=at).next_rest(EVERY_TWO) for at in (0, 2, 4)]
    assert rests == [2, 4, None]
    assert resting({"part.rest_at": 2}, EVERY_TWO)
    assert not resting({"part.learning_rate": 2}, EVERY_TWO)
    assert not resting({"part.rest_at": 2}, None)
