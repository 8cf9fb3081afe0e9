"""`lfm methods`: what it says of each method, and that a plan goes by what methods say they need."""

import json
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

import lfm
from operators.catalog import Catalog
from operators.code import Code, bring
from pipelines.__main__ import main
from pipelines.plan import survey
from pipelines.spec import parsed
from pipelines.text import Text

WORDS = ("integer", "number", "boolean", "string", "list of ", "none", "'", *"0123456789")
ALONE = '''
"""A method of one's own that two processes cannot share by parts."""

from dataclasses import dataclass

from lfm.method import Needs
from lfm.tuning.base import Tune


@dataclass(frozen=True, kw_only=True, slots=True)
class Alone(Tune):
    """Second order."""

    reference, area, leaf = "https://example.org", "tuning", "base"
    gives = "model"
    needs = Needs(access="gradients", data="labelled", strategies=("single", "ddp"))

    def attach(self, model, inject):
        model.requires_grad_(True)
'''
PIPELINE = """
uses: [alone.py]
inputs: {model: {model: m}, data: {dataset: d}}
steps:
  tuned:
    operator: tune
    inputs: {model: model, data: data}
    method: {name: METHOD}
    resources: {workers: 2, strategy: STRATEGY}
"""


def listed(capsys, *words):
    assert main(["methods", *words, "--json"]) == 0
    return {m["name"]: m for m in json.loads(capsys.readouterr().out)}


def test_every_method_is_told_with_all_that_there_is_to_know_of_it(capsys):
    found = listed(capsys)
    assert tuple(sorted(found)) == lfm.names()
    for name, said in found.items():
        method = lfm.find(name)
        assert said["family"] == name.partition("/")[0]
        assert (said["class"], said["area"], said["leaf"]) == (method.__name__, method.area, method.leaf)
        assert said["reference"] == method.reference
        assert said["about"].endswith((".", ":"))
        assert said["needs"]["access"] == method.needs.access
        assert said["needs"]["models"] == list(method.needs.models)
        assert said["needs"].keys() == set(type(method.needs).__dataclass_fields__)
        defaults = {f["name"]: f["default"] for f in said["fields"]}
        assert TypeAdapter(method).validate_python(defaults) == method(), "its defaults make the default"
        for field in said["fields"]:
            assert field.keys() == {"name", "type", "range", "default"}
            assert field["type"].startswith(WORDS), field
            assert field["range"], field


def test_ranges_types_and_defaults_are_those_of_the_fields(capsys):
    merging = listed(capsys, "merging")
    ties = {f["name"]: f for f in merging["merging/ties"]["fields"]}
    assert ties["density"] == {"name": "density", "type": "number", "range": "0 < density <= 1", "default": 0.2}
    assert ties["weights"]["type"] == "list of number | none"
    assert ties["weights"]["default"] is None
    assert ties["convention"]["type"] == "'paper' | 'mergekit' | 'peft' | 'fusion_bench'"
    fisher = merging["merging/fisher"]
    assert fisher["needs"]["statistics"] == ["fisher"]
    assert {f["name"]: f["range"] for f in fisher["fields"]}["floor"] == "floor > 0"
    assert {f["name"]: f["range"] for f in fisher["fields"]}["normalize"] == "any boolean"
    lora = {f["name"]: f for f in listed(capsys, "tuning")["tuning/lora"]["fields"]}
    assert lora["rank"] == {"name": "rank", "type": "integer", "range": "rank >= 1", "default": 8}
    assert lora["targets"]["type"] == "list of string | string"


def test_the_table_goes_by_the_survey_and_has_every_method(capsys):
    assert main(["methods"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:4] == ["method", "class", "leaf", "reference"]
    assert sorted(r.split()[0] for r in rows[1:]) == sorted(lfm.names())
    ordered = [(lfm.find(r.split()[0]).area, lfm.find(r.split()[0]).leaf) for r in rows[1:]]
    assert ordered == sorted(ordered)


class Eyes:
    """Sees nothing of what comes from outside."""

    def check(self, artifact):
        return None

    def pin(self, artifact):
        return replace(artifact, digest="d")


@pytest.mark.parametrize(
    ("method", "strategy", "said"),
    [
        ("alone", "zero2", ["Alone: strategy='zero2', expected one of single, ddp. It cannot share a model that way."]),
        ("alone", "ddp", []),
        ("full", "zero3", []),
    ],
)
def test_a_plan_refuses_a_strategy_that_the_method_cannot_use(method, strategy, said):
    code = Code(("alone.py",), (("alone.py", ALONE),))
    catalog = Catalog(bring(code))
    text = PIPELINE.replace("METHOD", method).replace("STRATEGY", strategy)
    draft = parsed(Text(text, "p.yaml"), catalog=catalog, code=code)
    assert draft.problems == ()
    problems = survey(draft.spec, Eyes(), catalog)
    assert [p.sentence for p in problems] == said
    assert {p.path for p in problems} <= {("steps", "tuned", "method")}
