"""The main job as a user runs it, with models as small as they can be."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import psutil
import pytest

from pipelines.__main__ import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = (
    *(f"{step}.max_rows=60" for step in ("summaries_train", "names_train")),
    *(f"{step}.max_rows=8" for step in ("text_held_out", "summaries_held_out", "names_held_out")),
    "text_train.max_rows=100",
    *(f"{step}.{field}" for step in ("teacher", "student") for field in ("layers=1", "width=16", "heads=2")),
    "teacher.vocabulary=400",
    *(f"{step}.max_steps=2" for step in ("teacher", "undistilled", "distilled", "namer")),
    # So little learns next to nothing: what a gate can tell from chance is what one expert has over no training.
    "describer.max_steps=60",
    "describer.learning_rate=1e-2",
    'passed.require=[{better: describer, than: student, "on": summaries}]',
)


@pytest.fixture
def typed(tmp_path):
    """Types `lfm` in a folder of the user's own, without PYTHONPATH or anything else of this process."""
    own = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short: Ray's sockets lie in it
    environment = {**os.environ, "TMPDIR": str(own), "PYTHONPATH": str(ROOT)}

    def type_(*words, module="pipelines", expect=0):
        done = subprocess.run(
            [sys.executable, "-m", module, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == expect, done.stderr + done.stdout
        return done.stdout

    return type_


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_it_is_made_proved_served_reused_and_stopped(typed, port):
    before = {p.pid for p in psutil.process_iter()}
    changes = [w for change in (*SMALL, f"endpoint.port={port}") for w in ("--set", change)]
    first = json.loads(typed("run", "distill_lora_merge_serve", "--detach", "--json", *changes))
    assert first["status"] == "serving"
    assert {s["state"] for s in first["steps"].values()} == {"done"}

    url = first["steps"]["endpoint"]["data"]["about"]["url"]
    with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
        (model,) = json.load(answer)["data"]
    merged = first["steps"]["merged"]["data"]["digest"]
    assert (model["id"], model["digest"]) == ("python-helper", merged)
    proof = first["steps"]["endpoint"]["data"]["about"]["probe"]
    assert proof["from_artifact"] < 1e-4 < proof["from_base"]

    lines = typed("lineage", "endpoint").splitlines()
    assert all(" digest " in line for line in lines)
    for origin in ("python://text", "python://summaries", "python://names", "teacher", "distilled", "merged"):
        assert any(origin in line for line in lines), origin
    typed("stop", "last")

    told = typed(*changes, module="pipelines.demo")
    for word in ("asked (held out): ", "answered: ", "Python itself says: ", "proof: ", " digest ", "stopped"):
        assert word in told, told
    again = json.loads(typed("show", "last", "--json"))
    effects = {"registered", "endpoint"}
    assert {n for n, s in again["steps"].items() if s["state"] == "done"} == effects
    assert {s["state"] for n, s in again["steps"].items() if n not in effects} == {"reused"}
    left = [p for p in psutil.process_iter() if p.pid not in before and str(ROOT) in _command(p)]
    assert left == []


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended since it was listed, or waits to be reaped
        return ""
