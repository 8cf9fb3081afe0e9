"""What MLflow should hold of a run, read from journals."""

import math

from pipelines.tracking.experiment import numbers, params, read, stamp
from tests.pipelines.journals import BASE, BEGAN, TEXT, Written


def children(store, run="r"):
    return {c.step: c for c in read(store.storage, run).children}


def test_every_executed_step_is_a_child_and_a_reused_one_is_none(store):
    Written(store).whole()
    found = read(store.storage, "r")
    assert [c.step for c in found.children] == ["tuned", "merged", "measured", "passed", "named"]
    assert {c.status for c in found.children} == {"FINISHED"}
    assert (found.name, found.run, found.status, found.over) == ("story", "r", "FINISHED", True)
    assert found.began == (BEGAN + 1) * 1000
    assert found.tags == {"lfm.run": "r", "lfm.status": "done", "lfm.store": store.storage.uri, "lfm.version": "0.1.0"}
    assert found.stamp == stamp(store.storage, "r") == (1, 15)


def test_a_child_carries_method_parameters_resources_and_where_it_stands(store):
    written = Written(store).whole()
    tuned = children(store)["tuned"]
    assert tuned.params == {
        "operator": "tune", "method": "lora", "method.rank": "4", "max_steps": "2", "schedule": '["warm", 0.5]',
        "note": "as it is", "resources.workers": "1", "resources.accelerator": "cpu",
    }  # fmt: skip
    assert tuned.tags == {
        "lfm.run": "r", "lfm.step": "tuned", "lfm.operator": "tune", "lfm.kind": "adapter", "lfm.attempts": "2",
        "lfm.fingerprint": "f-tune", "lfm.digest": written.made["tuned"],
    }  # fmt: skip
    assert "method" not in children(store)["measured"].params


def test_series_are_what_each_attempt_measured_and_what_the_step_noted(store):
    written = Written(store).whole()
    tuned = children(store)["tuned"]
    first, second = tuned.series["1"], tuned.series["2"]
    assert [(p.key, p.value, p.step) for p in first] == [("loss", 3.0, 1), ("loss", 2.5, 2)]
    assert second[0].value == 2.5
    assert math.isnan(second[1].value)
    assert first[0].time == int((BEGAN + 3.01) * 1000)
    assert [(p.key, p.value, p.step) for p in tuned.series["result"]] == [("steps", 2.0, 2)]
    sets = [(p.key, p.value) for p in children(store)["measured"].series["result"]]
    assert sets == [("sets/chat/documents", 3.0), ("sets/chat/loss", 1.5), ("sets/chat/perplexity", 4.5)]
    assert children(store)["measured"].judged == written.made["merged"]
    assert tuned.judged == ""


def test_what_came_along_with_an_input_is_not_noted_again(store):
    Written(store).whole()
    found = children(store)
    assert [p.key for p in found["merged"].series["result"]] == ["kept"]
    assert [(p.key, p.value) for p in found["passed"].series["result"]] == [("gate/0/mean", -0.25)]
    assert found["named"].series["result"] == []


def test_inputs_and_outputs_have_our_digests_and_lie_where_they_lie(store):
    written = Written(store).whole()
    found = children(store)

    def flows(step):
        return [(t.edge, t.name, t.kind, t.digest) for t in found[step].takes]

    assert flows("tuned") == [
        ("model", "base", "model", BASE["digest"]),
        ("data", "prepared", "dataset", written.made["prepared"]),
    ]
    assert found["tuned"].takes[0].uri == BASE["uri"]
    assert found["tuned"].takes[1].uri == f"{store.storage.uri}/artifacts/{written.made['prepared']}"
    assert flows("merged")[1] == ("experts", "tuned", "adapter", written.made["tuned"])
    assert flows("measured")[1:] == [
        ("data", "prepared", "dataset", written.made["prepared"]),
        ("data", "text", "dataset", TEXT["digest"]),
    ]
    made = found["merged"].makes
    assert (made.name, made.kind, made.digest) == ("merged", "model", written.made["merged"])


def test_registered_names_come_with_all_that_the_registry_has_of_them(store):
    one, two = Written(store, "one").whole(), Written(store, "two").whole()
    (found,) = read(store.storage, "one").registered
    assert found.name == "story-helper"
    assert [v.digest for v in found.versions] == [one.made["merged"], two.made["merged"]]
    assert found.aliases == {"champion": 2}


def test_a_run_that_goes_on_or_broke_off_says_so(store):
    written = Written(store)
    written.begin("prepared", "tuned")
    written.reuse("prepared")
    written.start("tuned")
    written.measure("tuned", 1, 3.0)
    now = read(store.storage, "r")  # its driver is this process, which for itself is none
    assert (now.status, now.over, now.tags["lfm.status"]) == ("KILLED", False, "interrupted")
    assert [c.status for c in now.children] == ["KILLED"]
    assert now.children[0].ended == now.ended == int((BEGAN + 3.01) * 1000), "when it was heard of last"
    written.end("interrupted")
    now = read(store.storage, "r")
    assert (now.status, now.over) == ("KILLED", True)
    assert now.children[0].ended == now.ended == (BEGAN + 4) * 1000


def test_a_failed_step_says_why(store):
    written = Written(store)
    written.begin("prepared", "tuned")
    written.reuse("prepared")
    written.start("tuned")
    written.fail("tuned", 1)
    written.end("failed")
    (child,) = read(store.storage, "r").children
    assert (child.status, child.makes) == ("FAILED", None)
    assert child.tags["lfm.error"] == "ValueError: asked to fail"
    assert "lfm.digest" not in child.tags
    assert "result" not in child.series


def test_a_run_with_endpoints_up_is_over(store):
    written = Written(store)
    written.begin("prepared")
    written.reuse("prepared")
    written.write("serving", endpoints=[])
    assert read(store.storage, "r").over
    written.begin("prepared")
    assert not read(store.storage, "r").over


def test_a_run_without_a_journal_is_nothing(store):
    assert read(store.storage, "nobody") is None


def test_numbers_are_found_at_any_depth_and_truth_is_none():
    value = {"a": 1, "b": {"c": [2.5, True, {"d": 3}]}, "e": "4", "f": None}
    assert list(numbers(value)) == [("a", 1.0), ("b/c/0", 2.5), ("b/c/2/d", 3.0)]


def test_names_and_values_are_such_as_mlflow_takes():
    planned = {"operator": "o", "method": None, "params": {"größe%": "x" * 7000}, "resources": {}}
    assert params(planned) == {"operator": "o", "größe_": "x" * 6000}


def test_a_trial_stands_below_its_run_with_what_it_changed_and_what_it_is_judged_by(store):
    Written(store, "r~found~1").trial("r", **{"merged.density": 0.25, "tuned.rank": 4})
    found = read(store.storage, "r~found~1")
    assert (found.below, found.params) == ("r", {"merged.density": "0.25", "tuned.rank": "4"})
    measured = {p.key: p.value for p in found.points}
    assert measured == {"sets/chat/documents": 3.0, "sets/chat/loss": 1.5, "sets/chat/perplexity": 4.5}
    Written(store).whole()
    whole = read(store.storage, "r")
    assert (whole.below, whole.params, whole.points) == ("", {}, [])
