"""Names, versions and aliases, on every kind of storage."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lfm.errors import UnknownName
from operators.registration import BadRegisteredName
from pipelines.ancestry import find_artifact
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states
from pipelines.plan import PlanError, plan
from pipelines.registry import NotStored, Registry, UnknownVersion
from pipelines.run import run
from pipelines.spec import load
from pipelines.store import Store


def stored(store, text):
    """The digest of a model that holds `text`."""
    folder = store.storage.scratch()
    (folder / "config.json").write_text(text)
    return store.put(folder, "model", {})


def register(store, digest, name="helper", **more):
    return Registry(store.storage).register(name, digest, "model", about={}, **more)


def test_another_digest_is_another_version_and_the_same_one_keeps_its_own(either_store):
    one, two = stored(either_store, "1"), stored(either_store, "2")
    first = register(either_store, one, run="r", step="s")
    assert (first.number, first.digest, first.run, first.step) == (1, one, "r", "s")
    assert register(either_store, two).number == 2
    assert register(either_store, one, run="later") == first
    assert register(either_store, one, name="other").number == 1
    registry = Registry(either_store.storage)
    assert [v.digest for v in registry.versions("helper")] == [one, two]
    assert registry.names() == ("helper", "other")


def test_registrations_at_the_same_time_share_no_version_and_make_none_twice(either_store):
    digests = [stored(either_store, str(i)) for i in range(5)]
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda d: register(either_store, d), digests * 4))
    numbers = {v.number: v.digest for v in made}
    assert sorted(numbers) == [1, 2, 3, 4, 5]
    assert sorted(numbers.values()) == sorted(digests)
    assert {(v.number, v.digest) for v in Registry(either_store.storage).versions("helper")} == set(numbers.items())


def test_processes_that_register_at_the_same_time_share_no_version(store):
    digests = [stored(store, str(i)) for i in range(3)]
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipelines.storage.local import LocalStorage\n"
        "from pipelines.registry import Registry\nregistry = Registry(LocalStorage(Path(sys.argv[1])))\ninput()\n"
        "for d in sys.argv[2:]:\n"
        "    v = registry.register('helper', d, 'model', about={})\n"
        "    registry.point('helper', d[:8], v.number)\n"
    )
    words = [sys.executable, "-c", code, store.storage.uri]
    going = [
        subprocess.Popen([*words, *(digests[i:] + digests[:i])], stdin=subprocess.PIPE, text=True) for i in range(3)
    ]
    for process in going:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in going:
        process.communicate()
        assert process.returncode == 0
    registry = Registry(store.storage)
    versions = registry.versions("helper")
    assert sorted(v.digest for v in versions) == sorted(digests)
    assert [v.number for v in versions] == [1, 2, 3]
    assert registry.aliases("helper") == {v.digest[:8]: v.number for v in versions}


def test_aliases_that_move_at_the_same_time_are_all_kept(either_store):
    for i in range(3):
        register(either_store, stored(either_store, str(i)))
    registry = Registry(either_store.storage)
    wanted = {f"alias{i}": i % 3 + 1 for i in range(9)}
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda a: registry.point("helper", *a), wanted.items()))
    assert registry.aliases("helper") == wanted
    registry.point("helper", "alias0", 2)
    assert registry.aliases("helper") == {**wanted, "alias0": 2}


def test_names_and_references(store):
    one, two = stored(store, "1"), stored(store, "2")
    register(store, one)
    register(store, two)
    Registry(store.storage).point("helper", "champion", 1)
    for reference, digest in (("helper@champion", one), ("helper:1", one), ("helper:2", two), ("helper:000002", two)):
        assert find_artifact(store, reference) == digest
    for reference, error, said in (
        ("help@champion", UnknownName, "No registered model is called 'help'. Did you mean 'helper'"),
        ("helper@chmpion", UnknownName, "No alias of 'helper' is called 'chmpion'. Did you mean 'champion'"),
        ("helper:3", UnknownVersion, "registered name 'helper': version '3', expected a number from 1 to 2."),
        ("helper:0", UnknownVersion, "expected a number from 1 to 2"),
        ("helper:x", UnknownVersion, "expected a number from 1 to 2"),
    ):
        with pytest.raises(error) as raised:
            find_artifact(store, reference)
        assert said in str(raised.value)
        assert type(raised.value)(*raised.value.args).args == raised.value.args


def test_what_is_no_name_or_not_in_the_store_is_refused(store):
    with pytest.raises(BadRegisteredName):
        register(store, stored(store, "1"), name="../results")
    with pytest.raises(BadRegisteredName):
        Registry(store.storage).point("helper", "v1", 1)
    with pytest.raises(NotStored, match="register: name='helper' for digest ffffffffffff, which is not in the store"):
        register(store, "f" * 64)
    assert not Registry(store.storage).names()


PIPELINE = """
name: registering
inputs:
  model: {model: "lfm://DIGEST"}
steps:
  named: {operator: register, inputs: {model: model}, params: {name: NAME}}
"""


@pytest.mark.ray
def test_each_run_registers_anew_and_changes_nothing_where_nothing_changed(store, ray_local):
    digest = stored(store, "{}")
    made = None
    for number in ("one", "two"):
        spec = load(PIPELINE.replace("DIGEST", digest).replace("NAME", "helper"), source="x.yaml")
        planned = plan(spec, Looks(store.storage.root / "inputs.sqlite", Store(store.storage)))
        journal = Journal.claim(store.storage, number)
        assert run(planned, store, journal, connect=ray_local) == "done"
        made = states(history(store.storage, number), planned.steps)["named"]
        assert made.state == "done"
        assert made.data["digest"] == digest
        assert made.data["about"]["registered"] == {"name": "helper", "version": 1, "alias": "champion"}
    (version,) = Registry(store.storage).versions("helper")
    assert (version.run, version.step, version.kind) == ("one", "named", "model")
    assert find_artifact(store, "helper@champion") == digest


def test_a_bad_name_is_a_problem_of_the_plan(store):
    spec = load(PIPELINE.replace("DIGEST", stored(store, "{}")).replace("NAME", "a/b"), source="x.yaml")
    with pytest.raises(PlanError, match=r"step 'named': register: name='a/b', expected letters"):
        plan(spec, Looks(store.storage.root / "inputs.sqlite", Store(store.storage)))
