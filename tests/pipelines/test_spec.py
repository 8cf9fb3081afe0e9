"""What a pipeline's text means, and every way in which it can be wrong."""

import json

import pytest
import yaml

from lfm.merging.base import Merge
from operators.artifact import Dataset, Model
from operators.base import operator
from operators.catalog import Catalog
from operators.code import Code, bring
from pipelines.problems import Places, SpecError
from pipelines.spec import build, dump, load, parsed, trace
from pipelines.text import Text

OWN = '''
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from lfm.errors import HyperparameterError
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
    least: int = 0
    most: int = 9
    def __post_init__(self) -> None:
        self.require(self.max_steps >= 0, "max_steps", "max_steps >= 0")
        self.require(self.least <= self.most, "least", "least <= most")

@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One of several."""
    better: str
    than: str
    def __post_init__(self) -> None:
        if self.better == self.than:
            raise HyperparameterError("rule", "than", self.than, "another")

@operator()
def train(
    work: Workspace, *, model: Model, data: Dataset, held_out: Dataset | None = None, method: Family, pace: Pace,
    note: str = "", mood: Literal["good", "bad"] = "good", scales: float | tuple[float, ...] = 1.0,
    rules: Sequence[Rule] = (),
) -> Model:
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

    fast = {"max_steps": 5, "learning_rate": 1e-4}

    def small_expert(base=Model("hf://a/b"), chat=Dataset("chat.jsonl")):
        one = module.train("one", model=base, data=chat, method=module.OwnMethod(rank=4, alpha=32), **fast)
        two = module.train("two", model=base, data=chat, method=module.OwnMethod())
        merged = module.blend("merged", base=base, experts=[one, two])
        return module.weigh("weights", model=merged, data={"talk": chat})

    written = load(GOOD, catalog=catalog, code=code)
    assert trace(small_expert, catalog=catalog, code=code) == written
    assert {k: written.steps["one"].params[k] for k in ("max_steps", "learning_rate", "note")} == {**fast, "note": ""}
    assert type(written.steps["one"].method.alpha) is float, "32 and 32.0 have to be hashed alike"


def test_a_dumped_spec_is_built_again_equal(own):
    _, catalog, code = own
    spec = load(GOOD, catalog=catalog, code=code)
    raw = json.loads(json.dumps({k: v for k, v in dump(spec).items() if k != "uses"}))
    again = build(raw, Places("again"), catalog=catalog, code=code)
    assert again.problems == ()
    assert again.whole() == spec
    assert load(yaml.safe_dump(dump(spec)), catalog=catalog, code=code) == spec


def problems_of(text, catalog, *changes):
    with pytest.raises(SpecError) as caught:
        load(text, source="p.yaml", catalog=catalog, changes=changes)
    return caught.value.problems


def test_every_problem_is_reported_at_once_and_once_in_the_order_of_the_file(own):
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
    params: {max_steps: -1, learning_rate: fast}
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
    resources: {worker: 2}
  eight: {}
"""
    assert problems_of(text.replace("  eight: {}\n", ""), own[1]) == (
        "p.yaml:5 input 'odd': the kind 'modle', expected one of model, adapter, delta, statistics, editor, memory, "
        "datastore, dataset, metrics, deployment. Did you mean 'model'?",
        "p.yaml:8 step 'one': No operator is called 'trian'. Did you mean 'train' or 'pretrain'?",
        "p.yaml:11 step 'two': no input or step is called 'bse'. Did you mean 'base'?",
        "p.yaml:12 step 'two': No own method is called 'own_methd'. Did you mean 'own_method'?",
        "p.yaml:15 step 'three': model='chat' is a dataset, expected a model.",
        "p.yaml:16 step 'three': OwnMethod has no field 'rnk'. Did you mean 'rank'?",
        "p.yaml:20 step 'four': OwnMethod: rank=0, expected rank >= 1.",
        "p.yaml:21 step 'four': 'train' has no parameter 'max_stps'. Did you mean 'max_steps'?",
        "p.yaml:24 step 'five': 'train' needs the input 'data'. Write it below 'inputs:'.",
        "p.yaml:26 step 'five': train: learning_rate='fast', expected a number.",
        "p.yaml:26 step 'five': train: max_steps=-1, expected max_steps >= 0.",
        "p.yaml:29 step 'six': model='chat' is a dataset, expected a model.",
        "p.yaml:31 step 'seven': the steps form a cycle: seven -> eight -> seven, expected an order. "
        "Take one of these inputs out.",
        "p.yaml:37 step 'eight': resources has no field 'worker'. Did you mean 'workers'?",
    )
    again = "p.yaml:38: the key 'eight' stands twice, first in line 34, expected once. Take one of them out."
    assert again in problems_of(text, own[1])


STEPS = """inputs: {base: {model: m}, chat: {dataset: d}}
steps:
  a:
    operator: train
    inputs: {model: base, data: chat}
    method: {name: own_method}
"""
AFTER = "p.yaml:7 step 'a': "
ENDS = "1 <= fewest <= most"
MOVE = "Move it there."


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("params: {learning_rate: fast}", [f"{AFTER}train: learning_rate='fast', expected a number."]),
        ("params: {max_steps: 2.5}", [f"{AFTER}train: max_steps=2.5, expected an integer."]),
        ("params: {max_steps: [1]}", [f"{AFTER}train: max_steps=[1], expected an integer."]),
        ("params: {max_steps: null}", [f"{AFTER}train: max_steps=None, expected an integer."]),
        ("params: {note: 3}", [f"{AFTER}train: note=3, expected a string."]),
        ("params: {mood: sad}", [f"{AFTER}train: mood='sad', expected 'good' or 'bad'."]),
        ("params: {scales: soft}", [f"{AFTER}train: scales='soft', expected a number or a list."]),
        ("params: {scales: [1, soft]}", [f"{AFTER}train: scales.1='soft', expected a number."]),
        ("params: {rules: [{better: x}]}", [f"{AFTER}train needs rules.0.than."]),
        ("params: {rules: [{better: 1, than: y}]}", [f"{AFTER}train: rules.0.better=1, expected a string."]),
        ("params: {rules: [{better: x, than: x}]}", [f"{AFTER}train: rules.0.than='x', expected another."]),
        ("params: {learning_rate: .nan}", [f"{AFTER}train: learning_rate=nan, expected a finite number."]),
        ("params: {scales: [1.0, -.inf]}", [f"{AFTER}train: scales=[1.0, -inf], expected a finite number."]),
        (
            f"params: {{max_steps: {2**63}}}",
            [f"{AFTER}train: max_steps={2**63}, expected an integer of at most 64 bits."],
        ),
        (
            "params: {max_steps: yes}",
            [f"{AFTER}train: max_steps=True, expected an integer. YAML reads yes, no, on and off as true and false."],
        ),
        (
            "params: {scales: [on, 1.0]}",
            [f"{AFTER}train: scales.0=True, expected a number. YAML reads yes, no, on and off as true and false."],
        ),
        ("params: [3]", [f"{AFTER}params: [3], expected a mapping. Write it as params: {{name: value}}."]),
        ("params: {rank: 3}", [f"{AFTER}'rank' stands in the wrong place, expected it below 'method:'. {MOVE}"]),
        ("max_steps: 3", [f"{AFTER}'max_steps' stands in the wrong place, expected it below 'params:'. {MOVE}"]),
        ("param: {}", [f"{AFTER}unknown key 'param'. Did you mean 'params'?"]),
        ("resources: 2", [f"{AFTER}resources: 2, expected a mapping. Write it as resources: {{name: value}}."]),
        ("resources: {workers: 0}", [f"{AFTER}resources: workers=0, expected workers >= 1."]),
        ("resources: {workers: [4, 1]}", [f"{AFTER}resources: workers=(4, 1), expected two numbers, {ENDS}."]),
        ("resources: {workers: [2]}", [f"{AFTER}resources: workers=(2,), expected two numbers, {ENDS}."]),
        ("resources: {workers: [1, many]}", [f"{AFTER}resources: workers.1='many', expected an integer."]),
        ("resources: {memory: 8GB}", [f"{AFTER}resources: memory='8GB', expected an integer."]),
        (
            "resources: {strategy: dpp}",
            [f"{AFTER}resources: strategy='dpp', expected 'single', 'ddp', 'zero1', 'zero2' or 'zero3' or 'auto'."],
        ),
        (
            "resources: {workers: 0, memory: -1}",
            [
                f"{AFTER}resources: workers=0, expected workers >= 1.",
                f"{AFTER}resources: memory=-1, expected bytes, memory >= 0.",
            ],
        ),
        # What is wrong with one field says nothing yet of those whose range depends on it.
        ("params: {most: 2, least: 3}", [f"{AFTER}train: least=3, expected least <= most."]),
        ("params: {most: many, least: 3}", [f"{AFTER}train: most='many', expected an integer."]),
    ],
)
def test_a_value_that_is_not_right_is_named_with_what_would_be(own, last, said):
    assert list(problems_of(f"{STEPS}    {last}\n", own[1])) == said


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("operator: train", "operator:", "4 step 'a': no operator, expected one of align, apply, barrier"),
        (
            "operator: train",
            "operator: [train]",
            "4 step 'a': operator: ['train'], expected one of align, apply, barrier",
        ),
        ("model: base", "model: 3", "5 step 'a': model=3, expected the name of an input or a step."),
        ("model: base", "model: [base]", "5 step 'a': model=['base'], expected the name of an input or a step."),
        ("model: base", "model: a", "3 step 'a': the steps form a cycle: a -> a, expected an order."),
        ("{model: base, data: chat}", "[base]", "5 step 'a': inputs: ['base'], expected a mapping."),
        ("data: chat", "data: chat, dat: x", "5 step 'a': 'train' has no input 'dat'. Did you mean 'data'?"),
        ("{name: own_method}", "own_method", "6 step 'a': method: 'own_method', expected {name: ...} with one of own_"),
        ("{name: own_method}", "{name: [x]}", "6 step 'a': method: {'name': ['x']}, expected {name: ...} with one of"),
        ("method: {name: own_method}", "params: {}", "3 step 'a': no method, expected {name: ...} with one of own_"),
        ("{model: m}", "{model: }", "1 input 'base': model: None, expected a path or a URI as text."),
        ("{model: m}", "{model: 3}", "1 input 'base': model: 3, expected a path or a URI as text."),
        ("{model: m}", "m", "1 input 'base': 'm', expected one pair such as {model: URI}."),
        ("chat: {d", "te xt: {d", "1 input 'te xt': the name 'te xt', expected letters, digits, '_' and '-'"),
        ("  a:", "  1 a:", "3 step '1 a': the name '1 a', expected letters, digits, '_' and '-', a letter first."),
        ("  a:", "  base:", "3 step 'base': an input has this name too, expected one for each. Rename one of them."),
        ("steps:", "name: a/b\nsteps:", "2: name: 'a/b', expected letters, digits, '.', '_' and '-', at most 100"),
        ("steps:", "step: {}\nsteps:", "2: unknown key 'step', expected one of name, uses, inputs, steps. Did you"),
        ("steps:", "uses: my.py\nsteps:", "2: uses: 'my.py', expected a list of Python files. Write uses: [my.py]."),
        ("steps:", "uses: [../x.py]\nsteps:", "2: uses: '../x.py', expected the path of a .py file beside the"),
        ("steps:", "uses: [3]\nsteps:", "2: uses: 3, expected the path of a .py file beside the pipeline"),
    ],
)
def test_a_part_that_has_the_wrong_form_is_one_problem(own, before, after, said):
    assert before in STEPS
    found = problems_of(STEPS.replace(before, after, 1), own[1])
    assert found[0].startswith(f"p.yaml:{said}")
    spurious = [p for p in found[1:] if "no input or step is called 'base'" not in p and "'chat'" not in p]
    assert spurious == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "p.yaml:1: empty, expected a pipeline. Write 'steps:' and the steps below it."),
        ("# nothing\n", "p.yaml:1: empty, expected a pipeline. Write 'steps:' and the steps below it."),
        ("- a\n- b\n", "p.yaml:1: ['a', 'b'], expected a mapping. Write 'steps:' and the steps below it."),
        ("\nhello\n", "p.yaml:2: 'hello', expected a mapping. Write 'steps:' and the steps below it."),
        ("name: x\n", "p.yaml:1: no steps, expected at least one. Write it below 'steps:'."),
        ("steps:\n", "p.yaml:1: no steps, expected at least one. Write it below 'steps:'."),
        ("steps: [a]\n", "p.yaml:1: steps: ['a'], expected a mapping. Write each as NAME: and its keys."),
        ("steps: {a: }\n", "p.yaml:1 step 'a': None, expected operator, inputs, method, params, resources. "
         "Write them below the name."),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_pipeline_is_one_problem(text, said):
    assert problems_of(text, Catalog()) == (said,)


def test_a_method_of_ones_own_that_is_not_finished_is_refused_by_what_it_lacks():
    own = '''
from dataclasses import dataclass
from lfm.merging.base import Merge

@dataclass(frozen=True, kw_only=True, slots=True)
class NoBody(Merge):
    """Lacks merge."""

class Plain(Merge):
    """Is no dataclass."""
    def merge(self, name, base, experts, found):
        return base

@dataclass(frozen=True, kw_only=True, slots=True)
class Angry(Merge):
    """Raises what no field is to blame for."""
    mood: int = 0
    def __post_init__(self):
        if self.mood == 1:
            raise ValueError("mood and weather do not match")
        if self.mood == 2:
            {}["weather"]
    def merge(self, name, base, experts, found):
        return base
'''
    code = Code(("own.py",), (("own.py", own),))
    catalog = Catalog(bring(code))
    text = "inputs: {m: {model: m}}\nsteps:\n" + "".join(
        f"  {s}: {{operator: merge, inputs: {{base: m, experts: [m]}}, method: {m}}}\n"
        for s, m in (("a", "{name: no_body}"), ("b", "{name: plain}"), ("c", "{name: angry, mood: 1}"),
                     ("d", "{name: angry, mood: 2}"))
    )  # fmt: skip
    with pytest.raises(SpecError) as caught:
        load(text, source="p.yaml", catalog=catalog, code=code)
    assert caught.value.problems == (
        "p.yaml:3 step 'a': NoBody has no merge, which its family asks for. Define it.",
        "p.yaml:4 step 'b': Plain is a plain class, expected a dataclass. "
        "Write @dataclass(frozen=True, kw_only=True, slots=True) above it.",
        "p.yaml:5 step 'c': Angry: mood and weather do not match.",
        "p.yaml:6 step 'd': own.py:22: KeyError: 'weather'. Correct it.",
    )


def test_every_cycle_is_named_once(own):
    text = "inputs: {base: {model: m}}\nsteps:\n" + "".join(
        f"  {a}: {{operator: blend, inputs: {{base: base, experts: [{b}]}}}}\n"
        for a, b in ("ab", "ba", "cd", "dc", "ea")
    )
    one, two = problems_of(text, own[1])
    assert one.startswith("p.yaml:3 step 'a': the steps form a cycle: a -> b -> a, expected an order.")
    assert two.startswith("p.yaml:5 step 'c': the steps form a cycle: c -> d -> c, expected an order.")


def test_an_input_that_may_be_left_out_may_be_null(own):
    text = STEPS.replace("data: chat", "data: chat, held_out: null")
    assert load(text, catalog=own[1]) == load(STEPS, catalog=own[1])


def test_a_long_value_is_cut_short_where_a_message_quotes_it(own):
    (problem,) = problems_of(f"{STEPS}    params: {{max_steps: {'x' * 10_000}}}\n", own[1])
    assert len(problem) < 300


def test_what_a_broken_step_asks_for_and_takes_is_known_nevertheless(own):
    text = Text(f"{STEPS}    params: {{max_steps: x}}\n    resources: {{memory: 5}}\n", "p.yaml")
    draft = parsed(text, catalog=own[1])
    assert (draft.names, draft.spec.steps) == (("a",), {})
    assert draft.asks["a"].memory == 5
    assert draft.taken == {"base", "chat"}


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("one.rnk=1", ": the step has no field 'rnk'. Did you mean 'rank'?"),
        ("oen=2", ": no input or step is called 'oen'. Did you mean 'one'?"),
        ("oen.rank=2", ": no input or step is called 'oen'. Did you mean 'one'?"),
        ("one", ": expected NAME=VALUE or STEP.FIELD=VALUE. Write both sides of '='."),
        ("one=", ": expected NAME=VALUE or STEP.FIELD=VALUE. Write both sides of '='."),
        ("one.=3", ": expected NAME=VALUE or STEP.FIELD=VALUE. Write both sides of '='."),
        ("=3", ": expected NAME=VALUE or STEP.FIELD=VALUE. Write both sides of '='."),
        ("base.rank=3", ": 'base' is an input, expected a step before the dot. Write base=URI."),
        ("one.rank=[", ": the value '[' is not YAML, expected a value. Put quotes around it."),
        ("one.max_steps=fast", " step 'one': train: max_steps='fast', expected an integer."),
        ("one.params.max_stps=3", " step 'one': 'train' has no parameter 'max_stps'. Did you mean 'max_steps'?"),
        ("merged.resources.workers=0", " step 'merged': resources: workers=0, expected workers >= 1."),
        ("merged.method.rank=3", " step 'merged': 'blend' takes no method, expected none. Take it out."),
        ("one.inputs.model=bse", " step 'one': no input or step is called 'bse'. Did you mean 'base'?"),
    ],
)
def test_what_is_wrong_with_a_change_is_said_of_the_change(own, change, said):
    assert problems_of(GOOD, own[1], change) == (f"--set {change}{said}",)


@pytest.mark.parametrize(
    "text",
    [
        "steps: none\n",
        "steps: {one: none}\n",
        "steps: {one: {operator: train, params: [3]}}\n",
        "steps: {one: {operator: train, inputs: 3}, two: {operator: train, inputs: {model: [[x]]}}}\n",
    ],
)
@pytest.mark.parametrize("change", ["one.max_steps=3", "one.params.max_steps=3", "one=/models/x"])
def test_a_change_of_what_has_the_wrong_form_is_no_problem_of_its_own(own, text, change):
    draft = parsed(Text(text, "p.yaml"), catalog=own[1], changes=[change])
    assert draft.problems
    assert not any(p.option for p in draft.problems)


def test_an_input_without_default_is_refused(own):
    def lonely(base):
        return base

    with pytest.raises(SpecError, match=r"^test_spec.py:\d+ input 'base': no default, expected one such as Model"):
        trace(lonely)


def test_a_built_in_family_finds_its_methods():
    @operator()
    def mix(work: "Workspace", *, base: Model, method: Merge) -> Model:
        """Mix."""

    assert mix.family is Merge
    assert set(Catalog().methods(Merge)) >= set()


from operators.workspace import Workspace  # noqa: E402  the annotation above is read when `mix` is declared
