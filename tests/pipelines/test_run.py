"""Runs on Ray, one for all tests."""

import contextlib
import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cluster.capacity import Capacity
from cluster.pool import Ended, Pool
from cluster.profile import Group, Head, Profile
from pipelines import lineage, run as driving, stops
from pipelines.inputs.inspector import Looks
from pipelines.limits import Budget, Limits, Spent
from pipelines.lineage import Journal, history, states, status
from pipelines.plan import PlanError, plan
from pipelines.run import run
from pipelines.storage.base import StorageFailed
from pipelines.store import Store
from tests.pipelines.failing import FailingStorage

pytestmark = pytest.mark.ray


def start(project, store, connect, *changes, name="one", watch=lambda events: None, **options):
    spec, catalog = project.spec(*changes)
    made = plan(spec, Looks(Path(store.storage.uri) / "inputs.sqlite", store), catalog)
    journal = Journal.claim(store.storage, name)
    said = run(made, store, journal, connect=connect, watch=watch, **options)
    return said, states(history(store.storage, name), made.steps)


def unreachable():
    raise AssertionError("a run that is stored has no use for Ray")


def test_a_diamond_runs_in_order_and_its_second_run_starts_no_ray(project, store, ray_local):
    said, steps = start(project, store, ray_local)
    assert said == "done"
    assert {n: s.state for n, s in steps.items()} == dict.fromkeys("abcd", "done")
    assert steps["a"].ended <= min(steps["b"].began, steps["c"].began)
    assert store.get(steps["d"].data["digest"]).about["size"] == 4

    said, again = start(project, store, unreachable, name="two")
    assert said == "done"
    assert {n: s.state for n, s in again.items()} == dict.fromkeys("abcd", "reused")
    assert again["d"].data["digest"] == steps["d"].data["digest"]


def test_changing_one_step_reruns_it_and_what_follows(project, store, ray_local):
    start(project, store, ray_local)
    _, steps = start(project, store, ray_local, "b.size=20", name="two")
    assert {n: s.state for n, s in steps.items()} == {"a": "reused", "b": "done", "c": "reused", "d": "done"}


def test_a_failure_skips_what_needs_it_and_nothing_else(project, store, ray_local):
    said, steps = start(project, store, ray_local, "b.fail=raise")
    assert said == "failed"
    assert {n: s.state for n, s in steps.items()} == {"a": "done", "b": "failed", "c": "done", "d": "waiting"}
    assert steps["b"].data["error"] == "ValueError"
    assert steps["b"].data["sentence"] == "asked to fail"
    log = store.storage.read(steps["b"].data["log"]).decode()
    assert log.index("noop says hello") < log.index("and so does its child") < log.index("asked to fail")
    assert log.strip().splitlines()[-1] == "Step 'b' failed with ValueError: asked to fail"


def test_a_step_sees_how_its_own_children_end(project, store, ray_local):
    _, steps = start(project, store, ray_local, "a.fail=child")
    assert steps["a"].data["error"] == "CalledProcessError"
    assert steps["a"].data["sentence"].endswith("returned non-zero exit status 3.")


def test_a_step_whose_process_dies_is_a_failure(project, store, ray_local):
    said, steps = start(project, store, ray_local, "a.fail=die")
    assert said == "failed"
    assert steps["a"].data["error"] == "WorkerCrashedError"


def test_a_failed_step_is_tried_as_often_as_allowed(project, store, ray_local, tmp_path):
    said, steps = start(project, store, ray_local, "a.fail=die", f"a.touch={tmp_path / 'tries'}", retries=2)
    assert said == "failed"
    assert (tmp_path / "tries").read_text() == "xxx"
    assert steps["a"].attempts == 3
    assert steps["a"].data["class"] == "other"


@pytest.mark.parametrize("fail", ["raise", "exit"])
def test_what_would_fail_in_the_same_way_again_is_not_tried_again(project, store, ray_local, tmp_path, fail):
    said, steps = start(project, store, ray_local, f"a.fail={fail}", f"a.touch={tmp_path / 'tries'}", retries=2)
    assert (said, steps["a"].attempts, steps["a"].data["class"]) == ("failed", 1, "user")


def test_a_step_that_ran_out_of_memory_gets_more_of_it_once(project, store, ray_local, tmp_path):
    asks = ("a.memory=1000000", "a.fail=memory", f"a.touch={tmp_path / 'tries'}")
    said, steps = start(project, store, ray_local, *asks)
    assert (said, steps["a"].attempts) == ("done", 2)
    starts = [e.data.get("eased") for e in history(store.storage, "one") if (e.kind, e.step) == ("start", "a")]
    assert starts == [None, {"memory": 2000000}]


def test_a_step_that_takes_too_long_is_ended_with_its_children(project, store, ray_local, tmp_path):
    child = tmp_path / "child"
    said, steps = start(project, store, ray_local, "a.fail=hang", f"a.touch={child}", "a.timeout=2")
    assert (said, steps["a"].data["class"]) == ("failed", "timeout")
    assert steps["a"].data["sentence"] == "took longer than 2 s and was ended"
    assert "in noop" in store.storage.read(steps["a"].data["log"]).decode(), "its log says where it was"
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(child.read_text())).wait(60)
    assert not psutil.pid_exists(int(child.read_text()))


def flipped(path):
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def emptied(path):
    path.chmod(0o644)
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flipped, emptied, Path.unlink])
def test_a_stored_result_that_was_damaged_is_made_again_before_it_is_used(project, store, ray_local, damage):
    _, first = start(project, store, ray_local)
    digest = first["a"].data["digest"]
    damage(store.get(digest).path / "data.txt")
    said, steps = start(project, store, ray_local, name="two", forced=["b"])
    assert said == "done"
    assert steps["a"].data["digest"] == digest
    assert store.whole(digest, bytes_too=True)
    assert (steps["a"].state, steps["c"].state) == ("done", "reused")
    assert store.storage.list("quarantine")


def test_what_is_damaged_while_its_run_goes_on_is_made_again_too(project, store, ray_local, tmp_path):
    def damage(events):
        for e in events:
            if (e.kind, e.step) == ("commit", "b") and not damaged:  # while `c` runs, before `d` takes both
                damaged.append(e.data["digest"])
                flipped(store.get(e.data["digest"]).path / "data.txt")
                (tmp_path / "damaged").touch()

    damaged = []
    said, steps = start(project, store, ray_local, f"c.until={tmp_path / 'damaged'}", watch=damage)
    assert (said, steps["b"].attempts, steps["b"].data["digest"]) == ("done", 2, damaged[0])
    assert (steps["d"].attempts, steps["c"].attempts) == (2, 1)


def test_an_input_from_the_store_that_nobody_here_makes_again_is_named(project, store, ray_local):
    _, first = start(project, store, ray_local)
    digest = first["a"].data["digest"]
    path = project.folder / "from_store.yaml"
    path.write_text(
        "name: p\nuses: [noop.py]\ninputs: {made: {dataset: 'lfm://last/a'}}\n"
        "steps:\n  z: {operator: noop, inputs: {after: [made]}}\n"
    )
    project.pipeline = path
    flipped(store.get(digest).path / "data.txt")
    said, steps = start(project, store, ray_local, name="two")
    assert (said, steps["z"].attempts) == ("failed", 1)
    assert steps["z"].data["sentence"].startswith(f"artifact {digest[:12]}: 'data.txt' is not what was put in")


def test_independent_steps_run_at_the_same_time(project, store, ray_local, tmp_path):
    one, other = tmp_path / "b-is-there", tmp_path / "c-is-there"
    said, _ = start(
        project, store, ray_local, f"b.touch={one}", f"b.until={other}", f"c.touch={other}", f"c.until={one}"
    )
    assert said == "done"


def test_a_forced_step_runs_although_it_is_stored(project, store, ray_local):
    start(project, store, ray_local)
    _, steps = start(project, store, ray_local, name="two", forced=["c"])
    assert {n: s.state for n, s in steps.items()} == {"a": "reused", "b": "reused", "c": "done", "d": "reused"}


def test_a_step_that_starts_workers_leaves_them_all_cpus(project, store, ray_local, one_ray):
    cpus = int(one_ray.cpus)
    own = project.folder / "noop.py"
    own.write_text(own.read_text().replace("@operator()", "@operator(starts_workers=True)"))
    said, _ = start(project, store, ray_local, f"a.resources.workers={cpus}", f"a.params.workers={cpus}")
    assert said == "done"


def test_more_than_the_cluster_has_is_refused_before_anything_runs(project, store, ray_local):
    with pytest.raises(PlanError, match=r"step 'c': asks for 64 CPUs, expected at most"):
        start(project, store, ray_local, "c.cpus_per_worker=64")


def test_ctrl_c_is_written_down_and_a_second_driver_goes_on(project, store, ray_local):
    def interrupt(events):
        if any(e.kind == "commit" and e.step == "a" for e in events):
            raise KeyboardInterrupt

    said, _ = start(project, store, ray_local, watch=interrupt)
    assert said == "interrupted"
    assert status(store.storage, "one", history(store.storage, "one")) == "interrupted"
    said, steps = start(project, store, ray_local)
    assert said == "done"
    assert steps["a"].state == "done"
    assert steps["a"].attempts == 1


HANDING = """
name: handing
uses: [noop.py, hand.py]
inputs: {text: {dataset: WHERE}}
steps:
  a: {operator: hand_on, inputs: {data: text}}
  b: {operator: noop, inputs: {after: [a]}}
"""
HAND = """
from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace

@operator()
def hand_on(work: Workspace, *, data: Dataset) -> Dataset:
    return data
"""


def test_an_input_that_a_step_handed_on_is_taken_from_where_it_is_now(project, store, ray_local):
    (project.folder / "hand.py").write_text(HAND)
    before, now = project.folder / "text.txt", project.folder / "moved.txt"
    project.pipeline.write_text(HANDING.replace("WHERE", str(before)))
    assert start(project, store, ray_local)[0] == "done"
    before.rename(now)
    project.pipeline.write_text(HANDING.replace("WHERE", str(now)))
    said, steps = start(project, store, ray_local, "b.size=2", name="two")
    assert (said, steps["a"].state, steps["b"].state) == ("done", "reused", "done")


def test_two_steps_that_make_the_same_thing_compute_it_once(project, store, ray_local, tmp_path):
    said, steps = start(project, store, ray_local, "c.size=2", "b.size=2", f"a.touch={tmp_path / 'tries'}")
    assert said == "done"
    assert sorted(steps[n].state for n in "bc") == ["done", "reused"]
    assert [e.data["why"] for e in history(store.storage, "one") if e.kind == "wait"] == ["run one computes it"]


def test_runs_that_want_the_same_result_compute_it_once(project, store, ray_local, tmp_path):
    tries, go_on = tmp_path / "tries", tmp_path / "go-on"
    changes = (f"a.touch={tries}", f"a.until={go_on}")
    waiting = set()

    def watch(name):
        def heard(events):
            waiting.update(name for e in events if e.kind == "wait")
            if len(waiting) == 3:
                go_on.touch()

        return heard

    names = ["one", "two", "three", "four"]
    with ThreadPoolExecutor(4) as pool:
        begun = [pool.submit(start, project, store, ray_local, *changes, name=n, watch=watch(n)) for n in names]
    found = [b.result() for b in begun]
    assert [said for said, _ in found] == ["done"] * 4
    assert tries.read_text() == "x"
    for step in "abcd":
        assert sorted(steps[step].state for _, steps in found) == ["done", "reused", "reused", "reused"]
    assert store.storage.list("leases") == ()


class Shrinking(Pool):
    """A cluster that loses its nodes when the first step has ended."""

    def __init__(self):
        super().__init__()
        self.ended = 0

    def capacity(self):
        return Capacity.of([]) if self.ended else super().capacity()

    def heard(self, handles, timeout):
        said = super().heard(handles, timeout)
        self.ended += sum(isinstance(s, Ended) for s in said)
        return said


def test_what_nothing_can_hold_any_more_is_given_up_after_its_time(project, store, one_ray):
    asks = [f"{step}.schedule_timeout=0" for step in "abcd"]
    said, steps = start(project, store, lambda: contextlib.nullcontext(Shrinking()), *asks)
    assert said == "failed"
    assert {n: s.state for n, s in steps.items()} == {"a": "done", "b": "failed", "c": "failed", "d": "waiting"}
    assert steps["b"].data["class"] == "capacity"
    assert steps["b"].data["sentence"].startswith("asks for 1 CPU, expected at most 0, which is all there is.")


@pytest.mark.parametrize("patience", [60.0, 0.0])
def test_a_run_that_cannot_say_that_it_lives_goes_on_until_others_may_take_it_for_dead(
    project, store, ray_local, monkeypatch, patience
):
    monkeypatch.setattr(lineage, "BEAT_S", 0.0)
    monkeypatch.setattr(driving, "LEASE_S", patience)
    full = FailingStorage(store.storage, ("replace_if_match",), number=1, error=errno.ENOSPC, lasting=True)
    if patience:
        assert start(project, Store(full), ray_local)[0] == "done"
    else:
        with pytest.raises(StorageFailed):
            start(project, Store(full), ray_local)
        assert [e.data for e in history(store.storage, "one") if e.kind == "finished"] == [{"status": "failed"}]


PRICED = Profile(
    name="priced",
    place="kuberay",
    head=Head(cpus=1, memory_gib=1, price_per_hour=1.0),
    groups={"gpu": Group(cpus=1, memory_gib=1, price_per_hour=3600.0)},
    drain_s=30,
)


class Counted(Pool):
    """A cluster with a machine of which each second costs 1."""

    def groups(self):
        return {"gpu": 1}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(limits=Limits(deadline_s=2.0)), "would pass its deadline of 0.00 h"),
        (Budget(limits=Limits(max_cost=20.0), profile=PRICED), "would pass its --max-cost of 20.00"),
        (Budget(limits=Limits(max_cost=1000.0), profile=PRICED, before=Spent(cost=980.0)), "has cost 980.0"),
    ],
)
def test_a_run_ends_before_it_has_spent_more_than_it_may_and_keeps_what_is_done(project, store, one_ray, budget, said):
    ended, steps = start(project, store, lambda: contextlib.nullcontext(Counted()), budget=budget)
    assert ended == "interrupted"
    events = history(store.storage, "one")
    assert said in events[-1].data["why"]
    assert (steps["a"].state, steps["d"].state) == ("done", "waiting"), "what ran when it ended could finish"
    assert [e.data["nodes"] for e in events if e.kind == "nodes"] == ([] if budget.profile is None else [{"gpu": 1}])
    assert start(project, store, lambda: contextlib.nullcontext(Pool()), name="two")[0] == "done"


def test_a_run_that_is_asked_to_stop_ends_and_says_so(project, store, ray_local):
    stops.ask(store.storage, "one")
    assert start(project, store, ray_local)[0] == "interrupted"
    assert history(store.storage, "one")[-1].data == {"status": "interrupted", "why": "it was asked to stop"}
    stops.withdraw(store.storage, "one")
    said, steps = start(project, store, ray_local)
    assert said == "done"
    assert steps["a"].state == "done"
