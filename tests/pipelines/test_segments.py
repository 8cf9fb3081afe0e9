"""What a journal's segments are packed into: readers ask for less and see the same, whatever happens meanwhile."""

import threading
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from pipelines import lineage
from pipelines.lineage import Event, Journal, find_run, history, runs
from pipelines.storage import s3_client

PACKED = 3


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(lineage, "PACKED", PACKED)


class Memory:
    """Storage as far as a journal needs it; `happens` is called with each verb and key before anything is done."""

    def __init__(self, data=None, *, hidden=()):
        self.data, self.hidden = {} if data is None else data, hidden
        self.lock = threading.Lock()
        self.happens = lambda verb, key: None

    def unpacked(self):
        """The same without its packs."""
        return Memory(self.data, hidden=("packs",))

    def read(self, key):
        self.happens("read", key)
        return self.data.get(key)

    def list(self, prefix, *, after=""):
        self.happens("list", prefix)
        if prefix.endswith(self.hidden):
            return ()
        return tuple(sorted(k for k in self.data if k.startswith(f"{prefix}/") and k > after))

    def put_if_absent(self, key, data):
        self.happens("put", key)
        with self.lock:
            return self.data.setdefault(key, data) is data


def said(storage):
    return [e.step for e in history(storage, "r")]


def write(journal, *steps):
    """A segment for each step."""
    for step in steps:
        journal.write([Event("start", step)])


def test_segments_are_read_from_packs_and_only_what_follows_the_last_one_by_one(either_store, monkeypatch):
    storage = either_store.storage
    journal = Journal.claim(storage, "r")
    journal.write([Event("started"), Event("start", "0")])
    write(journal, *"1234567")
    asked, read = [], storage.read
    monkeypatch.setattr(storage, "read", lambda key: (asked.append(key), read(key))[1])
    assert said(storage) == ["", *"01234567"]
    assert sorted(k.removeprefix("runs/r/") for k in asked) == [
        "journal/000001-000007.json", "journal/000001-000008.json", "packs/000001-000003.json",
        "packs/000001-000006.json",
    ]  # fmt: skip
    asked.clear()
    journal.write([Event("finished", data={"status": "done"})])
    assert [e.kind for e in history(storage, "r")][-1] == "finished"
    assert {k.split("/")[2] for k in asked} == {"packs"}, "a run that has ended is whole in packs"
    assert runs(storage) == ("r",)
    assert find_run(storage, "last") == "r"


def test_a_long_journal_on_s3_is_few_requests(s3_store):
    storage = s3_store.storage
    write(Journal.claim(storage, "r"), *map(str, range(20)))
    requests = Counter()

    def count(model, **more):
        requests[model.name] += 1

    events = s3_client.client().meta.events
    events.register("before-call.s3", count)
    try:
        assert len(said(storage)) == 20
        assert requests == {"ListObjectsV2": 3, "GetObject": 20 // PACKED + 20 % PACKED}
    finally:
        events.unregister("before-call.s3", count)


def test_the_next_driver_packs_what_one_that_was_killed_has_left():
    storage = Memory()
    write(Journal.claim(storage, "r"), "a", "b")
    second = Journal.claim(storage, "r")
    assert [k for k in storage.data if "/packs/" in k] == ["runs/r/packs/000001-000002.json"]
    assert (second.attempts("a"), said(storage)) == (1, ["a", "b"])
    Journal.claim(storage, "r")
    assert sum("/packs/" in k for k in storage.data) == 1, "nothing is left to pack"


@pytest.mark.parametrize(
    ("packed", "landed", "seen"), [(3, False, "abc"), (3, True, "abc"), (9, False, "ac"), (9, True, "abc")]
)
def test_what_is_said_after_a_write_that_broke_off_counts(packed, landed, seen, monkeypatch):
    """What that write itself was to say is there once it is in a pack, if not before."""
    monkeypatch.setattr(lineage, "PACKED", packed)
    storage = Memory()
    journal = Journal.claim(storage, "r")
    write(journal, "a")

    def breaks_off(verb, key):
        if landed:
            storage.data[key] = b'[{"kind":"start","step":"b"}]'
        raise KeyboardInterrupt

    storage.happens = breaks_off
    with pytest.raises(KeyboardInterrupt):
        write(journal, "b")
    storage.happens = lambda verb, key: None
    write(journal, "c")
    Journal.claim(storage, "r")
    assert "".join(said(storage)) == seen


class Died(BaseException):
    """A driver's process ended here."""


WORDS = st.lists(
    st.one_of(
        st.just(("claim", None)),
        st.tuples(st.just("write"), st.integers(0, 3)),  # the last driver most often, and those before it late
        st.tuples(st.just("dies"), st.sampled_from(["claim: written", "pack: before it", "pack: is in"])),
    ),
    max_size=40,
)


@given(WORDS)
@settings(max_examples=100, deadline=None)
def test_packs_change_nothing_that_a_reader_sees_whoever_dies_and_whoever_is_late(words):
    storage, drivers, told, dies = Memory(), [], 0, [None]

    def reached(point):
        if point == dies[0]:
            dies[0] = None
            raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lineage, "reached", reached)
        patch.setattr(lineage, "at_once", lambda act, items: list(map(act, items)))  # threads take longer
        for verb, which in [("claim", None), *words, ("claim", None)]:
            try:
                if verb == "dies":
                    dies[0] = which
                elif verb == "claim":
                    drivers.append(None)
                    drivers[-1] = Journal.claim(storage, "r")
                else:
                    number = max(len(drivers) - 1 - which, 0)
                    if drivers[number] is not None:
                        told += 1
                        drivers[number].write([Event("start", str(told))])
            except Died:
                drivers = [None if verb == "claim" and d is drivers[-1] else d for d in drivers]
                if verb == "write":
                    drivers[number] = None
            assert said(storage) == said(storage.unpacked())
    found = said(storage)
    assert len(found) == len(set(found)), "nothing is said twice"
    named = {k.rpartition("/")[2] for k in storage.data if "/packs/" in k}
    assert named <= {k.rpartition("/")[2] for k in storage.data if "/journal/" in k}


MOMENTS = ("packs are listed", "segments are listed", "claims are listed", "a pack is read", "a segment is read")


@pytest.mark.parametrize("moment", MOMENTS)
def test_who_reads_while_packs_and_claims_are_written_sees_what_was_there_before_or_more(moment):
    storage = Memory()
    first = Journal.claim(storage, "r")
    write(first, "a", "b", "c", "d", "e")
    asked = []

    def goes_on(verb, key):
        """Just before the reader gets this answer."""
        asked.append(key)
        if len(asked) == 1 + MOMENTS.index(moment):
            write(first, "f", "g")
            second = Journal.claim(storage, "r")
            write(first, "late", "later", "latest", "too late")
            write(second, "h", "i", "j")

    reader = Memory(storage.data)
    reader.happens = goes_on
    found = "".join(said(reader))
    assert "abcdefghij".startswith(found)
    assert len(found) >= 5
    assert "".join(said(storage)) == "abcdefghij"
