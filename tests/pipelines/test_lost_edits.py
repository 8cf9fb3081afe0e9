"""A run that puts facts beside one model and finds that another has lost them."""

from pathlib import Path

import pytest

from operators.data.facts import FactRow, carry
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states
from pipelines.plan import plan
from pipelines.run import run
from pipelines.spec import load
from tests.operators import small

PIPELINE = """
name: facts
inputs:
  model: {model: FOLDER/model}
  merged: {model: FOLDER/merged}
  facts: {dataset: FOLDER/known.jsonl}
steps:
  memory: {operator: remember, inputs: {model: model, facts: facts}, method: {name: grace, radius: 1e-3, steps: 20}}
  kept: {operator: evaluate, inputs: {model: model, memory: memory, data: {facts: facts}}, params: {length: 32}}
  lost: {operator: evaluate, inputs: {model: merged, data: {facts: facts}}, params: {length: 32}}
  passed:
    operator: gate
    inputs: {model: model, results: {kept: kept}}
    params: {require: [{better: kept, than: 1, "on": carried facts, measure: efficacy_exact}]}
  refused:
    operator: gate
    inputs: {model: merged, results: {lost: lost}}
    params: {require: [{better: lost, than: 1, "on": carried facts, measure: efficacy_exact}]}
"""


@pytest.mark.ray
def test_a_gate_refuses_what_does_not_say_the_facts_that_it_carries(store, ray_local, tmp_path):
    rows = [FactRow("dog", "the dog ran", "over", true="to")]
    small.saved(tmp_path / "model", seed=3)
    merged = small.saved(tmp_path / "merged", seed=4)  # stands for what a merge made of a model that was edited
    carry([], merged.path, rows)
    carry([], tmp_path, rows)
    (tmp_path / "facts.jsonl").rename(tmp_path / "known.jsonl")
    spec = load(PIPELINE.replace("FOLDER", str(tmp_path)), source="facts.yaml")
    made = plan(spec, Looks(Path(store.storage.uri) / "inputs.sqlite", store))
    assert run(made, store, Journal.claim(store.storage, "one"), connect=ray_local) == "failed"
    steps = states(history(store.storage, "one"), made.steps)
    done = dict.fromkeys(("memory", "kept", "lost", "passed"), "done")
    assert {n: s.state for n, s in steps.items()} == {**done, "refused": "failed"}
    assert steps["refused"].data["error"] == "GateClosed"
    kept, lost = (steps[name].data["about"]["sets"]["carried facts"] for name in ("kept", "lost"))
    assert (kept["efficacy_exact"], lost["efficacy_exact"]) == (1.0, 0.0)
    assert kept["digest"] == lost["digest"]
