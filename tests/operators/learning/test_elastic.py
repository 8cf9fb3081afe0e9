"""One group after another, with as many workers as have room: who decides that, without a cluster."""

import json
import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from operators.learning import elastic
from operators.learning.elastic import due, trained
from operators.learning.group import ASKED, LEFT, NODE, GroupFailed
from operators.resources import Resources
from operators.sharing.notices import NodeLost, Preempted
from operators.sharing.room import Node, Room, Spot
from operators.training import Training
from tests.operators import small

ASKS = Resources(workers=(2, 4), strategy="ddp")
DONE = {"steps": 9}


class Cluster:
    """Machines with CPUs, and what a group does there: each is told its workers and puts them on machines in turn."""

    def __init__(self, monkeypatch, **cpus):
        self.cpus, self.waiting = cpus, ()
        monkeypatch.setattr(elastic, "look", lambda: self.room())
        monkeypatch.setattr(elastic, "SETTLE_S", 0.0)

    def room(self, held=None):
        taken = Counter(held or {})
        nodes = tuple(Node(name=n, free={"CPU": c - taken[n]}) for n, c in self.cpus.items())
        return Room(nodes=nodes, waiting=self.waiting)

    def holds(self, folder, number):
        places = [name for name, count in self.cpus.items() for _ in range(count)]
        for rank, place in enumerate(places[:number]):
            (folder / f"{NODE}-{rank}").write_text(place)


def driven(work, cluster, tmp_path, *acts):
    """What becomes of groups that each do the next act; the numbers of workers are in the work's `groups`."""
    left = list(acts)

    def start(number, folder):
        cluster.holds(folder, number)
        return left.pop(0)(folder)

    home = tmp_path / "training"
    home.mkdir()
    return trained(work, ASKS, home, start)


def done(folder):
    return DONE


def told_to_leave(folder):
    return {LEFT: 3, "of": 9}


def loses(cluster, name):
    def act(folder):
        cluster.cpus.pop(name)
        raise NodeLost("worker 0", "ConnectionError: closed", (name,))

    return act


def asked(number, then=lambda: None):
    def act(folder):
        (folder / ASKED).write_text(json.dumps({"workers": number, "why": "there is room for more"}))
        then()
        return told_to_leave(folder)

    return act


def kept(work):
    """A checkpoint is there."""

    def act(folder):
        (folder / "checkpoint").mkdir()
        work.keep(folder / "checkpoint")
        return told_to_leave(folder)

    return act


@pytest.fixture
def work(tmp_path):
    return small.Work(tmp_path / "work", ASKS)


def test_as_many_workers_begin_as_have_room(work, monkeypatch, tmp_path):
    folder, measures = driven(work, Cluster(monkeypatch, a=2, b=1), tmp_path, done)
    assert (folder.name, measures, work.groups) == ("group-1", DONE, [3])


def test_the_fewest_wait_for_room_as_any_group_does(work, monkeypatch, tmp_path):
    driven(work, Cluster(monkeypatch, a=1), tmp_path, done)
    assert work.groups == [2]


def test_a_lost_machine_leaves_fewer_and_a_new_one_brings_more(work, monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, a=2, b=2)
    grows = asked(4, lambda: cluster.cpus.update(c=8))
    folder, _ = driven(work, cluster, tmp_path, loses(cluster, "b"), grows, done)
    assert (folder.name, work.groups) == ("group-3", [4, 2, 4])


def test_where_not_even_the_fewest_have_room_the_step_ends_with_the_reason(work, monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, a=1, b=1)
    with pytest.raises(NodeLost, match="node b is gone"):
        driven(work, cluster, tmp_path, loses(cluster, "b"))


def test_who_lets_go_for_others_may_have_to_wait_for_the_fewest(work, monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, a=3)
    driven(work, cluster, tmp_path, asked(2, lambda: cluster.cpus.update(a=1)), done)
    assert work.groups == [3, 2]


def test_a_head_that_is_away_has_room_for_nobody(work, monkeypatch, tmp_path):
    from ray.exceptions import RpcError

    def away():
        raise RpcError("timed out")

    cluster = Cluster(monkeypatch, a=3)
    act = asked(3, lambda: monkeypatch.setattr(elastic, "look", away))
    driven(work, cluster, tmp_path, act, done)
    assert work.groups == [3, 2]


def test_machines_that_are_taken_away_with_notice_leave_the_others(work, monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, a=2, b=1)

    def noticed(folder):
        cluster.cpus.pop("b")  # it is there, and takes nobody any more
        return told_to_leave(folder)

    driven(work, cluster, tmp_path, noticed, done)
    assert work.groups == [3, 2]


def test_a_step_whose_own_machine_goes_or_whose_run_ends_goes_too(work, monkeypatch, tmp_path):
    work.goes_at = 0
    with pytest.raises(Preempted, match=r"for all 9 steps\. What it had done after 3 is kept"):
        driven(work, Cluster(monkeypatch, a=4), tmp_path, told_to_leave)


def test_what_never_gets_anywhere_is_given_up(work, monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, a=4)
    with pytest.raises(Preempted):
        driven(work, cluster, tmp_path, *[told_to_leave] * elastic.STALLED)
    assert work.groups == [4] * elastic.STALLED


def test_what_keeps_something_each_time_goes_on(work, monkeypatch, tmp_path):
    acts = [told_to_leave] * (elastic.STALLED - 1)
    driven(work, Cluster(monkeypatch, a=4), tmp_path, *acts, kept(work), *acts, done)
    assert len(work.groups) == 2 * elastic.STALLED


def test_others_may_be_quicker_to_take_the_room_for_more_but_a_failure_is_one(work, monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, a=4)

    def late(folder):
        cluster.cpus["a"] = 2
        raise GroupFailed("worker group", "no room")

    def raises(folder):
        raise GroupFailed("worker 1", "KeyError: 'x'")

    with pytest.raises(GroupFailed, match="worker 1"):
        driven(work, cluster, tmp_path, late, raises)
    assert work.groups == [4, 2]


@pytest.mark.parametrize(
    ("number", "found", "worked_s", "left_s", "expected"),
    [
        (2, 2, 1e9, 1e9, False),
        (2, 4, 60.0, 60.0, True),
        (2, 4, 59.0, 1e9, False),  # it has only begun
        (2, 4, 1e9, 59.0, False),  # it is about to be done
        (4, 2, 0.0, 0.0, True),  # whoever waits does not wait for that
        (4, 1, 1e9, 1e9, False),  # not even the fewest: that is for who loses a machine to say
    ],
)
def test_more_workers_have_to_be_worth_it_and_fewer_are_due_at_once(number, found, worked_s, left_s, expected):
    assert due(ASKS, number, found, worked_s=worked_s, left_s=left_s) == expected


@pytest.mark.parametrize(
    ("cpus", "waiting", "expected"),
    [
        ({"a": 4}, (), {"workers": 4, "why": "there is room for more"}),
        ({"a": 3}, ((Spot(needs={"CPU": 1}),),), {"workers": 2, "why": "another step waits"}),
        ({"b": 2}, (), {"workers": 2, "why": elastic.GOES}),
    ],
)
def test_a_group_is_asked_to_end_once_two_looks_agree(cpus, waiting, expected, monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, a=3)
    cluster.holds(tmp_path, 3)
    cluster.cpus, cluster.waiting = cpus, waiting
    looks = []

    def look():
        looks.append(1)
        return cluster.room({"a": 3})

    monkeypatch.setattr(elastic, "look", look)
    monkeypatch.setattr(elastic, "LOOK_S", 0.0)
    heard = SimpleNamespace(worked_s=61.0, left_s=61.0)
    wish = SimpleNamespace(said=lambda: None)
    elastic._watch(ASKS, 3, tmp_path, heard, wish, threading.Event())
    assert json.loads((tmp_path / ASKED).read_text()) == expected
    assert len(looks) == 2


def test_a_range_is_refused_where_nobody_could_go_on(tmp_path):
    from operators.learning.trainer import refused

    never = Training(checkpoint_every=0)
    (clause,) = refused(never, ASKS)
    assert clause.startswith("checkpoint_every=0 with workers=2 to 4, expected checkpoints.")
    (clause,) = refused(Training(), Resources(workers=(1, 2)))
    assert clause.startswith("strategy='single' with workers=1 to 2, expected ddp, zero1")
    assert list(refused(Training(), Resources(workers=(1, 2), strategy="zero3"))) == []
    assert list(refused(never, Resources(workers=(2, 2), strategy="ddp"))) == []


def test_the_autoscaler_hears_of_the_workers_that_a_step_would_take_besides(monkeypatch):
    said = []
    told = {n: SimpleNamespace(remote=lambda n=n, **more: said.append((n, more))) for n in ("request", "cancel")}
    adder = SimpleNamespace(request_resources=told["request"], cancel_request=told["cancel"])
    monkeypatch.setattr(elastic, "_adder", lambda: adder)
    enough, wish = elastic._Wish(ASKS, 0, "a"), elastic._Wish(ASKS, 2, "b")
    for one in (enough, wish, wish):  # twice within moments is said once
        one.said()
    for one in (enough, wish):
        one.over()
    (asked, what), (taken_back, who) = said
    assert (asked, what["requester_id"], what["resources"]) == ("request", "b", [{"CPU": 1.0}] * 2)
    assert (taken_back, who) == ("cancel", {"requester_id": "b"})
