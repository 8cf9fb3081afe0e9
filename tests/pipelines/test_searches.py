"""What a plan says of a search: about its space, the steps that it repeats, and what its fingerprint covers."""

from dataclasses import replace

import pytest

from cluster.capacity import Capacity, Node
from lfm.merging.ties import TIES
from operators.artifact import Dataset, Model
from operators.catalog import Catalog
from operators.code import Code, bring
from operators.evaluation import evaluate
from operators.merging import merge
from operators.resources import Resources
from operators.searches.space import Dimension, Objective
from operators.searching import search
from pipelines.estimates import Estimate
from pipelines.lineage import find_run, runs, trial_name, trials
from pipelines.plan import plan, survey
from pipelines.searches import differing, part, repetition, room, varied
from pipelines.spec import load, parsed, trace
from pipelines.text import Text
from pipelines.trial_estimates import trials_estimate
from tests.pipelines import trained
from tests.pipelines.searched import OWN, PIPELINE
from tests.pipelines.test_plan import Eyes

CODE = Code(("sought.py",), (("sought.py", OWN),))
CATALOG = Catalog(bring(CODE))
MERGE = """
inputs: {base: {model: b}, one: {model: o}, other: {model: p}, held: {dataset: d}}
steps:
  merged: {operator: merge, inputs: {base: base, experts: [one, other]}, method: {name: ties, density: 0.2}}
  measured: {operator: evaluate, inputs: {model: merged, data: {text: held}}}
  found:
    operator: search
    inputs: {result: merged, judged: measured}
    params:
      space: {merged.density: {uniform: [0.1, 1.0]}}
      objectives: [{on: text, measure: loss, direction: minimize}]
"""


def said(*changes, text=PIPELINE, catalog=CATALOG, code=CODE):
    draft = parsed(Text(text, "p.yaml"), catalog=catalog, code=code, changes=changes)
    return [p.sentence for p in (*draft.problems, *survey(draft.spec, Eyes(), catalog))]


def of_merge(*changes):
    return said(*changes, text=MERGE, catalog=Catalog(), code=Code())


def spec(*changes):
    return load(PIPELINE, catalog=CATALOG, code=CODE, changes=changes)


def in_python(
    base=Model("b"), one=Model("o"), other=Model("p"), held=Dataset("d")  # the same as `MERGE`
):  # fmt: skip
    merged = merge("merged", base=base, experts=[one, other], method=TIES(density=0.2))
    measured = evaluate("measured", model=merged, data={"text": held})
    return search(
        "found",
        result=merged,
        judged=measured,
        space={"merged.density": Dimension(uniform=(0.1, 1))},
        objectives=[Objective(on="text", measure="loss", direction="minimize")],
    )


def test_python_says_the_same_as_yaml():
    first, second = plan(trace(in_python), Eyes()), plan(load(MERGE), Eyes())
    assert first.steps == second.steps


def test_a_search_makes_what_the_step_makes_that_it_follows():
    steps = plan(spec(), Eyes(), CATALOG).steps
    assert [steps[n].kind for n in ("part", "found")] == ["model", "model"]
    assert said() == of_merge() == []
    wrong = PIPELINE.replace("inputs: {model: found}", "inputs: {model: score}")
    assert "model='score' is a metrics, expected a model." in said(text=wrong)


def test_a_step_that_follows_a_search_of_another_kind_is_refused():
    text = PIPELINE.replace("{result: part, judged", "{result: rows, judged").replace(
        "  part:", "  rows: {operator: prepare, inputs: {data: text}}\n  part:"
    )
    text = text.replace("steps:", "inputs: {text: {dataset: t}}\nsteps:", 1)
    assert "model='found' is a dataset, expected a model." in said(text=text)


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        ("{part.bye: {uniform: [0, 1]}}", "the step has no field 'bye'. Did you mean 'by'?"),
        ("{parts.by: {uniform: [0, 1]}}", "no step of the trials is called 'parts'. Did you mean 'part'?"),
        ("{after.wanted: {uniform: [0, 1]}}", "no step of the trials is called 'after'."),
        ("{part: {choice: [1]}}", "'part', expected a field of a step. Write STEP.FIELD."),
        ("{part.times: {uniform: [1, 4]}}", "moved: times=2.145898, expected an integer."),
        ("{part.times: {choice: [1, two]}}", "moved: times='two', expected an integer."),
        ("{part.by: {uniform: [2, 1]}}", "space.part.by.uniform=(2.0, 1.0), expected two bounds, the lower one first."),
        ("{part.by: {uniform: [1, 2], choice: [1]}}", "expected exactly one of uniform, log_uniform, integer"),
        ("{part.by: {unifrom: [1, 2]}}", "has no field 'unifrom'"),
    ],
)
def test_a_space_that_a_trial_could_not_have_is_refused(space, problem):
    found = said(f"found.space={space}")
    assert len(found) == 1, found
    assert problem in found[0]


def test_the_range_of_a_method_is_asked_at_both_ends():
    assert of_merge("found.space={merged.density: {uniform: [0.0, 1.0]}}") == [
        "space: TIES: density=0.0, expected 0 < density <= 1."
    ]
    assert of_merge("found.space={merged.density: {uniform: [0.1, 1.5]}}") == [
        "space: TIES: density=1.5, expected 0 < density <= 1."
    ]
    assert of_merge("found.space={merged.density: {log_uniform: [1e-3, 1]}}") == []


def test_whole_methods_are_chosen_and_their_fields_have_conditions():
    chosen = "merged.method: {choice: [{name: ties}, {name: linear}]}"
    only = "merged.density: {uniform: [0.1, 1], when: {merged.method: {name: ties}}}"
    assert of_merge(f"found.space={{{chosen}, {only}}}") == []
    assert "expected methods with their fields" in of_merge("found.space={merged.method.name: {choice: [ties]}}")[0]
    assert "Did you mean 'ties'" in of_merge("found.space={merged.method: {choice: [{name: tie}]}}")[0]
    always = of_merge(f"found.space={{{chosen}, merged.density: {{uniform: [0.1, 1]}}}}")
    assert always == []  # with the method as it is written: that another one has no such field is a trial's failure


def test_what_a_sampler_cannot_search_is_refused_at_plan():
    assert any("expected numbers alone for sampler='cma_es'" in s for s in said("found.sampler=cma_es"))
    assert any("has no end of values" in s for s in said("found.sampler=grid"))
    assert any("num_trials=0, expected num_trials >= 1" in s for s in said("found.num_trials=0"))


def test_an_objective_on_a_set_that_is_not_measured_is_refused():
    wrong = "found.objectives=[{on: tex, measure: loss, direction: minimize}]"
    assert of_merge(wrong) == ["objectives: 'measured' has no set 'tex'. Did you mean 'text'?"]


def test_a_rule_about_a_step_that_no_trial_runs_is_refused():
    assert said("found.stop={step: parts, first: 1, last: 9}") == [
        "stop: no step of the trials is called 'parts'. Did you mean 'part'?"
    ]
    assert said("found.stop={step: part, first: 9, last: 1}") == ["search: stop.last=1, expected last > first."]


TRAINED = Code(("trained.py",), (("trained.py", trained.OWN),))
LEARNING = Catalog(bring(TRAINED))
ALLOWED = "expected one of beta1, beta2, clip_norm, epsilon, learning_rate, weight_decay."


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ([], []),
        (["found.space={part.params.weight_decay: {uniform: [0, 1]}}"], []),
        (
            ["found.space={part.batch_size: {integer: [1, 4]}}"],
            [f"population: 'part.batch_size' cannot change while 'part' trains, {ALLOWED}"],
        ),
        (
            ["found.population={step: parts, every: 2, last: 4}"],
            ["population: no step of the trials is called 'parts'"],
        ),
        (
            ["found.population={step: score, every: 2, last: 4}"],
            ["population: step 'score' (judge) follows no gradient, expected one that trains."],
        ),
        (["part.rest_at=3"], ["population: step 'part' has rest_at itself, expected none"]),
        (
            ["part.midway=[{at: 2, values: {learning_rate: 1}}]"],
            ["population: step 'part' has midway itself, expected none"],
        ),
        (["found.sampler=tpe"], ["sampler='tpe' with a population, expected 'random' or 'grid'."]),
    ],
)
def test_a_population_of_what_cannot_change_while_it_trains_is_refused(changes, problems):
    found = said(*changes, text=trained.PIPELINE, catalog=LEARNING, code=TRAINED)
    assert len(found) >= len(problems) > 0 or found == problems == []
    assert all(sentence.startswith(part) for part, sentence in zip(problems, found, strict=False))


def test_a_step_that_changes_midway_knows_its_fingerprints_without_its_last_changes():
    def part_of(*changes):
        text = trained.PIPELINE.partition("  score:")[0]
        return plan(load(text, catalog=LEARNING, code=TRAINED, changes=changes), Eyes(), LEARNING).steps["part"]

    plain, resting = part_of(), part_of("part.rest_at=2")
    once = part_of("part.midway=[{at: 2, values: {learning_rate: 0.5}}]")
    twice = part_of("part.midway=[{at: 2, values: {learning_rate: 0.5}}, {at: 4, values: {}}]", "part.rest_at=5")
    assert resting.fingerprint == plain.fingerprint
    assert len({s.fingerprint for s in (plain, once, twice)}) == 3
    assert (plain.earlier, once.earlier) == ((), ((2, plain.fingerprint),))
    assert twice.earlier == ((4, once.fingerprint), (2, plain.fingerprint))


def test_steps_that_are_no_steps_or_change_the_world_are_refused():
    outside = MERGE.replace("{result: merged", "{result: base")
    assert said(text=outside, catalog=Catalog(), code=Code()) == [
        "result: 'base' is an input, expected a step, which trials can run again. Name one."
    ]
    world = MERGE.replace(
        "  measured: {operator: evaluate, inputs: {model: merged",
        "  named: {operator: register, inputs: {model: merged}, params: {name: n}}\n"
        "  measured: {operator: evaluate, inputs: {model: named",
    )
    (found,) = said(text=world, catalog=Catalog(), code=Code())
    assert found.startswith("trials would run 'named', which changes the world (register), expected")


def test_what_a_search_does_is_in_its_fingerprint_and_how_many_at_once_is_not():
    def fingerprint(*changes):
        return plan(spec(*changes), Eyes(), CATALOG).steps["found"].fingerprint

    same = fingerprint()
    assert fingerprint("found.concurrency=7") == same
    others = ("found.num_trials=7", "found.seed=1", "found.sampler=random", "base.at=1", "score.wanted=2")
    assert len({same, *map(fingerprint, others)}) == 1 + len(others)


def test_methods_that_trials_may_use_are_in_the_fingerprint():
    text = MERGE.replace("space: {merged.density: {uniform: [0.1, 1.0]}}", "space: {merged.method: {choice: METHODS}}")

    def modules(methods):
        made = plan(load(text.replace("METHODS", methods)), Eyes())
        return {n for n in made.steps["found"].components["source"] if n.startswith("lfm.merging.")}

    assert modules("[{name: ties}, {name: linear}]") - modules("[{name: ties}]") == {"lfm.merging.linear"}


def test_a_trial_is_the_part_of_the_pipeline_with_other_values():
    trial = part(spec(), ("part", "score"))
    assert list(trial.steps) == ["base", "part", "score"]
    changed = varied(trial, {"part.by": 0.25, "part.times": 4}, CATALOG, "trial").whole()
    assert changed.steps["part"].params == {"by": 0.25, "times": 4, "refused": 99}
    assert changed.steps["base"] == trial.steps["base"]
    assert trial.steps["part"].params["by"] == 1.0


def test_there_is_room_for_as_many_trials_as_the_largest_step_lets():
    there = Capacity(cpus=8, gpus=2, memory=100)
    one, three = Resources(), Resources(workers=3)
    on_gpu = Resources(gpus_per_worker=1, accelerator="gpu")
    assert room([one], there) == 8
    assert room([one, three], there) == 2
    assert room([one, on_gpu], there) == 2
    assert room([Resources(memory=30)], there) == 3
    assert room([Resources(workers=9)], there) == 1  # which waits, or is refused, as in any run
    assert room([], there) == 1
    scattered = Capacity.of([Node(cpus=3), Node(cpus=3), Node(cpus=1)])
    assert room([Resources(cpus_per_worker=2)], scattered) == 2  # the seventh CPU and two others are no room for one
    assert room([Resources(cpus_per_worker=2, workers=2)], scattered) == 1


@pytest.mark.parametrize(
    ("changes", "trials", "at_once", "times", "early"),
    [
        # One dimension has no end, so that all six differ; what is written is the first of them, and known.
        ((), 6, 2, {"part": 5, "score": 5}, False),
        (("found.sampler=random",), 6, 2, {"part": 6, "score": 6}, False),  # draws that point by chance alone
        (("part.by=0.1",), 6, 2, {"part": 6, "score": 6}, False),  # what is written lies outside
        (("found.concurrency=0",), 6, 6, {"part": 5, "score": 5}, False),
        (("found.concurrency=0", "score.resources.cpus_per_worker=3"), 6, 2, {"part": 5, "score": 5}, False),
        (("found.num_trials=1", "found.max_hours=2"), 1, 1, {"part": 0, "score": 0}, False),
        # Of few values there are few results, whoever draws how often; what follows differs by what it needs too.
        (("found.space={part.times: {choice: [1, 2]}, score.wanted: {integer: [3, 4]}}",), 6, 2,
         {"part": 1, "score": 3}, False),
        (("found.space={part.times: {choice: [2, 4]}}", "found.sampler=grid"), 2, 2, {"part": 2, "score": 2}, False),
        (("found.space={score.wanted: {uniform: [1, 4]}}",), 6, 2, {"score": 5}, False),
        (("found.stop={step: part, measure: away, first: 1, last: 64}",), 6, 2, {"part": 5, "score": 5}, True),
    ],
)  # fmt: skip
def test_a_plan_knows_what_trials_will_make(changes, trials, at_once, times, early):
    found = repetition("found", spec(*changes), CATALOG, Capacity(cpus=7, gpus=0))
    assert (found.trials, found.at_once, found.times, found.early) == (trials, at_once, times, early)
    assert {*found.shared} == {"base", "part", "score"} - {*times}
    assert found.needs["score"] == (("part",) if "part" in times else ())
    assert found.max_s == (7200 if "found.max_hours=2" in changes else float("inf"))


def foreseen(low, high, nodes=1, price=1.0):
    return Estimate(state="runs", room="cpu", nodes=nodes, seconds=(low, high), cost=(low * price, high * price),
                    host=(nodes * 5.0, 0.0))  # fmt: skip


def test_what_trials_have_in_common_is_paid_for_once():
    again = repetition("found", spec("found.concurrency=2"), CATALOG, Capacity(cpus=8, gpus=0))
    again = replace(again, times={"part": 3, "score": 5})
    steps = {"part": foreseen(10, 20, nodes=2), "score": foreseen(1, 2)}
    found = trials_estimate(again, steps, {"part": 4, "score": 2})
    assert (found.each.seconds, found.each.cost, found.each.host[0]) == ((11, 22), (11, 22), 10)
    # Two at once: two rows of the three that differ in the first, three of the five in the second.
    assert (found.together.seconds, found.together.cost) == ((23, 46), (35, 70))
    assert (found.together.nodes, found.together.source) == (4, "trials")
    packed = trials_estimate(again, steps, {"part": 2, "score": 1})  # two at once on the machines of one
    assert (packed.each.cost, packed.together.cost, packed.together.seconds) == ((5.5, 11), (17.5, 35), (23, 46))

    early = trials_estimate(replace(again, early=True), steps, {"part": 4, "score": 2})
    assert (early.together.seconds, early.together.cost) == ((11, 46), (11, 70))
    soon = trials_estimate(replace(again, max_s=23), steps, {"part": 4, "score": 2})
    assert (soon.together.seconds, soon.together.cost) == ((23, 23), (35, 35))
    unknown = replace(steps["part"], seconds=None, cost=None)
    half = trials_estimate(again, {**steps, "part": unknown}, {"part": 4, "score": 2})
    assert (half.unknown, half.each.seconds, half.together.cost) == (("part",), (1, 2), (5, 10))
    nothing = trials_estimate(again, {"part": unknown}, {"part": 4})
    assert (nothing.each.seconds, nothing.together.seconds, nothing.together.cost) == (None, None, None)


def test_a_step_differs_by_the_fields_that_are_varied_of_it_and_of_what_it_needs():
    trial = part(spec(), ("part", "score"))
    assert differing(trial, ["part.by", "score.wanted"]) == {"part": {"part.by"}, "score": {"part.by", "score.wanted"}}
    assert {*differing(trial, ["base.at"])} == {"base", "part", "score"}


def test_trials_are_runs_that_no_list_of_runs_has(store):
    first, again = (trial_name("run-1", "found", {"a.b": v}) for v in (1, 2))
    assert first != again
    assert first == trial_name("run-1", "found", {"a.b": 1})
    for name in ("run-1", first, again, trial_name("run-1", "founder", {}), trial_name(first, "inner", {})):
        store.storage.put_if_absent(f"runs/{name}/journal/000001-000001.json", b"[]")
    assert runs(store.storage) == ("run-1",)
    assert trials(store.storage, "run-1", "found") == sorted((first, again))
    assert len(trials(store.storage, "run-1")) == 4
    assert find_run(store.storage, "last") == find_run(store.storage, "run") == "run-1"
    assert find_run(store.storage, first) == first
