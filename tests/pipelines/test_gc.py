"""What goes, and above all what stays."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from cluster import processes
from pipelines import garbage as module
from pipelines.__main__ import main
from pipelines.ancestry import ancestry
from pipelines.commands import run as command
from pipelines.commands.gc import size
from pipelines.garbage import COMMIT_S, SILENT_S, garbage, sweep
from pipelines.lineage import Event, Journal, history, runs
from pipelines.registry import Registry
from pipelines.storage import s3_client
from pipelines.storage.base import owner
from pipelines.store import Result, Store, canonical


@pytest.fixture
def later(monkeypatch):
    """Lets time pass, for who asks how long ago something was."""

    def later_(seconds):
        now = time.time()
        monkeypatch.setattr(module.time, "time", lambda: now + seconds)

    return later_


def fingerprint(name):
    return name.encode().hex().ljust(64, "0")


def artifact(store, text):
    folder = store.storage.scratch()
    (folder / "x.txt").write_text(text)
    return store.put(folder, "dataset", {})


def made(store, step, *inputs, text=""):
    """A step's artifact and result; `inputs` are other steps."""
    digest = artifact(store, text or step)
    results = [store.result(fingerprint(i)) for i in inputs]
    sources = [{"kind": "dataset", "digest": r.digest, "uri": ""} for r in results]
    components = {"operator": "noop", "method": None, "inputs": {"after": [r.fingerprint for r in results]}}
    store.commit(Result(fingerprint=fingerprint(step), kind="dataset", digest=digest, run="r", step=step,
                        inputs={"after": sources}, components=components))  # fmt: skip
    return digest


def ran(store, run, *steps, ended=True):
    """A run's journal; without an end its driver is the process of the tests, which lives."""
    planned = {s: {"fingerprint": fingerprint(s)} for s in steps}
    journal = Journal.claim(store.storage, run)
    journal.write([Event("started", data={"steps": planned})])
    for step in steps:
        found = store.result(fingerprint(step))
        if found is not None:
            journal.write([Event("commit", step, {"digest": found.digest})])
    if ended:
        journal.write([Event("finished", data={"status": "done"})])
    return journal


def collect(store, *words):
    assert main(["gc", "--store", store.storage.uri, "--json", *words]) == 0


def left(store):
    """Names of the steps whose results are whole, and of the runs."""
    steps = [bytes.fromhex(k[8:-5]).rstrip(b"\0").decode() for k in store.storage.list("results")]
    return sorted(s for s in steps if store.hit(fingerprint(s))), list(runs(store.storage))


def test_what_a_run_refers_to_stays_and_the_rest_goes(store, capsys):
    for step, *inputs in (("a",), ("b", "a"), ("old",)):
        made(store, step, *inputs)
    ran(store, "one", "a", "b")
    collect(store)
    found = json.loads(capsys.readouterr().out)
    assert [(g["kind"], g["key"]) for g in found["garbage"]] == [
        ("result", f"results/{fingerprint('old')}.json"),
        ("artifact", f"artifacts/{found['garbage'][1]['key'].partition('/')[2]}"),
    ]
    assert left(store) == (["a", "b"], ["one"])
    assert len(store.storage.folders("artifacts")) == 2
    assert garbage(store) == []


def test_a_dry_run_says_what_would_go_and_how_large_it_is_and_leaves_it(store, capsys):
    made(store, "old")
    before = store.storage.list("")
    assert main(["gc", "--store", store.storage.uri, "--dry-run"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [r.split()[0] for r in rows] == ["what", "result", "artifact"]
    total = sum(e.size for f in ("artifacts", "results") for e in store.storage.entries(f))
    assert last == f"2 things, {size(total)} would go"
    assert store.storage.list("") == before


def test_a_dropped_run_takes_with_it_what_only_it_refers_to(either_store):
    store = either_store
    for step, *inputs in (("shared",), ("mine", "shared"), ("other", "shared")):
        made(store, step, *inputs)
    ran(store, "20260101-one", "shared", "mine")
    ran(store, "20260102-two", "shared", "other")
    store.storage.append("runs/20260101-one/logs/mine/1.log", b"log")
    collect(store, "--run", "one")
    assert left(store) == (["other", "shared"], ["20260102-two"])
    assert store.storage.list("runs/20260101-one") == ()


def test_of_all_runs_the_last_ones_are_kept(store):
    for i in range(4):
        made(store, f"s{i}")
        ran(store, f"run-{i}", f"s{i}")
    collect(store, "--keep-last", "2")
    assert left(store) == (["s2", "s3"], ["run-2", "run-3"])
    collect(store, "--keep-last", "0")
    assert left(store) == ([], [])
    assert store.storage.folders("artifacts") == ()


def test_what_is_registered_stays_with_what_it_came_from(store):
    for step, *inputs in (("data",), ("base", "data"), ("best", "base"), ("worse", "base")):
        made(store, step, *inputs)
    ran(store, "one", "data", "base", "best", "worse")
    digest = store.result(fingerprint("best")).digest
    Registry(store.storage).register("champion", digest, "dataset", about={})
    before = [a.digest for a in ancestry(store, digest)]
    collect(store, "--keep-last", "0")
    assert left(store) == (["base", "best", "data"], [])
    assert [a.digest for a in ancestry(store, digest)] == before
    assert Registry(store.storage).find("champion:1").digest == digest


def test_a_run_that_goes_on_keeps_what_it_will_need(store, capsys):
    made(store, "a")
    ran(store, "one", "a", "b", ended=False)
    store.storage.adopt(checkpoint(store), f"checkpoints/{fingerprint('a')}/000001-x")
    collect(store, "--keep-last", "0")
    assert left(store) == (["a"], ["one"])
    assert store.storage.folders("checkpoints") == (fingerprint("a"),), "it may be doing the step again"
    capsys.readouterr()
    assert main(["gc", "--store", store.storage.uri, "--run", "one"]) == 2
    assert f"Run 'one' is driven by process {os.getpid()}" in capsys.readouterr().err


def test_a_run_that_was_claimed_again_and_has_not_written_yet_goes_on(store):
    made(store, "a")
    ran(store, "one", "a")
    Journal.claim(store.storage, "one")
    collect(store, "--keep-last", "0")
    assert left(store) == (["a"], ["one"])


def test_a_run_of_another_machine_goes_on_until_it_is_silent_for_long(store, later):
    made(store, "a")
    claim = {"host": "elsewhere", "pid": 1, "born": 1.0}
    store.storage.put_if_absent("runs/one/claims/000001.json", canonical(claim))
    Journal(store.storage, "one", 1).write([Event("started", data={"steps": {"a": {"fingerprint": fingerprint("a")}}})])
    collect(store, "--keep-last", "0")
    assert left(store) == (["a"], ["one"])
    later(SILENT_S + 60)
    collect(store, "--keep-last", "0")
    assert left(store) == ([], [])


def test_a_claim_of_a_dead_process_that_never_wrote_goes(store):
    claim = {"host": module.processes.this()["host"], "pid": 2**22, "born": 1.0}
    store.storage.put_if_absent("runs/never/claims/000001.json", canonical(claim))
    (store.storage.root / "runs" / "soon" / "claims").mkdir(parents=True)  # by who is about to write the first one
    collect(store)
    assert store.storage.folders("runs") == ("soon",)


def test_an_artifact_that_may_be_about_to_be_named_stays_for_an_hour(store, later):
    digest = artifact(store, "fresh")
    later(COMMIT_S - 60)
    assert garbage(store) == []
    later(COMMIT_S + 60)
    collect(store)
    assert not store.whole(digest)


def checkpoint(store):
    folder = store.storage.scratch()
    (folder / "manifest.json").write_text("{}")
    return folder


def test_checkpoints_stay_for_steps_that_can_be_resumed(store):
    for step in ("done", "failed", "unknown"):
        store.storage.adopt(checkpoint(store), f"checkpoints/{fingerprint(step)}/000001-x")
    made(store, "done")
    ran(store, "one", "done", "failed")
    collect(store)
    assert store.storage.folders("checkpoints") == (fingerprint("failed"),)


def test_what_is_in_quarantine_goes(store):
    made(store, "a")
    ran(store, "one", "a")
    store.quarantine(store.result(fingerprint("a")).digest)
    collect(store)
    assert store.storage.folders("quarantine") == ()


def test_scratch_of_dead_processes_goes_and_of_living_ones_stays(store, later):
    mine = store.storage.scratch()
    (mine / "x").write_text("x")
    code = "import sys; from pipelines.storage.base import new_scratch; from pathlib import Path\n"
    code += "folder = new_scratch(Path(sys.argv[1])); (folder / 'x').write_text('xx'); print(folder)"
    words = [sys.executable, "-c", code, str(store.storage.scratches)]
    dead = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    unknown = store.storage.scratches / "3f2a9c"
    unknown.mkdir()
    assert not psutil.pid_exists(owner(os.path.basename(dead))["pid"])
    assert main(["ps", "--store", store.storage.uri]) == 0, "any command will do"
    assert sorted(store.storage.scratches.iterdir()) == sorted([mine, unknown])
    later(SILENT_S + 60)
    collect(store)
    assert list(store.storage.scratches.iterdir()) == [mine]


def test_ledgers_of_clusters_that_nobody_uses_go(store, later):
    store.storage.put_if_absent("ledgers/session_one.json", b"{}")
    assert [g.key for g in garbage(store) if g.kind == "ledger"] == []
    later(SILENT_S + 1)
    assert [g.key for g in garbage(store) if g.kind == "ledger"] == ["ledgers/session_one.json"]


def test_leases_of_dead_processes_go_and_of_living_ones_stay(store, later):
    dead = {**processes.this(), "born": 1.0}
    for name, process in {"lives": processes.this(), "dead": dead, "away": {**dead, "host": "elsewhere"}}.items():
        store.storage.put_if_absent(f"leases/{name}.json", canonical({**process, "run": "r", "step": "s", "beat": 0}))
    assert [g.key for g in garbage(store) if g.kind == "lease"] == ["leases/dead.json"]
    later(SILENT_S + 1)
    assert [g.key for g in garbage(store) if g.kind == "lease"] == ["leases/away.json", "leases/dead.json"]


def test_of_two_results_of_one_digest_the_run_s_own_stays(store):
    made(store, "a", text="same")
    made(store, "again", text="same")
    ran(store, "one", "a")
    collect(store)
    assert left(store) == (["a"], ["one"])


def test_what_was_half_uploaded_stays_until_its_writer_is_silent_for_long(s3_store, bucket, later):
    s3_client.client().put_object(Bucket=bucket, Key=f"some/where/artifacts/{'a' * 64}/model.safetensors", Body=b"half")
    later(COMMIT_S + 60)
    assert garbage(s3_store) == []
    later(SILENT_S + 60)
    collect(s3_store)
    assert s3_store.storage.list("artifacts") == ()


def test_a_copy_of_what_another_machine_has_deleted_goes(s3_store, bucket):
    for step in ("a", "b"):
        made(s3_store, step)
    ran(s3_store, "one", "a", "b")
    digest = s3_store.result(fingerprint("b")).digest
    here = s3_store.storage.copies / "artifacts"
    assert len(list(here.iterdir())) == 2
    for one in list(s3_client.listed(bucket, f"some/where/artifacts/{digest}")):
        s3_client.client().delete_object(Bucket=bucket, Key=one.key)
    collect(s3_store)
    assert [p.name for p in here.iterdir()] == [s3_store.result(fingerprint("a")).digest]
    assert garbage(s3_store) == []


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (5 * 10**15, "5e+03 TB")]
)
def test_sizes_are_written_for_people(count, said):
    assert size(count) == said


def test_a_number_of_runs_below_0_is_refused(store, capsys):
    assert main(["gc", "--store", store.storage.uri, "--keep-last", "-1"]) == 2
    assert "--keep-last: -1, expected a number of runs, 0 or more." in capsys.readouterr().err


class Meanwhile:
    """A storage where something happens right before a key is deleted for the first time."""

    def __init__(self, storage, key, act):
        self._storage, self._key, self._act = storage, key, act

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def delete(self, key):
        if key.startswith(self._key) and self._act is not None:
            act, self._act = self._act, None
            act()
        self._storage.delete(key)


@pytest.mark.parametrize("folder", ["results", "artifacts"])
def test_what_a_run_begins_to_use_while_it_is_deleted_stays(either_store, monkeypatch, folder):
    """Whichever of them comes first: the run begins before any result goes, or between two artifacts."""
    monkeypatch.setattr(module, "BATCH", 1)
    digests = [made(either_store, step) for step in ("a", "b")]
    found = garbage(either_store)
    last = [g.key for g in found if g.kind == "artifact"][-1]
    (step,) = (s for s, d in zip("ab", digests, strict=True) if last.endswith(d))
    meanwhile = Meanwhile(either_store.storage, folder, lambda: ran(either_store, "new", step, ended=False))
    went = {g.key for g in sweep(Store(meanwhile), found)}
    assert {g.key for g in found} - went == {f"results/{fingerprint(step)}.json", last}
    assert left(either_store) == ([step], ["new"])


def test_a_run_that_was_dropped_and_goes_on_again_meanwhile_stays(store):
    made(store, "a")
    ran(store, "one", "a")
    found = garbage(store, drop={"one"})
    assert [g.kind for g in found] == ["run", "result", "artifact"]
    Journal.claim(store.storage, "one")
    assert sweep(store, found, drop={"one"}) == []
    assert left(store) == (["a"], ["one"])


@pytest.mark.ray
def test_runs_go_on_and_keep_what_they_use_while_older_ones_are_dropped(project, store, ray_local, monkeypatch):
    monkeypatch.setattr(command, "opened", lambda *_: ray_local())
    ended = threading.Event()

    def sweeps():
        while not ended.is_set():
            drop = set(runs(store.storage)[:-1])
            sweep(store, garbage(store, drop=drop), drop=drop)
        return True

    with ThreadPoolExecutor(1) as pool:
        sweeping = pool.submit(sweeps)
        try:
            for size in ("2", "3", "4"):
                words = ["run", str(project.pipeline), "--store", store.storage.uri, "--set", f"b.size={size}"]
                assert main(words) == 0
        finally:
            ended.set()
        assert sweeping.result()
    drop = set(runs(store.storage)[:-1])
    sweep(store, garbage(store, drop=drop), drop=drop)
    (last,) = runs(store.storage)
    steps = history(store.storage, last)[0].data["steps"].values()
    assert all(store.hit(s["fingerprint"]) for s in steps)
    assert len(store.storage.list("results")) == len(steps)


def test_a_package_goes_when_no_run_has_had_it_and_it_is_old(store, later):
    for digest in ("a" * 64, "b" * 64):
        store.storage.put_if_absent(f"packages/{digest}.zip", b"code")
    journal = Journal.claim(store.storage, "submitted")
    journal.write([Event("started", data={"run": "submitted", "steps": {}, "package": "a" * 64}, time=1.0)])
    journal.write([Event("finished", data={"status": "done"}, time=2.0)])
    assert [g for g in garbage(store) if g.kind == "package"] == [], "its driver may be about to begin"
    later(SILENT_S + 60)
    assert [(g.key, g.size) for g in garbage(store) if g.kind == "package"] == [(f"packages/{'b' * 64}.zip", 4)]
    assert [g.key for g in garbage(store, drop={"submitted"}) if g.kind == "package"] == [
        f"packages/{digest * 64}.zip" for digest in "ab"
    ]
