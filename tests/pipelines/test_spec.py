"""What a pipeline's text means, and every way in which it can be wrong."""

import json

import pytest
import yaml

from lfm.merging.base import Merge
from operators.artifact import Dataset, Model
from operators.base import operator
from operators.catalog import Catalog
from operators.code import Code, bring
from pipelines.spec import SpecError, build, dump, load, trace

OWN = '''
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operators.artifact import Adapter, Dataset, Model
from operators.base import Settings, operator
from operators.workspace import Workspace
from lfm.method import Method

class Family(Method):
    """A family."""

@dataclass(frozen=True, kw_only=True, slots=True)
class OwnMethod(Family):
    """A method."""
    rank: int = 8
    alpha: float = 16.0
    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "rank >= 1")

@dataclass(frozen=True, kw_only=True, slots=True)
class Pace(Settings):
    """Settings."""
    max_steps: int = 10
    learning_rate: float = 1e-3
    def __post_init__(self) -> None:
        self.require(self.max_steps >= 0, "max_steps", "max_steps >= 0")

@operator()
def train(work: Workspace, *, model: Model, data: Dataset, method: Family, pace: Pace, note: str = "") -> Model:
    """Train."""

@operator()
def blend(work: Workspace, *, base: Model, experts: Sequence[Model | Adapter]) -> Model:
    """Blend."""

@operator()
def weigh(work: Workspace, *, model: Model, data: Mapping[str, Dataset]) -> Dataset:
    """Weigh."""
'''

GOOD = """
name: small-expert
inputs:
  base: {model: "hf://a/b"}
  chat: {dataset: chat.jsonl}
steps:
  one:
    operator: train
    inputs: {model: base, data: chat}
    method: {name: own_method, rank: 4, alpha: 32}
    params: {max_steps: 5, learning_rate: 1e-4}
  two:
    operator: train
    inputs: {model: base, data: chat}
    method: {name: own_method}
  merged:
    operator: blend
    inputs: {base: base, experts: [one, two]}
  weights:
    operator: weigh
    inputs: {model: merged, data: {talk: chat}}
"""


@pytest.fixture
def own():
    code = Code(("own.py",), (("own.py", OWN),))
    return bring(code)[0], Catalog(bring(code)), code


def test_yaml_and_python_give_the_same_spec(own):
    _, catalog, code = own
    module = catalog.modules[0]

    def small_expert(base=Model("hf://a/b"), chat=Dataset("chat.jsonl")):
        fast = {"max_steps": 5, "learning_rate": 1e-4}
        one = module.train("one", model=base, data=chat, method=module.OwnMethod(rank=4, alpha=32), **fast)
        two = module.train("two", model=base, data=chat, method=module.OwnMethod())
        merged = module.blend("merged", base=base, experts=[one, two])
        return module.weigh("weights", model=merged, data={"talk": chat})

    written = load(GOOD, catalog=catalog, code=code)
    assert trace(small_expert, catalog=catalog, code=code) == written
    assert written.steps["one"].params == {"max_steps": 5, "learning_rate": 1e-4, "note": ""}
    assert type(written.steps["one"].method.alpha) is float, "32 and 32.0 have to be hashed alike"


def test_a_dumped_spec_is_built_again_equal(own):
    _, catalog, code = own
    spec = load(GOOD, catalog=catalog, code=code)
    raw = json.loads(json.dumps({k: v for k, v in dump(spec).items() if k != "uses"}))
    again, problems = build(raw, "again", catalog=catalog, code=code)
    assert problems == []
    assert again == spec
    assert load(yaml.safe_dump(dump(spec)), catalog=catalog, code=code) == spec


def problems_of(text, catalog, *changes):
    with pytest.raises(SpecError) as caught:
        load(text, source="p.yaml", catalog=catalog, changes=changes)
    return caught.value.problems


def test_every_error_is_reported_at_once_with_its_line_and_the_near_name(own):
    text = """name: bad
inputs:
  base: {model: m}
  chat: {dataset: d}
  odd: {modle: m}
steps:
  one:
    operator: trian
  two:
    operator: train
    inputs: {model: bse, data: chat}
    method: {name: own_methd}
  three:
    operator: train
    inputs: {model: chat, data: chat}
    method: {name: own_method, rnk: 2}
  four:
    operator: train
    inputs: {model: base, data: chat}
    method: {name: own_method, rank: 0}
    params: {max_stps: 3}
  five:
    operator: train
    inputs: {model: base}
    method: {name: own_method}
    params: {max_steps: -1}
  six:
    operator: train
    inputs: {model: chat, data: chat}
    method: {name: own_method}
  seven:
    operator: blend
    inputs: {base: base, experts: [eight]}
  eight:
    operator: blend
    inputs: {base: base, experts: [seven]}
  seven:
    operator: blend
"""
    found = "\n".join(problems_of(text, own[1]))
    for expected in (
        "p.yaml:5: input 'odd' is of kind 'modle'. Did you mean 'model'?",
        "p.yaml:8 step 'one': No operator is called 'trian'. Did you mean 'train' or 'pretrain'?",
        "p.yaml:11 step 'two': no input or step is called 'bse'. Did you mean 'base'?",
        "p.yaml:12 step 'two': No own method is called 'own_methd'. Did you mean 'own_method'?",
        "p.yaml:16 step 'three': OwnMethod has no field 'rnk'. Did you mean 'rank'?",
        "p.yaml:20 step 'four': OwnMethod: rank=0, expected rank >= 1.",
        "p.yaml:21 step 'four': unknown key 'max_stps'. Did you mean 'max_steps'?",
        "p.yaml:24 step 'five': 'train' needs the input 'data'.",
        "p.yaml:26 step 'five': train: pace: max_steps=-1, expected max_steps >= 0.",
        "p.yaml:29 step 'six': model='chat' is a dataset, expected a model.",
        "p.yaml:37: the key 'seven' stands twice, first in line 31.",
    ):
        assert expected in found


def test_a_cycle_is_named(own):
    text = """
inputs: {base: {model: m}}
steps:
  a: {operator: blend, inputs: {base: base, experts: [b]}}
  b: {operator: blend, inputs: {base: base, experts: [a]}}
"""
    (problem,) = problems_of(text, own[1])
    assert "the steps form a cycle: " in problem


@pytest.mark.parametrize(
    ("change", "step", "expected"),
    [
        ("one.rank=16", "one", 16),
        ("one.method.rank=16", "one", 16),
        ("one.params.max_steps=7", "one", 7),
        ("one.max_steps=7", "one", 7),
        ("one.learning_rate=1e-5", "one", 1e-5),
        ("one.workers=2", "one", 2),
    ],
)
def test_set_reaches_methods_parameters_and_resources(own, change, step, expected):
    spec = load(GOOD, catalog=own[1], changes=[change])
    chosen = spec.steps[step]
    values = {**chosen.method.hyperparameters(), **chosen.params, "workers": chosen.resources.workers}
    assert expected in values.values()


def test_set_of_a_step_makes_it_an_input_and_drops_what_only_it_needed(own):
    spec = load(GOOD, catalog=own[1], changes=["merged=/models/x"])
    assert spec.inputs["merged"] == Model("/models/x")
    assert list(spec.steps) == ["weights"]


@pytest.mark.parametrize("change", ["one.rnk=1", "oen=2", "one"])
def test_a_wrong_set_is_an_error(own, change):
    (problem, *_) = problems_of(GOOD, own[1], change)
    assert problem.startswith(f"--set {change}: ")


def test_text_that_is_not_yaml_is_named_with_its_line():
    (problem, *_) = problems_of("name: x\nsteps: [", Catalog())
    assert problem.startswith("p.yaml:")
    assert "not YAML" in problem


def test_an_input_without_default_is_refused(own):
    def lonely(base):
        return base

    with pytest.raises(SpecError, match=r"lonely\(base\): no default"):
        trace(lonely)


def test_a_built_in_family_finds_its_methods():
    @operator()
    def mix(work: "Workspace", *, base: Model, method: Merge) -> Model:
        """Mix."""

    assert mix.family is Merge
    assert set(Catalog().methods(Merge)) >= set()


from operators.workspace import Workspace  # noqa: E402  the annotation above is read when `mix` is declared
