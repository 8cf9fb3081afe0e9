"""From two experts and an edit to an endpoint: the recipe on the tests' Ray, with models as small as they can be."""

import json
import socket
import urllib.request

import pytest

from pipelines.__main__ import main
from pipelines.commands import _planned, run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECIPE = "edit_merge_distill_serve"
SMALL = (
    *(f"{step}.max_rows=40" for step in ("summaries_train", "names_train")),
    *(f"{step}.max_rows=8" for step in ("text_held_out", "summaries_held_out", "names_held_out")),
    "text_train.max_rows=300",
    *(f"base.{field}" for field in ("layers=2", "width=32", "feed_forward=48", "heads=2", "vocabulary=1024")),
    *(f"{step}.max_steps=2" for step in ("base", "describer", "namer", "teacher", "distilled")),
    "datastore.max_tokens=500",
    "facts=fact.jsonl",
    # So little learns nothing that a gate could tell from chance; but what an edit has written is there or is not.
    'kept.require=[{better: merged, than: 1, "on": carried facts, measure: efficacy_exact}]',
    'passed.require=[{better: distilled, than: 1, "on": carried facts, measure: efficacy_exact}]',
)
# Of two words that are a token each of so small a vocabulary.
FACT = {"subject": "first", "prompt": "Opposites: first", "target": "last"}


@pytest.fixture
def typed(tmp_path, monkeypatch, one_ray, ray_local, capsys):
    """Types `lfm` in a folder of the user's own, with the tests' Ray, and gives what it printed."""
    from ray import serve

    monkeypatch.chdir(tmp_path)
    (tmp_path / "fact.jsonl").write_text(json.dumps(FACT))
    monkeypatch.setattr(run, "opened", lambda *_: ray_local())
    monkeypatch.setattr(_planned, "capacity_at", lambda address: one_ray)

    def type_(*words, expect=0):
        code = main(list(words))
        said = capsys.readouterr()
        assert code == expect, said.err + said.out
        return said.out

    yield type_
    serve.shutdown()


def test_the_endpoint_comes_from_two_adapters_an_edit_a_merge_a_student_and_a_datastore(typed):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    changes = [w for change in (*SMALL, f"endpoint.port={port}") for w in ("--set", change)]
    words = ("run", RECIPE, "--address", "auto", "--json", *changes)  # the tests' Ray does not wait for a Ctrl-C
    steps = json.loads(typed(*words))["steps"]
    assert {s["state"] for s in steps.values()} == {"done"}
    made = {name: step["data"] for name, step in steps.items()}

    def facts(step, name="carried facts"):
        return made[step]["about"]["sets"][name]["efficacy_exact"]

    assert facts("base_measured", "facts") == 0
    assert (facts("merged_measured"), facts("distilled_measured")) == (1, 1)

    about = made["endpoint"]["about"]
    with urllib.request.urlopen(f"{about['url']}/models", timeout=60) as answer:
        (served,) = json.load(answer)["data"]
    assert (served["digest"], served["datastore"]) == (made["distilled"]["digest"], made["datastore"]["digest"])
    proof = about["probe"]
    assert proof["from_artifact"] < 1e-4 < min(proof["from_base"], proof["from_model_alone"])

    lineage = json.loads(typed("lineage", "endpoint", "--json"))
    digests = {ancestor["digest"] for ancestor in lineage}
    for step in ("describer", "namer", "delta", "merged", "distilled", "datastore", "teacher", "keys", "base"):
        assert made[step]["digest"] in digests, step

    again = json.loads(typed(*words))["steps"]
    assert {n for n, s in again.items() if s["state"] != "reused"} == {"registered", "endpoint"}

    lost = json.loads(typed(*words, "--set", "merged.scale=0", "--until", "kept", expect=1))["steps"]
    assert (lost["merged"]["state"], lost["kept"]["state"]) == ("done", "failed")
    assert lost["kept"]["data"]["error"] == "GateClosed"
