"""`lfm submit` as a user types it, on a cluster that only says what it was told."""

import io
import json
import shlex
import zipfile
from pathlib import Path

import pytest

from cluster.jobs import Versions
from pipelines import following, stops
from pipelines.__main__ import main
from pipelines.commands import submit
from pipelines.lineage import Event, Journal, runs
from pipelines.storage.local import LocalStorage

PROFILE = """
name: gpus
place: kuberay
image: lfm:1
dashboard: http://localhost:8265
storage: STORE
shared: [/]
mlflow: none
drain_s: 20
head: {cpus: 4, memory_gib: 16, price_per_hour: 0.2}
groups:
  cpu: {cpus: 8, memory_gib: 32, max_nodes: 2}
"""


class FakeJobs:
    """Takes jobs; `driven` does what a job's driver would."""

    def __init__(self):
        self.states, self.told = {}, {}
        self.there = Versions.here()
        self.driven = lambda words: "running"

    def versions(self):
        return self.there

    def of_run(self, run):
        return {int(j.rpartition("-")[2]): s for j, s in self.states.items() if j.startswith(run)}

    def submit(self, job, entrypoint, *, package, metadata):
        words = shlex.split(entrypoint)
        self.told[job] = (words, package, metadata)
        self.states[job] = self.driven(words)
        return True

    def state(self, job):
        return self.states[job]

    def began(self, job):
        return 0.0

    def ended(self, job):
        self.states[job] = "succeeded"

    def last_words(self, job):
        return "no such package"


@pytest.fixture
def jobs(monkeypatch):
    made = FakeJobs()
    monkeypatch.setattr(submit, "Jobs", lambda profile: made)
    monkeypatch.setattr(following, "LOOK_S", 0.0)
    return made


@pytest.fixture
def typed(project, jobs, store, monkeypatch, capsys):
    """Types `lfm submit` in the project's folder, and gives the exit code and what it printed."""
    monkeypatch.chdir(project.folder)
    project.pipeline.write_text(project.pipeline.read_text().replace(str(project.folder / "text.txt"), "text.txt"))
    Path("gpus.yaml").write_text(PROFILE.replace("STORE", store.storage.uri))

    def type_(*words, pipeline="diamond.yaml"):
        code = main(["submit", pipeline, "--cluster", "gpus.yaml", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return type_


def detached(typed, *words):
    code, out, err = typed("--detach", "--json", *words)
    assert code == 0, err
    return json.loads(out)


def test_the_package_and_the_words_are_all_that_a_cluster_needs(typed, jobs, store, project):
    said = detached(typed, "--set", "d.size=5", "--until", "d", "--deadline", "1h30m", "--max-cost", "20",
                    "--priority", "2", "--label", "team=a b")  # fmt: skip
    job, run = said["job"], said["run"]
    assert (job, said["submitted"]) == (f"{run}-attempt-1", True)
    words, package, metadata = jobs.told[job]
    assert words == [
        *("python", "-m", "pipelines", "run", "own/diamond.yaml", "--set", "d.size=5"),
        *("--set", f"text={project.folder / 'text.txt'}", "--until", "d", "--mlflow", "none"),
        *("--deadline", "5400s", "--max-cost", "20", "--priority", "2", "--label", "team=a b"),
        *("--store", store.storage.uri, "--cluster", "profile.yaml", "--address", "auto", "--as", run),
    ]
    assert metadata == {"lfm.run": run, "lfm.team": "a b"}
    assert package.startswith(f"file://{store.storage.uri}/packages/")
    with zipfile.ZipFile(io.BytesIO(store.storage.read(package.partition(f"{store.storage.uri}/")[2]))) as archive:
        names = archive.namelist()
        assert archive.read("package/own/noop.py") == (project.folder / "noop.py").read_bytes()
    assert {"package/own/diamond.yaml", "package/profile.yaml", "package/pipelines/__main__.py"} <= {*names}
    assert not [n for n in names if "tests/" in n or "__pycache__" in n]


def test_who_interrupts_it_meanwhile_hears_what_is_not_known(typed, jobs, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "submit", interrupted)
    code, _, err = typed()
    assert code == 130
    assert "may have been submitted or not: the same 'lfm submit' follows it, or submits it.\n" in err


def test_the_same_is_followed_while_it_goes_on_and_gets_another_attempt_after_its_end(typed, jobs, store):
    first = detached(typed)
    again = detached(typed, "--deadline", "1h")  # with what it may spend it is the same
    assert again == {**first, "submitted": False}
    assert len(jobs.told) == 1
    jobs.states[first["job"]] = "failed"
    stops.ask(store.storage, first["run"])
    assert detached(typed) == {"run": first["run"], "job": f"{first['run']}-attempt-2", "submitted": True}
    assert not stops.asked(store.storage, first["run"]), "who submits it again wants it to go on"


def test_another_pipeline_input_or_profile_is_another_run(typed, jobs, project):
    found = {detached(typed)["run"], detached(typed, "--set", "d.size=9")["run"]}
    (project.folder / "text.txt").write_text("another text")
    found.add(detached(typed)["run"])
    profile = Path("gpus.yaml")
    profile.write_text(profile.read_text().replace("max_nodes: 2", "max_nodes: 3"))
    found.add(detached(typed)["run"])
    assert len(found) == 4


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1), ("interrupted", 130)])
def test_it_is_followed_to_the_end_that_its_driver_writes_down(typed, jobs, store, status, code):
    def driven(words):
        journal = Journal.claim(store.storage, words[-1])
        steps = {"a": {"needs": []}}
        journal.write([Event("started", data={"run": words[-1], "steps": steps}, time=1.0)])
        journal.write([Event("finished", data={"status": status, "why": "so it is"}, time=2.0)])
        return "running"

    jobs.driven = driven
    got, out, err = typed()
    assert got == code
    assert [line.partition(" ")[2] for line in out.splitlines()][1:] == [f"run {status}: so it is"]
    assert "uploaded" in err
    # The next one waits until the first has closed, and its events are no news there.
    jobs.driven = lambda words: "failed"
    got, out, err = typed()
    assert (got, out) == (2, "")
    assert "attempt-2' ended and said 'no such package', expected it to write down its end." in err


def test_ctrl_c_leaves_the_run_alone_and_says_how_to_come_back(typed, jobs, monkeypatch):
    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "state", interrupted)
    code, _, err = typed()
    assert code == 130
    (job,) = jobs.told
    run = job.removesuffix("-attempt-1")
    assert f"run {run} goes on." in err
    assert f"lfm stop {run} --cluster gpus.yaml" in err


def test_other_versions_are_refused_before_anything_travels(typed, jobs, store):
    jobs.there = Versions("2.61.0", "3.12")
    code, _, err = typed()
    assert code == 2
    assert "cluster 'gpus': it has Ray 2.61.0, Python 3.12, expected Ray " in err
    assert store.storage.list("packages") == ()
    assert not jobs.told


def test_what_no_machine_of_the_profile_has_or_reads_is_refused_before_anybody_is_asked(typed, jobs, monkeypatch):
    def asked(profile):
        raise AssertionError("it is no use")

    monkeypatch.setattr(submit, "Jobs", asked)
    profile = Path("gpus.yaml")
    profile.write_text(profile.read_text().replace("shared: [/]\n", ""))
    code, _, err = typed("--set", "b.cpus_per_worker=9")
    assert code == 2
    lines = err.splitlines()
    assert any(line.startswith("storage: the 3 machines of profile 'gpus' cannot read ") for line in lines)
    assert any("input 'text': the 3 machines of profile 'gpus' cannot read '/" in line for line in lines)
    assert any("step 'b': asks for 1 x 9 CPUs, each on one machine" in line for line in lines), lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--deadline", "soon"), "'soon', expected a time such as 8h, 90m or 1h30m"),
        (("--max-cost", "0"), "'0', expected an amount more than 0"),
        (("--label", "team"), "'team', expected NAME=VALUE such as team=research"),
    ],
)
def test_a_wrong_limit_or_label_is_a_sentence(typed, words, said, capsys):
    with pytest.raises(SystemExit):
        typed(*words)
    assert said in capsys.readouterr().err


def test_a_cost_without_prices_is_refused(project, monkeypatch, capsys):
    monkeypatch.chdir(project.folder)
    assert main(["run", "diamond.yaml", "--max-cost", "5"]) == 2
    assert "expected --cluster with a profile" in capsys.readouterr().err
    assert runs(LocalStorage(project.folder / ".lfm")) == ()
