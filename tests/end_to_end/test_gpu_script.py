"""`benchmarks/gpu.py` on a CPU, with models as small as they can be: that every part comes to its figures."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from operators.data.batches import on_device
from operators.learning.learner import Place
from operators.models.objectives import plain
from operators.training import Training
from pipelines.__main__ import ROOT

SCRIPTS = ROOT / "benchmarks"
GROUPS = {"ray", "zero", "offload", "vllm"}
LACKING = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    lacks = name.partition(".")[0] in {"ray", "deepspeed", "pydantic", "mlflow", "vllm"}
    return None if lacks else found(name, path, target)
PathFinder.find_spec = find_spec
"""


@pytest.fixture
def scripts(script):
    return script("gpu"), script("gpu_models"), script("gpu_training")


@pytest.mark.slow
def test_every_part_has_a_ratio_to_a_baseline_where_nothing_of_a_cluster_is_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    words = ["--device", "cpu", "--tiny", "--rounds", "1", "--json", str(tmp_path / "gpu.json")]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu.py"), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {p.partition(":")[0]: p for p in done.stdout.split("== ")[1:]}
    kept = json.loads((tmp_path / "gpu.json").read_text())
    for name, said in parts.items():
        assert ("ratio " in said) == (name not in GROUPS), said
        assert ("not run: needs" in said) == (name in GROUPS), said
    assert len(parts) == 14
    assert all(f["ratio"] > 0 for f in kept["figures"])
    assert kept["device"] == "CPU"


def test_a_part_that_takes_too_long_or_lacks_something_is_told_with_what_it_had_found(scripts, tmp_path, capsys):
    gpu, models, _ = scripts
    asked = gpu.options().parse_args(["--limit", "60", "--json", str(tmp_path / "kept.json")])
    bench = models.Bench(device=torch.device("cpu"), tiny=True, rounds=1, home=tmp_path, until=0.0)

    def slow(bench):
        yield "found"
        signal.raise_signal(signal.SIGALRM)  # as when its time is over
        yield "never"

    gpu.slow = slow
    report = gpu.Report(asked, bench.device)
    report.ran("slow", gpu.Part("never ends", "gpu.slow", needs=()), bench)
    report.ran("lacks", gpu.Part("cannot", "gpu.slow", needs=("no_such_module",)), bench)
    report.ran("wrong", gpu.Part("is wrong", "gpu.no_such_function", needs=()), bench)
    assert report.remarks[:3] == [
        "found",
        "slow: not run to its end: it took longer than 60 s",
        "lacks: not run: needs no_such_module",
    ]
    assert report.remarks[3].startswith("wrong: FAILED: AttributeError")
    assert report.failed
    assert json.loads((tmp_path / "kept.json").read_text())["remarks"] == report.remarks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "distillation"])
def test_operations_are_those_that_torch_counts(kind, scripts, tmp_path):
    _, models, training_parts = scripts
    bench = models.Bench(device=torch.device("cpu"), tiny=True, rounds=1, home=tmp_path, until=0.0)
    size, larger, length = bench.sizes["0.5b"], bench.sizes["1.5b"], 32
    training = Training(max_steps=1, batch_size=2, length=length, packing=False, precision="bfloat16")
    rows = training_parts.drawn(2, length, size.vocabulary)
    rows.targets[:, -1] = 1  # that each token meets the head
    given = {"folder": bench.folder(size), "training": training, "rows": rows}
    if kind == "distillation":
        job = training_parts.distilling(Place(), teacher=bench.folder(larger, seed=1), **given)
        expected = size.trained(length) + larger.forward(length)
    else:
        method = training_parts.Full() if kind == "full" else training_parts.LORA
        job = training_parts.tuning(Place(), method=method, **given)
        added = sum(p.numel() for p in job.objective.parameters() if p.requires_grad)
        expected = size.trained(length) if kind == "full" else size.adapted(length, added)
    for model in (job.objective.model, getattr(getattr(job.objective, "teacher", None), "model", None)):
        if model is not None:
            plain(model).set_attn_implementation("eager")  # torch counts no other attention of a CPU
    if kind == "lora":  # what lies below all that learns needs no gradient: what goes into the first layer
        kv_width = size.width // size.heads * size.kv_heads
        into_queries_keys_values = size.width * (size.width + 2 * kv_width) + 3 * training_parts.LORA.rank * size.width
        expected -= 2 * into_queries_keys_values
    assert operations(job, rows) / (2 * length) == expected


def operations(job, rows):
    """Operations of matrix products, forward and backward, of all rows."""
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        job.objective(on_device(rows, np.arange(len(rows)), torch.device("cpu"))).backward()
    return counter.get_total_flops()
