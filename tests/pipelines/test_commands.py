"""The command line as a user types it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from pipelines.__main__ import COMMANDS, ROOT, main
from pipelines.commands import run

pytestmark = pytest.mark.ray


@pytest.fixture
def typed(project, ray_local, monkeypatch, capsys):
    """Types a command in the project's folder, with the tests' Ray, and gives the exit code and what it printed."""
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(run, "cluster", lambda address: ray_local())

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


def test_all_problems_are_printed_at_once_and_nothing_runs(typed, project):
    project.pipeline.write_text(project.pipeline.read_text().replace("size: 2", "siz: 2").replace("text.txt", "gone"))
    code, out, err = typed("run", "diamond.yaml", "--set", "c.cpus_per_worker=4096")
    assert code == 2
    assert out == ""
    assert "diamond.yaml:8 step 'b': unknown key 'siz'. Did you mean 'size'?" in err
    assert "is not there" in err
    assert "step 'c': asks for 4096 CPUs" in err
    assert typed("ps", "--json")[1].strip() == "[]"


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


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_resume_ends_the_run(project, tmp_path):
    """A real `lfm run` with a Ray of its own."""
    lfm = [sys.executable, "-m", "pipelines"]
    own = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short: Ray's sockets lie in it
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(own)}
    go = tmp_path / "go"
    words = [*lfm, "run", "diamond.yaml", "--set", f"b.until={go}", "--set", f"c.until={go}"]
    with subprocess.Popen(
        words, cwd=project.folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        for line in driver.stdout:
            if "b: started" in line:
                break
        children = psutil.Process(driver.pid).children(recursive=True)
        assert children
        os.kill(driver.pid, signal.SIGINT)
        rest = driver.stdout.read()
    assert driver.returncode == 130, rest
    assert rest.splitlines()[-1].endswith("run interrupted")
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert len(gone) == len(children)
    assert list(own.iterdir()) == []

    go.write_text("")
    resumed = subprocess.run(
        [*lfm, "resume", "last"], cwd=project.folder, env=environment, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "a: reused" in resumed.stdout
    assert list(own.iterdir()) == []
    own.rmdir()
