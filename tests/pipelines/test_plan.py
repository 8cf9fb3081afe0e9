"""What decides a fingerprint, and what does not."""

from dataclasses import replace

import pytest

from operators.artifact import Dataset
from operators.catalog import Catalog
from operators.code import Code, bring
from pipelines import source
from pipelines.plan import InputProblem, PlanError, plan, survey
from pipelines.spec import load, parsed
from pipelines.text import Text

OWN = '''
"""A module."""
import near
from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace

@operator(starts_workers=True)
def make(work: Workspace, *, data: Dataset, size: int = 1) -> Dataset:
    """Make."""
    return near.helper(1)  # a comment
'''
NEAR = "import numpy\n\ndef helper(x):\n    return x\n"
TEXT = """
inputs: {text: {dataset: t}}
steps:
  a: {operator: make, inputs: {data: text}}
  b: {operator: make, inputs: {data: a}, params: {size: 2}}
  c: {operator: make, inputs: {data: text}, params: {size: 3}}
"""


class Eyes:
    """Sees what it is told."""

    def __init__(self, digest="d1", missing=()):
        self.digest, self.missing = digest, missing

    def check(self, artifact):
        if artifact.uri in self.missing:
            raise InputProblem(artifact.uri, "is not there", "Check the path.")

    def pin(self, artifact):
        return replace(artifact, digest=self.digest)


def fingerprints(*changes, own=OWN, near=NEAR, digest="d1", until=""):
    code = Code(("own.py",), (("own.py", own), ("near.py", near)))
    catalog = Catalog(bring(code))
    made = plan(load(TEXT, catalog=catalog, code=code, changes=changes), Eyes(digest), catalog, until=until)
    return {n: s.fingerprint for n, s in made.steps.items()}


def changed(**different):
    before, after = fingerprints(), fingerprints(*different.pop("changes", ()), **different)
    return {n for n in before if before[n] != after[n]}


def test_a_parameter_changes_its_step_and_what_follows():
    assert changed(changes=["a.size=9"]) == {"a", "b"}
    assert changed(changes=["c.size=9"]) == {"c"}


def test_an_inputs_content_changes_everything_made_of_it():
    assert changed(digest="d2") == {"a", "b", "c"}


def test_code_counts_and_comments_and_docstrings_do_not():
    assert changed(own=OWN.replace("helper(1)", "helper(2)")) == {"a", "b", "c"}
    assert changed(own=OWN.replace("# a comment", "# another").replace('"""Make."""', '"""Made."""')) == set()


def test_code_that_the_users_code_imports_counts():
    assert changed(near=NEAR.replace("return x", "return -x")) == {"a", "b", "c"}


def test_the_version_of_a_library_counts(monkeypatch):
    before = fingerprints()
    monkeypatch.setattr(source, "version_of", lambda top: "0.0.0-other")
    assert set(before.values()).isdisjoint(fingerprints().values())


def test_resources_do_not_count_but_the_accelerator_does():
    assert changed(changes=["a.workers=2", "a.cpus_per_worker=4", "a.memory=1000"]) == set()
    assert changed(changes=["a.accelerator=gpu", "a.gpus_per_worker=1"]) == {"a", "b"}


def test_what_was_not_hashed_stays_unknown_and_so_does_what_follows():
    assert set(fingerprints(digest="").values()) == {""}


def test_until_leaves_out_what_the_step_does_not_need():
    assert list(fingerprints(until="a")) == ["a"]
    with pytest.raises(PlanError, match=r"no step is called 'bb'. Did you mean 'b'"):
        fingerprints(until="bb")


def test_inputs_that_nothing_uses_are_not_looked_at():
    text = "inputs: {text: {dataset: t}, other: {dataset: gone}}\nsteps: {a: {operator: make, inputs: {data: text}}}"
    code = Code(("own.py",), (("own.py", OWN), ("near.py", NEAR)))
    catalog = Catalog(bring(code))
    spec = load(text, catalog=catalog, code=code)
    assert survey(spec, Eyes(missing=("gone",)), catalog) == []
    (problem,) = survey(spec, Eyes(missing=("t",)), catalog)
    assert str(problem) == "input 'text': 't' is not there. Check the path."
    assert survey(spec, Eyes(missing=("gone",)), catalog, besides={"other"}) != []
    assert isinstance(spec.inputs["text"], Dataset)


FORESEEING = '''
from operators.artifact import Dataset, Model
from operators.base import operator
from operators.workspace import Workspace

def problems(*, data, model, size, resources, kinds):
    yield f"size={size}, expected {None if data is None else data.uri} and {None if model is None else model.uri}."
    yield f"data: {[k.__name__ for k in kinds['data']]} and {'model' in kinds}."
    yield "nothing of this step by name."
    if size == 3:
        raise TypeError("a mistake of its author's")

@operator(problems=problems)
def look(work: Workspace, *, data: Dataset, model: Model | None = None, size: int = 1) -> Dataset:
    """Look."""
'''


def foreseen(steps, code=None):
    code = code or Code(("own.py",), (("own.py", FORESEEING),))
    catalog = Catalog(bring(code))
    text = Text(f"inputs: {{here: {{dataset: d}}, model: {{model: m}}}}\nsteps:\n{steps}", "p.yaml")
    draft = parsed(text, catalog=catalog, code=code)

    class Sees(Eyes):
        def check(self, artifact):
            return artifact

    return draft.places.sentences([*draft.problems, *survey(draft.spec, Sees(), catalog)])


def test_what_an_operator_foresees_is_said_of_the_part_that_it_begins_with():
    assert foreseen("  a:\n    operator: look\n    inputs:\n      data: here\n    params:\n      size: 2\n") == (
        "p.yaml:3 step 'a': nothing of this step by name.",
        "p.yaml:6 step 'a': data: ['Dataset'] and False.",
        "p.yaml:8 step 'a': size=2, expected d and None.",
    )


def test_an_operator_hears_the_kind_of_what_another_step_will_make():
    said = foreseen("  a: {operator: look, inputs: {data: here}}\n  b: {operator: look, inputs: {data: a}}\n")
    assert "p.yaml:4 step 'b': data: ['Dataset'] and False." in said
    assert "p.yaml:4 step 'b': size=1, expected None and None." in said


def test_a_step_that_takes_what_a_broken_step_makes_is_asked_all_the_same():
    said = foreseen("  a: {operator: lok, inputs: {data: here}}\n  b: {operator: look, inputs: {data: a}}\n")
    assert any("'lok'" in line for line in said)
    assert "p.yaml:4 step 'b': data: ['Artifact'] and False." in said


@pytest.mark.parametrize(
    ("asked", "only"),
    [("workers: 2", "starts no workers, expected 1"), ("strategy: ddp", "trains nothing, expected 'single'")],
)
def test_a_step_that_trains_nothing_is_refused_what_it_would_not_use(asked, only):
    said = foreseen(f"  a:\n    operator: look\n    inputs: {{data: here}}\n    resources: {{{asked}}}\n")
    assert any(f"for 'look', which {only}. Leave it out." in line for line in said)


def test_an_operator_is_asked_about_nothing_of_another_kind_than_it_takes():
    first, second, *_ = foreseen("  a: {operator: look, inputs: {data: model, model: here}}\n")
    assert first == "p.yaml:3 step 'a': data='model' is a model, expected a dataset."
    assert second == "p.yaml:3 step 'a': model='here' is a dataset, expected a model."
    assert (
        "size=1, expected None and None." in foreseen("  a: {operator: look, inputs: {data: model, model: here}}\n")[-3]
    )


def test_a_mistake_in_what_a_users_operator_foresees_is_a_sentence_with_its_line():
    said = foreseen("  a: {operator: look, inputs: {data: here}, params: {size: 3}}\n")
    assert said == ("p.yaml:3 step 'a': own.py:11: TypeError: a mistake of its author's. Correct it.",)


ENSEMBLE = """
inputs: {one: {model: a}, two: {model: b}, text: {dataset: t}}
steps:
  both: {operator: ensemble, inputs: {members: [one, two]}, method: {name: output}}
  measured: {operator: evaluate, inputs: {model: both, data: {text: text}}}
  passed:
    operator: gate
    inputs: {model: both, results: {m: measured}}
    params: {require: [{better: m, than: 9, on: text}]}
  student: {operator: distill, inputs: {teacher: passed, student: one, data: text}, method: {name: forward_kl}}
  merged: {operator: merge, inputs: {base: one, experts: [student, two]}, method: {name: linear}}
"""


def test_a_model_made_of_several_is_refused_where_a_plain_one_is_needed_whoever_hands_it_on(tmp_path):
    assert survey(load(ENSEMBLE), Eyes(), Catalog()) == []
    (problem,) = survey(load(ENSEMBLE.replace("[student, two]", "[student, passed]")), Eyes(), Catalog())
    assert str(problem).endswith(
        "experts: 'passed' is an ensemble, expected a plain model for 'merge'. Give one of its models, or what was "
        "distilled from it."
    )
    (tmp_path / "config.json").write_text("{}")

    class Finds(Eyes):
        def check(self, artifact):
            return replace(artifact, uri=str(tmp_path)) if artifact.uri == "b" else None

    named = """
inputs: {two: {model: b}, change: {delta: c}}
steps:
  named: {operator: register, inputs: {model: two}, params: {name: x}}
"""
    changed = f"{named}  other: {{operator: apply, inputs: {{model: named, delta: change}}}}"
    for said, expected in (("{}", 0), ('{"network": {}}', 0), ('{"rewrites": []}', 1)):
        (tmp_path / "lfm.json").write_text(said)
        assert survey(load(named), Finds(), Catalog()) == []
        assert len(survey(load(changed), Finds(), Catalog())) == expected


def test_who_may_be_given_such_a_model_depends_on_the_methods_that_make_it_and_nobody_else():
    made = plan(load(ENSEMBLE), Eyes(), Catalog())
    reads = {n for n, s in made.steps.items() if "lfm.ensembling.wemoe" in s.components["source"]}
    assert reads == {"measured", "passed", "student"}
