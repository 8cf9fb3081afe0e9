"""The command line as a user types it."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.capacity import Capacity
from cluster.connect import NoCluster
from pipelines import stops
from pipelines.__main__ import COMMANDS, main
from pipelines.commands import _planned, run
from pipelines.storage.local import LocalStorage

pytestmark = pytest.mark.ray


@pytest.fixture
def typed(project, ray_local, monkeypatch, capsys):
    """Types a command in the project's folder, with the tests' Ray, and gives the exit code and what it printed."""
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(run, "opened", lambda *_: ray_local())

    def type_(*words):
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return type_


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Example: lfm {command}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plam", "a.yaml"), "lfm: no command is called 'plam'. Did you mean 'plan'?"),
        (("zzz",), "lfm: no command is called 'zzz'. Known: cluster, export, gc, lineage, "),
        (("methods", "--jsn"), "lfm methods: no option is called '--jsn'. Did you mean '--json'?"),
        (("methods", "--nam"), "lfm methods: no option is called '--nam'. Known: --json."),
        (("plan", "a.yaml", "b", "--unti=b"), "lfm plan: no option is called '--unti'. Did you mean '--until'?"),
        (("logs", "last", "a", "b"), "lfm logs: 'b' is one word too many, expected run and step alone. Leave it out."),
        (("ps", "b"), "lfm ps: 'b' is one word too many, expected options alone. Leave it out."),
    ],
)
def test_a_word_that_no_command_knows_is_answered_with_what_is_near(words, said, capsys):
    assert main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_plan_run_and_show(typed):
    code, out, _ = typed("plan", "diamond.yaml")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["step", "a", "b", "c", "d", "input"]
    assert out.count("runs") == 4

    code, out, _ = typed("run", "diamond.yaml")
    assert code == 0
    assert out.splitlines()[-1].endswith("run done")

    plan = json.loads(typed("plan", "diamond.yaml", "--json")[1])
    assert {s["state"] for s in plan["steps"].values()} == {"stored"}
    shown = json.loads(typed("show", "last", "--json")[1])
    assert shown["status"] == "done"
    assert {s["state"] for s in shown["steps"].values()} == {"done"}
    assert {n: s["fingerprint"] for n, s in shown["steps"].items()} == {
        n: s["fingerprint"] for n, s in plan["steps"].items()
    }
    assert "done" in typed("show", "last")[1]
    assert typed("show", "last", "--html", "run.html")[0] == 0
    assert "diamond" in Path("run.html").read_text()

    (run,) = json.loads(typed("ps", "--json")[1])
    assert (run["status"], run["finished"], run["steps"]) == ("done", 4, 4)
    assert run["run"] in typed("ps")[1]

    ancestors = typed("lineage", "d")[1].splitlines()
    assert all(" digest " in line for line in ancestors)
    assert "text.txt" in ancestors[3]
    assert "noop says hello" in typed("logs", "last", "d")[1]


def test_why_names_what_differs(typed):
    typed("run", "diamond.yaml")
    typed("run", "diamond.yaml", "--set", "b.size=20")
    why = json.loads(typed("why", "last", "b", "--json")[1])
    assert list(why["changed"]) == ["params.size"]
    assert why["changed"]["params.size"][1] == 20
    assert " -> 20" in typed("why", "last", "b")[1]
    assert "reused" in typed("why", "last", "a")[1]


def test_a_failing_run_says_where_the_log_is_and_can_be_resumed(typed, project):
    code, out, _ = typed("run", "diamond.yaml", "--set", "d.fail=raise")
    assert code == 1
    said = next(line for line in out.splitlines() if "Step 'd' failed" in line)
    assert "failed in attempt 1 with ValueError: asked to fail. Log: " in said
    assert "asked to fail" in Path(said.rpartition("Log: ")[2]).read_text()
    code, out, _ = typed("resume", "last")
    assert code == 1
    assert "attempt 2" in out
    assert out.count("reused") == 3


BROKEN = """name: broken
uses: [noop.py]
inputs:
  text: {dataset: gone.txt}
  other: {dataset: lost.txt}
  unused: {dataset: nobody.looks}
steps:
  a: {operator: noop, inputs: {after: [text]}, resources: {cpus_per_worker: 4096}}
  b: {operator: noop, inputs: {after: [other]}, params: {siz: 2}, resources: {memory: 10000000000000000}}
  c: {operator: nop, inputs: {after: [a]}}
  d: {operator: noop, inputs: {after: [a, bb]}, params: {size: big}}
  e: {operator: serve, inputs: {model: m}, params: {port: PORT}}
  f: {operator: serve, inputs: {model: m}, params: {port: 70000}}
"""


def test_everything_that_is_wrong_is_printed_at_once_by_plan_and_run_and_nothing_starts(typed, project, monkeypatch):
    def started(*arguments, **options):
        raise AssertionError("it is broken")

    monkeypatch.setattr(run, "opened", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(_planned, "here", lambda: Capacity(cpus=2, gpus=0, memory=8e9))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        text = BROKEN.replace("PORT", str(port)).replace("inputs:\n", "inputs:\n  m: {model: 'hf://a/b'}\n", 1)
        project.pipeline.write_text(text)
        words = ("diamond.yaml", "--set", "a.siz=3", "--until", "bb", "--store", "noop.py/store")
        code, out, err = typed("plan", *words)
        assert (code, out) == (2, "")
        folder = project.folder
        assert err.splitlines() == [
            "--set a.siz=3: the step has no field 'siz'. Did you mean 'size'?",
            "--until: no step is called 'bb'. Did you mean 'b'?",
            f"store '{folder}/noop.py/store': not a directory, expected a location that can be written to. "
            "Give another one with --store.",
            "diamond.yaml:4 input 'm': 'hf://a/b' could not be looked up ([Errno 111] Connection refused). "
            "Check the name, the network and HF_ENDPOINT.",
            f"diamond.yaml:5 input 'text': 'gone.txt' is not there (looked at '{folder}/gone.txt'). Check the path.",
            f"diamond.yaml:6 input 'other': 'lost.txt' is not there (looked at '{folder}/lost.txt'). Check the path.",
            "diamond.yaml:9 step 'a': asks for 4096 CPUs, expected at most 2, which is all there is. "
            "Lower it, or run it on a larger cluster.",
            "diamond.yaml:10 step 'b': 'noop' has no parameter 'siz'. Did you mean 'size'?",
            "diamond.yaml:10 step 'b': asks for 10,000,000.00 GB of memory, expected at most 8.00 GB, which is all "
            "there is. Lower it, or run it on a larger cluster.",
            "diamond.yaml:11 step 'c': No operator is called 'nop'. Did you mean 'noop'?",
            "diamond.yaml:12 step 'd': no input or step is called 'bb'. Did you mean 'b'?",
            "diamond.yaml:12 step 'd': noop: size='big', expected an integer.",
            f"diamond.yaml:13 step 'e': endpoint: 127.0.0.1:{port} is in use, expected a free port. Give another one.",
            "diamond.yaml:14 step 'f': port=70000, expected 1 <= port <= 65535. Give another one.",
            "diamond.yaml:14 step 'f': a second endpoint beside 'e', expected one in a pipeline. "
            "Serve it in a run of its own.",
        ]
        assert typed("run", *words) == (code, out, err)
        assert typed("run", *words, "--detach") == (code, out, err)
        forced = typed("run", *words, "--force", "cc", "--force", "d")[2].splitlines()
        assert set(forced) - set(err.splitlines()) == {"--force: no step is called 'cc'. Did you mean 'c'?"}


def test_a_broken_pipeline_leaves_no_run_behind(typed, project):
    project.pipeline.write_text(project.pipeline.read_text().replace("size: 2", "siz: 2"))
    assert typed("run", "diamond.yaml")[0] == 2
    assert typed("ps", "--json")[1].strip() == "[]"


def test_what_until_leaves_out_need_not_be_possible_here(typed, project):
    text = project.pipeline.read_text()
    project.pipeline.write_text(text.replace("params: {size: 4}", "resources: {cpus_per_worker: 4096}"))
    assert typed("plan", "diamond.yaml")[0] == 2
    assert typed("plan", "diamond.yaml", "--until", "c")[0] == 0


def test_a_cluster_that_does_not_answer_is_one_of_the_problems(typed, project, monkeypatch):
    def silent(address):
        raise NoCluster(address, "connection refused")

    monkeypatch.setattr(_planned, "cluster", silent)
    project.pipeline.write_text(project.pipeline.read_text().replace("size: 2", "siz: 2"))
    err = typed("plan", "diamond.yaml", "--address", "10.0.0.7:6379")[2].splitlines()
    assert err == [
        "Ray at '10.0.0.7:6379': connection refused, expected a cluster that answers. Check --address.",
        "diamond.yaml:8 step 'b': 'noop' has no parameter 'siz'. Did you mean 'size'?",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "gone.yaml"), "no such file"),
        (("plan", "distil_lora"), "expected a .yaml or .py file or a recipe"),
        (("show", "nobody"), "No run is called 'nobody'"),
        (("lineage", "nothing"), "names no artifact"),
        (("methods", "mergin"), "Did you mean 'merging'?"),
        (("plan", "diamond.yaml", "--store", "gs://b/x"), "gs://b/x"),
        (("plan", "diamond.yaml", "--until", "e"), "no step is called 'e'"),
    ],
)
def test_a_wrong_argument_is_a_sentence_and_not_a_traceback(typed, words, said):
    code, _, err = typed(*words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ui", "--port", "99999999"), "argument --port: '99999999', expected a whole number from 1 to 65535"),
        (("ui", "--port", "0"), "argument --port: '0', expected a whole number from 1 to 65535"),
        (("serve", "up", "x", "--port", "http"), "argument --port: 'http', expected a whole number from 1 to 65535"),
        (("run", "x.yaml", "--retries", "-1"), "argument --retries: '-1', expected a whole number, 0 or more"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_else(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_methods_are_listed_with_where_they_are_written_down(typed):
    found = json.loads(typed("methods", "distillation", "--json")[1])
    assert any(m["name"] == "distillation/forward_kl" and m["reference"] == "arXiv:1503.02531" for m in found)
    assert "distillation/forward_kl" in typed("methods")[1]


def test_a_python_file_plans_like_its_yaml(typed, project):
    (project.folder / "tiny.py").write_text(
        "from noop import noop\nfrom operators.artifact import Dataset\n\n"
        f"def tiny(text=Dataset({str(project.folder / 'text.txt')!r})):\n"
        "    return noop('b', after=[noop('a', after=[text])], size=2)\n"
    )
    out = json.loads(typed("plan", "tiny.py", "--json")[1])
    assert list(out["steps"]) == ["a", "b"]
    assert out["steps"]["b"]["params"]["size"] == 2


def test_ctrl_c_while_a_command_is_still_being_imported_ends_without_a_traceback(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["methods"]) == 130


def test_a_run_that_has_a_name_goes_on_under_it_unless_it_was_stopped(typed):
    store = LocalStorage(Path(".lfm"))
    assert typed("run", "diamond.yaml", "--set", "d.fail=raise", "--as", "one")[0] == 1
    code, out, _ = typed("run", "diamond.yaml", "--as", "one", "--label", "team=a", "--force", "b")
    assert code == 0
    assert out.count("reused") == 3, "what is forced is so once"
    (listed,) = json.loads(typed("ps", "--json")[1])
    assert (listed["run"], listed["status"], listed["labels"]) == ("one", "done", {"team": "a"})
    stops.ask(store, "one")
    code, _, err = typed("run", "diamond.yaml", "--as", "one")
    assert (code, err) == (2, f"{stops.RunStopped('one')}\n")
    assert typed("resume", "one")[0] == 1
    assert not stops.asked(store, "one")
    code, out, _ = typed("logs", "one")
    assert (code, out.partition(",")[0]) == (1, "run one has no such log of a driver")
