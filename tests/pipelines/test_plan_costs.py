"""`lfm plan --cluster`: what each step of a pipeline takes on a profile's machines."""

import json
import re

import pytest

from operators.artifact import Model
from operators.catalog import Catalog
from pipelines.__main__ import main
from pipelines.footprints import Footprints
from pipelines.lineage import Event, Journal
from pipelines.spec import load
from pipelines.storage.local import LocalStorage
from tests.operators import small

PIPELINE = """
name: costs
inputs:
  base: {model: BASE}
  text: {dataset: text.jsonl}
steps:
  tuned:
    operator: tune
    inputs: {model: base, data: text}
    method: {name: lora, rank: 2}
    params: {max_steps: 10, batch_size: 4, length: 32}
  again:
    operator: tune
    inputs: {model: base, data: text}
    method: {name: full}
    params: {batch_size: 4, length: 32}
    resources: {strategy: auto, workers: 2}
  merged:
    operator: merge
    inputs: {base: base, experts: [tuned, again]}
    method: {name: linear}
"""
PROFILE = """
name: few
place: kuberay
image: lfm
storage: SHARED/store
shared: [SHARED]
head: {cpus: 2, memory_gib: 4, price_per_hour: 0.5}
groups:
  cpu: {cpus: 4, memory_gib: MEMORY, max_nodes: 2, price_per_hour: 2, tflops: 0.001}
"""


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """Types `lfm plan` about a pipeline of which everything is in one folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small.saved(tmp_path / "base")
    small.texts(tmp_path / "text.jsonl")
    (tmp_path / "costs.yaml").write_text(PIPELINE.replace("BASE", "base"))
    capsys.readouterr()

    def type_(*words, memory=8, profile=PROFILE):
        text = profile.replace("SHARED", str(tmp_path)).replace("MEMORY", str(memory))
        (tmp_path / "few.yaml").write_text(text)
        code = main(["plan", "costs.yaml", "--cluster", "few.yaml", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return type_


def test_a_plan_says_both_ends_of_a_number_of_workers(typed):
    code, out, err = typed("--set", "again.workers=[1, 8]")
    assert code == 0, err
    assert "1 to 8 x 1 CPU, ddp" in out
    assert "1 to 2 x cpu" in out


def test_a_plan_says_what_each_step_takes_and_what_all_cost(typed):
    code, out, _ = typed("--json")
    assert code == 0
    plan = json.loads(out)
    steps = {name: step["estimate"] for name, step in plan["steps"].items()}
    tuned = steps["tuned"]
    assert (tuned["state"], tuned["group"], tuned["nodes"], tuned["source"]) == ("runs", "cpu", 1, "operations")
    assert tuned["seconds"][0] == pytest.approx(tuned["memory"]["flops"] / (0.001e12 / 4))
    assert tuned["cost"][0] == pytest.approx(2 * tuned["seconds"][0] / 3600)
    assert plan["steps"]["again"]["resources"]["strategy"] == "ddp"
    assert steps["again"]["memory"]["buckets"] == steps["again"]["memory"]["gradients"] > 0
    assert (steps["again"]["seconds"], plan["total"]["unknown"]) == (None, ["again", "merged"])
    assert plan["total"]["cost"][0] > tuned["cost"][0]

    code, out, _ = typed()
    assert code == 0
    assert "1 x cpu" in out
    assert "total: " in out


def test_what_a_store_remembers_of_such_a_step_is_its_time(typed, tmp_path):
    plan = json.loads(typed("--json")[1])
    storage = LocalStorage(tmp_path / "store")
    journal = Journal.claim(storage, "20260101-000000000-costs-00000000")
    started = {"run": "r", "steps": plan["steps"], "inputs": plan["inputs"]}
    journal.write([Event("started", data=started), Event("commit", "again", {"seconds": 30.0})])
    again = json.loads(typed("--json")[1])["steps"]["again"]["estimate"]
    assert (again["source"], again["seconds"]) == ("earlier runs", [30.0, 30.0])


SEARCH = """
  measured: {operator: evaluate, inputs: {model: merged, data: {text: text}}, params: {length: 32}}
  found:
    operator: search
    inputs: {result: merged, judged: measured}
    params:
      space: {tuned.learning_rate: {choice: [0.01, 0.1]}, merged.weights: {choice: [[1, 1], [1, 2], [1, 3]]}}
      objectives: [{on: text, measure: loss, direction: minimize}]
      sampler: random
      num_trials: 4
"""


def test_a_plan_says_what_the_trials_of_a_search_take_and_that_others_share_them(typed, tmp_path, capsys):
    (tmp_path / "costs.yaml").write_text(PIPELINE.replace("BASE", "base") + SEARCH.removeprefix("\n"))
    plan = json.loads(typed("--json", memory=64)[1])
    steps = {name: step["estimate"] for name, step in plan["steps"].items()}
    trials = plan["steps"]["found"]["trials"]
    assert (trials["trials"], trials["times"]) == (4, {"tuned": 2, "merged": 4, "measured": 4})
    assert (trials["shared"], trials["early"], trials["max_s"]) == (["again"], False, None)
    # Merging starts no workers here and asks for one CPU; two machines have eight.
    assert trials["at_once"] == 4
    assert trials["estimate"]["seconds"] == steps["tuned"]["seconds"]
    # Four at once on one machine, which two of them train on.
    each = trials["estimate"]["cost"]
    assert each == pytest.approx([c / 4 for c in steps["tuned"]["cost"]])
    assert steps["found"]["cost"] == pytest.approx([2 * c for c in each])
    assert (steps["found"]["source"], steps["found"]["nodes"]) == ("trials", 1)
    assert plan["total"]["steps"][0] == pytest.approx(steps["tuned"]["cost"][0] + steps["found"]["cost"][0])

    out = typed()[1]
    lines = "search found: 4 trials, {} at once, all with the same again\n  make at the most 2 x tuned, 4 x merged, "
    assert f"{lines.format(4)}4 x measured, besides the steps above\n  each " in out
    assert "without merged, measured, of which nothing is known" in out
    assert main(["plan", "costs.yaml", "--set", "again.resources.strategy=ddp", "--set", "found.concurrency=3"]) == 0
    assert lines.format(3) in capsys.readouterr().out


def test_machines_without_the_memory_are_refused_by_name(typed):
    code, out, err = typed(memory=0.5)
    assert (code, out) == (2, "")
    lacks = r"[\d.]+ [GM]iB of memory, and 'cpu' has 512 MiB, expected"
    for said in (
        f"step 'tuned': a worker takes {lacks} no more than that",
        f"step 'again': strategy='auto': the least that any takes is {lacks} one that fits",
        f"step 'merged': a worker takes {lacks} no more than that",
    ):
        assert len(re.findall(said, err)) == 1


def test_what_other_machines_cannot_read_is_refused(typed):
    code, _, err = typed(profile=PROFILE.replace("shared: [SHARED]", "shared: [/elsewhere]"))
    assert code == 2
    assert "storage: the 3 machines of profile 'few' cannot read" in err
    assert "the 3 machines of profile 'few' cannot read" in err


STEPS = """
inputs: {text: {dataset: t}}
steps:
  made:
    operator: pretrain
    inputs: {data: text}
    params: {layers: 2, width: 16, heads: 2, vocabulary: 300, length: 16, batch_size: 2}
  tuned: {operator: tune, inputs: {model: made, data: text}, method: {name: lora}, params: {length: 16, batch_size: 2}}
  student: {operator: pretrain, inputs: {data: text, tokenizer: made}, params: {layers: 1, width: 16, heads: 2}}
  distilled:
    operator: distill
    inputs: {teacher: tuned, student: student, data: text}
    method: {name: forward_kl}
    params: {length: 16, batch_size: 2}
  fitted: {operator: prepare, inputs: {data: text}}
"""


class Blind:
    """Sees nothing."""

    def check(self, artifact):
        return None

    def pin(self, artifact):
        return artifact


def test_models_that_steps_will_make_are_known_by_their_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = STEPS.replace("teacher: tuned", "teacher: made")
    catalog = Catalog()
    asked = Footprints(load(text, catalog=catalog), Blind(), catalog)
    made, tuned, distilled = (asked.of(n) for n in ("made", "tuned", "distilled"))
    assert made.gradients == made.parameters - 32 > tuned.gradients > 0  # rotary embeddings turn by 8 numbers
    assert tuned.parameters == made.parameters + tuned.gradients  # the adapter comes on top
    assert distilled.teacher == made.parameters > distilled.parameters
    assert asked.of("fitted") is None
    assert isinstance(asked._stand_in("tuned"), Model)
