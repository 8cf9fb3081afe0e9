"""Runs over several machines: they give what one gives, also where one goes in the middle, and wait for no other."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from safetensors.torch import load_file

from lfm.merging.task_arithmetic import TaskArithmetic
from operators.code import bring
from operators.measuring import measure
from operators.merging import Streaming, merge
from operators.pretraining import Architecture, pretrain
from operators.training import Training
from pipelines.__main__ import ROOT
from pipelines.lineage import history, runs, states
from pipelines.source import pack
from pipelines.storage.local import LocalStorage
from pipelines.storage.opening import open_storage
from pipelines.store import Store
from tests.operators import small

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WAIT_S = 900
MINE = '''
"""A merge and a pass over data that say where they compute, and that wait to be seen there."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lfm.merging.task_arithmetic import TaskArithmetic
from operators.artifact import Dataset
from operators.base import operator
from operators.sharing.parts import in_parts
from operators.workspace import Workspace


def seen(places: str, what: str, machines: int, held: str) -> None:
    """Write down where `what` is computed; wait until so many machines compute, and for as long as it is held."""
    if not places:
        return
    import ray

    home, here = Path(places), ray.get_runtime_context().get_node_id()
    (home / here).mkdir(exist_ok=True)
    (home / here / f"{what}-{time.time_ns()}-{os.getpid()}").touch()
    while len(list(home.iterdir())) < machines or (what == held and (home.parent / "held").exists()):
        time.sleep(0.02)


@dataclass(frozen=True, kw_only=True, slots=True)
class Followed(TaskArithmetic):
    """Task arithmetic."""

    places: str = ""
    machines: int = 1
    held: str = ""

    def merge(self, name: str, base: Tensor, experts: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        seen(self.places, name, self.machines, self.held)
        return TaskArithmetic.merge(self, name, base, experts, found)


class Squarer:
    """Squares the numbers of a part."""

    def __init__(self, device: torch.device, places: str, machines: int, held: str) -> None:
        self.asked = (places, machines, held)

    def part(self, number: int) -> pa.Table:
        places, machines, held = self.asked
        seen(places, str(number), machines, held)
        return pa.table({"square": [n * n for n in range(10 * number, 10 * number + 10)]})


@operator(shares_work=True)
def squares(work: Workspace, *, places: str = "", machines: int = 1, held: str = "", parts: int = 9) -> Dataset:
    """Square numbers."""
    files = in_parts(work, Squarer, {"places": places, "machines": machines, "held": held}, parts, "squares")
    path = work.scratch / "squares.parquet"
    pq.write_table(pa.concat_tables(pq.read_table(file) for file in files), path)
    return work.save(Dataset, path)
'''
INPUTS = """
name: nodes
uses: [mine.py]
inputs:
  base: {model: FOLDER/base}
  one: {model: FOLDER/one}
  two: {model: FOLDER/two}
  text: {dataset: FOLDER/texts.jsonl}
  pairs: {dataset: FOLDER/pairs.jsonl}
steps:
"""
TRAINING = {"max_steps": 3, "batch_size": 5, "micro_batch_size": 2, "length": 16, "learning_rate": 0.02, "seed": 3}
SIZES = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 320, "context": 32}
MEASURED = {"statistics": ("fisher",), "length": 32, "max_rows": 12}
SHARDS = 4000  # bytes: several files of weights
HELD = {"merged": "model.layers.1.mlp.up_proj.weight", "squares": "4"}


def step(operator, inputs, params, resources, **method):
    """One step as a pipeline has it."""
    made = {"operator": operator, "inputs": inputs, "params": params, "resources": resources}
    return {**made, "method": method} if method else made


def merged(resources, **fields):
    params = {"shard_bytes": SHARDS}
    return step("merge", EXPERTS, params, resources, name="followed", scale=0.5, **fields)


EXPERTS = {"base": "base", "experts": ["one", "two"]}


class Given:
    """A folder of the user's, and runs of pipelines in it on some nodes."""

    def __init__(self, folder, nodes):
        self.folder, self.nodes = folder, nodes
        self.base = small.saved(folder / "base")
        self.experts = [small.saved(folder / name, seed=seed) for seed, name in enumerate(("one", "two"), 1)]
        self.text, self.pairs = small.texts(folder / "texts.jsonl"), small.pairs(folder / "pairs.jsonl")
        (folder / "mine.py").write_text(MINE)
        self.storage = LocalStorage(folder / "store")
        self.store, self.out = Store(self.storage), folder / "said.txt"

    def places(self, step):
        """Where a step's pieces say where they are computed."""
        made = self.folder / "places" / step
        made.mkdir(parents=True, exist_ok=True)
        return made

    def starts(self, steps, *where):
        """Start a run, in a process of its own; without a word where, on the nodes that there are."""
        (self.folder / "nodes.yaml").write_text(
            INPUTS.replace("FOLDER", str(self.folder)) + "".join(f"  {n}: {json.dumps(s)}\n" for n, s in steps.items())
        )
        where = where or ("--address", self.nodes.address, "--store", self.storage.uri)
        words = ["run", "nodes.yaml", "--mlflow", "none", *where]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *words], cwd=self.folder, stdout=out, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def until(self, what):
        """Wait for something that the run does."""
        limit = time.monotonic() + WAIT_S
        while not (found := what()):
            assert self.process.poll() is None, self.out.read_text()
            assert time.monotonic() < limit, self.out.read_text()
            time.sleep(0.05)
        return found

    def ends(self, code=0):
        """The steps' states when it has ended."""
        assert self.process.wait(WAIT_S) == code, self.out.read_text()
        self.events = history(self.storage, runs(self.storage)[0])
        return states(self.events, {e.step for e in self.events} - {""})

    def nodes_of(self, step):
        return {path.name for path in self.places(step).iterdir()}

    def same_files(self, state, artifact):
        """Whether a step has made, byte for byte, what was made without a cluster."""
        got = self.store.get(state.data["digest"]).path
        made = [artifact.path] if artifact.path.is_file() else sorted(artifact.path.iterdir())
        assert sorted(p.name for p in got.iterdir() if p.name != "manifest.json") == [p.name for p in made]
        return all((got / p.name).read_bytes() == p.read_bytes() for p in made)

    def left_nothing(self):
        """Whether nothing is left of work that has ended, once somebody clears up after processes that were killed."""
        open_storage(self.storage.uri)
        return not os.listdir(self.storage.root / "scratch") and not self.storage.list("checkpoints")

    def merged(self):
        """The merge of one process."""
        given = {"base": self.base, "experts": self.experts, "method": TaskArithmetic(scale=0.5)}
        return merge.body(small.Work(self.folder / "merged"), **given, streaming=Streaming(shard_bytes=SHARDS))

    def squares(self):
        """The pass of one process."""
        (mine,) = bring(pack(self.folder, ("mine.py",)), str(self.folder))
        return mine.squares.body(small.Work(self.folder / "squares"))


@pytest.fixture
def given(four_nodes, tmp_path):
    made = Given(tmp_path, four_nodes)
    yield made
    if made.process.poll() is None:  # the test has failed
        made.process.kill()
        made.process.wait()


def test_several_nodes_give_what_one_gives(given):
    told = {"places": str(given.places("merged")), "machines": 3}
    given.starts({
        "merged": merged({"workers": 3}, **told),
        "measured": step("measure", {"model": "base", "data": "pairs"}, MEASURED, {"workers": 3}),
        "trained": step("pretrain", {"data": "text"}, {**TRAINING, **SIZES}, {"workers": 2, "strategy": "ddp"}),
    })  # fmt: skip
    asks = {"architecture": Architecture(**SIZES), "training": Training(**TRAINING)}
    alone = pretrain.body(small.Work(given.folder / "alone"), data=given.text, tokenizer=None, held_out=None, **asks)
    fisher = measure.body(small.Work(given.folder / "measured"), model=given.base, data=given.pairs, **MEASURED)

    now = given.ends()
    assert len(given.nodes_of("merged")) == 3
    assert given.same_files(now["merged"], given.merged())

    assert len(given.nodes("actors", "MapWorker")) > 1
    name = "statistics.safetensors"
    measured = given.store.get(now["measured"].data["digest"]).path / name
    assert measured.read_bytes() == (fisher.path / name).read_bytes()

    assert len(given.nodes("actors", "RayTrainWorker")) > 1
    name = "model.safetensors"
    got, wanted = load_file(given.store.get(now["trained"].data["digest"]).path / name), load_file(alone.path / name)
    assert got.keys() == wanted.keys()
    assert max((got[n] - wanted[n]).abs().max().item() for n in got) < 1e-5
    assert given.left_nothing()


@pytest.mark.parametrize("what", ["merged", "squares"])
def test_work_of_which_a_node_is_lost_ends_with_the_same_bytes(given, what):
    places, resources = given.places(what), {"workers": 3}
    told = {"places": str(places), "machines": 3, "held": HELD[what]}
    (places.parent / "held").touch()
    given.starts({what: merged(resources, **told) if what == "merged" else step("squares", {}, told, resources)})
    first = given.until(lambda: list(places.glob(f"*/{HELD[what]}-*")))[0]
    lost = next(name for name, number in given.nodes("ids").items() if number == first.parent.name)
    given.until(lambda: len(given.nodes_of(what)) == 3)
    given.nodes("remove", lost)
    (places.parent / "held").unlink()

    now = given.ends()
    assert Counter(e.data["class"] for e in given.events if e.kind == "fail") == {"node": 1}, given.out.read_text()
    assert given.same_files(now[what], getattr(given, what)())
    assert given.left_nothing()


def test_what_waits_for_a_group_that_never_comes_is_given_up_and_asks_for_nothing_more(given):
    each = {"gpus_per_worker": 1, "accelerator": "H100", "schedule_timeout": 10}
    given.starts({
        "alone": step("squares", {}, {}, each),
        "pass": step("squares", {}, {"parts": 8}, {**each, "workers": 2}),
        "merged": merged({**each, "workers": 2}),
        "gang": step("pretrain", {"data": "text"}, {**TRAINING, **SIZES}, {**each, "workers": 2, "strategy": "ddp"}),
        "fine": step("squares", {}, {"parts": 7}, {}),
    }, "--cluster", str(given.nodes.profile(given.folder)))  # fmt: skip
    now = given.ends(1)
    assert {n: s.state for n, s in now.items()} == {**dict.fromkeys(now, "failed"), "fine": "done"}
    for name, count in {"alone": 1, "pass": 2, "merged": 2, "gang": 2}.items():
        assert (now[name].data["class"], now[name].attempts) == ("capacity", 1)
        assert now[name].data["sentence"] == (
            f"asks for {count} x 1 CPU and 1 GPU, expected machines for that within 10 s; of group 'h100' there are 0 "
            "of 8, all that there is are 4 CPUs and 1 GPU. See why no more come, or raise schedule_timeout."
        )
    assert {e.step for e in given.events if e.kind == "wait"} == {"alone", "pass", "merged", "gang"}
    limit = time.monotonic() + WAIT_S
    while given.nodes("asked"):
        assert time.monotonic() < limit, given.nodes("asked")
    assert given.left_nothing()
