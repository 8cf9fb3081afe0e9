"""What commands and the page say of what a run took: of a journal that was written by hand."""

import json
import re

import pytest

from cluster.profile import Group, Head, Profile
from pipelines.__main__ import main
from pipelines.lineage import Journal
from pipelines.page.account import account
from pipelines.page.document import document
from tests.pipelines.journals import planned
from tests.pipelines.test_usage import PROFILE, at, nodes, started

TOTAL = {"seconds": [3600, 7200], "steps": [2, 4], "head": [0.5, 1], "idle": [0, 0], "cost": [2.5, 5], "unknown": ["b"]}
ESTIMATE = {"group": "cpu", "nodes": 2, "seconds": [3600, 7200], "cost": [2, 4]}
FREE = Profile(
    name="free", place="kuberay", head=Head(cpus=1, memory_gib=1), groups={"cpu": Group(cpus=8, memory_gib=9)}
)


@pytest.fixture
def told(store, capsys):
    """Writes a run, and types a command about it."""

    def write(name, profile=PROFILE):
        noted = {} if profile is None else {"estimate": {"steps": {"a": ESTIMATE}, "total": TOTAL}}
        steps = {
            n: {
                **planned("tune", "model", {}),
                "needs": [],
                "unhashed": [],
                "components": {"operator": "tune", "method": None},
            }
            for n in "ab"
        }
        begun = started(0, None, profile, run=name, spec={"name": "p"}, inputs={}, version="1", **noted)
        begun.data["steps"].update(steps)
        made = {"artifact": "model", "digest": "", "about": {}, "attempt": 1, "seconds": 3600.0}
        journal = Journal.claim(store.storage, name)
        journal.write([begun, nodes(0, cpu=2), at(0, "start", "a", attempt=1, log="x"), at(1, "commit", "a", **made),
                       at(2, "finished", status="done")])  # fmt: skip

    def type_(*words):
        assert main([*words, "--store", store.storage.uri]) == 0
        return capsys.readouterr().out

    write.type = type_
    return write


def test_show_has_what_each_step_took_beside_what_was_foreseen(told, store):
    told("r")
    lines = [re.split(r"  +", line.strip()) for line in told.type("show", "r").splitlines()]
    assert [line for line in lines if line[0] in ("what it took", "a", "b", "idle", "head", "all")][2:] == [
        ["what it took", "machines", "node-hours", "foreseen", "EUR", "foreseen"],
        ["a", "cpu", "1.00", "2.00 to 4.00", "1.00", "2.00 to 4.00"],
        ["idle", "cpu", "3.00", "3.00", "0.00 or more"],
        ["head", "2.00", "1.00 or more", "1.00", "0.50 or more"],
        ["all", "6.00", "5.00", "2.50 or more"],
    ]
    said = json.loads(told.type("show", "r", "--json"))
    assert said["steps"]["a"]["took"] == {"hours": {"cpu": 1.0}, "cost": 1.0}
    assert said["steps"]["a"]["estimate"] == ESTIMATE
    assert said["steps"]["b"]["took"] == {"hours": {}, "cost": 0.0}
    assert said["estimate"] == TOTAL
    assert said["took"]["all"] == {"hours": {"cpu": 4.0, "head": 2.0}, "cost": 5.0}
    html = document(account(store, "r", now=0.0))
    assert 'id="node-hours"' in html
    assert "5.00 EUR" in html
    assert re.findall(r'href="#step-a">a</a></th><td>cpu</td><td class="number">1.00</td>', html)


def test_without_prices_nothing_has_a_cost_and_without_a_profile_nobody_knows_anything(told, store):
    told("free", FREE)
    assert re.search(r"what it took +machines +node-hours +foreseen *\n", told.type("show", "free"))
    assert json.loads(told.type("show", "free", "--json"))["took"]["all"]["cost"] is None
    told("none", None)
    assert "what it took" not in told.type("show", "none")
    assert not {"took", "estimate"} & json.loads(told.type("show", "none", "--json")).keys()
    assert 'id="node-hours"' not in document(account(store, "none", now=0.0))
    assert "cost" not in told.type("ps")
    told("priced")
    assert [(r["run"], r["cost"]) for r in json.loads(told.type("ps", "--json"))] == [
        ("free", None), ("none", None), ("priced", 5.0)
    ]  # fmt: skip
    assert [line.split()[-1] for line in told.type("ps").splitlines()] == ["cost", "1/2", "1/2", "EUR"]
