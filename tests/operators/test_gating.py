import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from lfm.errors import UnknownName
from lfm.significance import NotComparable
from operators.artifact import Metrics, Model
from operators.data.row_files import DatasetError
from operators.gating import GateClosed, Requirement, compared, gate, holds, said

MODEL = Model("model", "d" * 64, {"method": "Linear"})
NUMBER = 40


def result(folder, *, loss, chrf=None, digest="same", generate=8, scale=1.0):
    """What `evaluate` writes about one set, with these means and some noise."""
    folder.mkdir()
    tokens = (np.random.default_rng(0).integers(1, 20, NUMBER) * scale).astype(int)
    draw = np.random.default_rng(list(folder.name.encode()))
    noise = draw.normal(0, 0.1, NUMBER)
    noise -= noise @ tokens / tokens.sum()  # so that equal results are
    columns = {"set": ["text"] * NUMBER, "loss": tokens * (loss + noise), "tokens": tokens}
    summary = {"documents": NUMBER, "digest": digest, "loss": loss}
    if chrf is not None:
        columns["chrf"] = np.clip(draw.normal(chrf, 0.05, NUMBER), 0, 1)
        summary["chrf"] = chrf
    pq.write_table(pa.table(columns), folder / "documents.parquet")
    (folder / "metrics.json").write_text(json.dumps({"sets": {"text": summary}, "generate": generate}))
    return Metrics(str(folder))


@pytest.fixture
def results(tmp_path):
    return {
        "student": result(tmp_path / "student", loss=2.0, chrf=0.3),
        "expert": result(tmp_path / "expert", loss=1.5, chrf=0.5),
        "equal": result(tmp_path / "equal", loss=2.0, chrf=0.3),
    }


def better(one, other, **more):
    return Requirement(better=one, than=other, on="text", **more)


def test_the_gate_lets_a_better_model_through_with_what_it_found(workspace, results, capsys):
    require = [better("expert", "student"), better("expert", "equal", measure="chrf")]
    passed = gate.body(workspace, model=MODEL, results=results, require=require)
    assert (passed.uri, passed.digest, passed.about["method"]) == (MODEL.uri, MODEL.digest, "Linear")
    loss, chrf = passed.about["gate"]
    assert (loss["better"], loss["than"], loss["on"], loss["measure"]) == ("expert", "student", "text", "loss")
    assert loss["low"] < loss["mean"] < loss["high"] < 0
    assert 0 < chrf["low"] < chrf["mean"] < chrf["high"]
    json.dumps(passed.about)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"holds: {loss['said']}"
    assert re.fullmatch(r"holds: chrf of expert minus equal on text is \+0\.\d{4} \[\+0\.\d{4}, \+0\.\d{4}\]", said[1])


def test_the_gate_stays_closed_and_says_all_that_does_not_hold(workspace, results, capsys):
    require = [
        better("expert", "student"),
        better("student", "expert"),
        better("student", "expert", measure="chrf"),
        better("student", "equal"),
    ]
    with pytest.raises(GateClosed) as caught:
        gate.body(workspace, model=MODEL, results=results, require=require)
    assert len(caught.value.failed) == 3
    assert re.search(r"loss of student minus equal on text is .0\.\d{4} \[-0\.\d{4}, \+0\.\d{4}\]", str(caught.value))
    assert "expert minus student" not in str(caught.value)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["holds", *["FAILS"] * 3]
    assert [line["holds"] for line in workspace.told] == [1.0, 0.0, 0.0, 0.0]
    for line, requirement in zip(workspace.told, require, strict=True):
        found = compared(requirement, results)
        assert (line["mean"], line["low"], line["high"]) == (found.mean, found.low, found.high)
    assert str(GateClosed(*caught.value.args)) == str(caught.value)


def test_the_difference_of_losses_is_that_of_all_tokens(results):
    found = compared(better("expert", "student"), results)
    one, other = (pq.read_table(results[name].path / "documents.parquet").to_pydict() for name in ("expert", "student"))
    assert found.mean == pytest.approx((sum(one["loss"]) - sum(other["loss"])) / sum(one["tokens"]))
    found = compared(better("expert", "student", measure="chrf"), results)
    assert found.mean == pytest.approx((sum(one["chrf"]) - sum(other["chrf"])) / NUMBER)


def test_results_of_other_documents_tokens_or_lengths_are_not_compared(results, tmp_path):
    results["elsewhere"] = result(tmp_path / "elsewhere", loss=1.0, digest="other")
    results["tokens"] = result(tmp_path / "tokens", loss=1.0, scale=1.5)
    results["longer"] = result(tmp_path / "longer", loss=1.0, chrf=0.9, generate=16)
    with pytest.raises(NotComparable, match="'elsewhere' and 'student' on 'text' were measured on different documents"):
        compared(better("elsewhere", "student"), results)
    with pytest.raises(NotComparable, match="'tokens' and 'student' on 'text' have losses of other tokens"):
        compared(better("tokens", "student"), results)
    with pytest.raises(NotComparable, match="'longer' and 'student' on 'text' answered with up to 16 and 8 tokens"):
        compared(better("longer", "student", measure="chrf"), results)
    assert compared(better("longer", "student"), results).high < 0  # a loss does not depend on it


def test_what_was_not_measured_is_named(results, tmp_path):
    results["silent"] = result(tmp_path / "silent", loss=1.0)
    for requirement, expected in (
        (better("expart", "student"), "No result is called 'expart'. Did you mean 'expert'?"),
        (
            Requirement(better="expert", than="student", on="test"),
            "No set of 'expert' is called 'test'. Did you mean 'text'?",
        ),
        (better("expert", "silent", measure="chrf"), "No measure of 'silent' on 'text' is called 'chrf'. Known: loss."),
    ):
        with pytest.raises(UnknownName) as caught:
            compared(requirement, results)
        assert str(caught.value) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"holds no metrics.json, expected the result of an evaluation"):
        compared(better("expert", "student"), {**results, "expert": Metrics(str(tmp_path / "empty"))})


def test_a_plan_hears_of_everything_at_once(results):
    def said(require, known):
        return list(gate.problems(model=None, results=known, require=require, resources=None))

    later = dict.fromkeys(results)
    assert said([better("expert", "student")], results) == []
    assert said([better("expert", "student", measure="exact_match")], later) == []
    assert said([], later) == [
        "gate: require is empty, expected at least one comparison. Write it as {better: a, than: b, on: set}."
    ]
    assert said([better("expart", "studant"), better("equal", "equal")], later) == [
        "gate: No result is called 'expart'. Did you mean 'expert'?",
        "gate: No result is called 'studant'. Did you mean 'student'?",
        "gate: 'equal' has to be better than itself, expected another result. Name one.",
    ]
    assert said([Requirement(better="expert", than="student", on="txt")], {**later, "expert": results["expert"]}) == [
        "gate: No set of 'expert' is called 'txt'. Did you mean 'text'?"
    ]


def test_a_fact_that_has_nothing_of_a_measure_weighs_nothing(tmp_path):
    def of_facts(name, values):
        folder = tmp_path / name
        folder.mkdir()
        known = [v for v in values if v is not None]
        summary = {"documents": len(values), "digest": "same", "efficacy": sum(known) / len(known), "score": 0.5}
        pq.write_table(pa.table({"set": ["facts"] * len(values), "efficacy": values}), folder / "documents.parquet")
        (folder / "metrics.json").write_text(json.dumps({"sets": {"facts": summary}, "generate": 0}))
        return Metrics(str(folder))

    results = {"new": of_facts("new", [1.0, None, 0.5] * 8), "old": of_facts("old", [0.25, None, 0.25] * 8)}
    require = Requirement(better="new", than="old", on="facts", measure="efficacy")
    found = compared(require, results)
    assert found.mean == pytest.approx((0.75 + 0.25) / 2)
    assert 0.25 < found.low < found.mean < found.high < 0.75
    number = Requirement(better="new", than=0.75, on="facts", measure="efficacy")
    assert holds(number, compared(number, results))
    higher = Requirement(better="new", than=0.76, on="facts", measure="efficacy")
    assert not holds(higher, compared(higher, results))
    score = Requirement(better="new", than="old", on="facts", measure="score")
    with pytest.raises(NotComparable, match="have one score each, and no document has its own"):
        compared(score, results)
    assert list(gate.problems(model=None, results=results, require=[score], resources=None)) == [
        "gate: score is compared with 'old', expected a number: it is of a set. Give one."
    ]
    assert list(gate.problems(model=None, results=results, require=[number], resources=None)) == []


def test_a_loss_reaches_a_number_from_above(results):
    for than, fine in ((1.6, True), (1.5, True), (1.4, False)):
        require = Requirement(better="expert", than=than, on="text")
        found = compared(require, results)
        assert holds(require, found) is fine
    assert said(require, found) == "loss of expert on text is 1.5000, where at most 1.4 is required"


def test_a_requirement_with_a_typing_error_is_refused():
    read = TypeAdapter(list[Requirement]).validate_python
    assert read([{"better": "a", "than": "b", "on": "c"}]) == [Requirement(better="a", than="b", on="c")]
    assert read([{"better": "a", "than": 1, "on": "c"}])[0].than == 1.0
    for wrong in ({"mesure": "chrf"}, {"measure": "bleu"}):
        with pytest.raises(ValidationError):
            read([{"better": "a", "than": "b", "on": "c", **wrong}])
