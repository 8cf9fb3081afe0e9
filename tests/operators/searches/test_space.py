import itertools

import pytest
from pydantic import TypeAdapter

from operators.searches.space import (
    Dimension,
    Extent,
    Objective,
    Population,
    SearchError,
    Stop,
    active,
    front,
    problems_of,
)

DENSITY = Dimension(uniform=(0.1, 1.0))
WAY = Dimension(choice=("a", "b"))
ONLY_A = Dimension(integer=(1, 3), when={"m.way": "a"})
LOSS = Objective(measure="loss", direction="minimize", on="text")
SIZE = Objective(measure="parameters", direction="minimize")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "dimension: choice=None, expected exactly one of uniform, log_uniform, integer and choice."),
        (
            {"uniform": (0, 1), "choice": (1,)},
            "dimension: choice='uniform and choice', expected exactly one of uniform, log_uniform, integer and choice.",
        ),
        ({"choice": ()}, "dimension: choice=(), expected at least one value."),
        ({"uniform": (1, 1)}, "dimension: uniform=(1, 1), expected two bounds, the lower one first."),
        ({"integer": (3, 1)}, "dimension: integer=(3, 1), expected two bounds, the lower one first."),
        ({"uniform": (0, float("inf"))}, "dimension: uniform=(0, inf), expected finite bounds."),
        ({"log_uniform": (0, 1)}, "dimension: log_uniform=(0, 1), expected bounds > 0."),
    ],
)
def test_a_dimension_from_which_nothing_can_be_drawn_is_refused(fields, said):
    with pytest.raises(SearchError) as caught:
        Dimension(**fields)
    assert str(caught.value) == said
    assert type(caught.value)(*caught.value.args).args == caught.value.args


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"first": 0, "last": 9}, "stop: first=0, expected first >= 1."),
        ({"first": 9, "last": 9}, "stop: last=9, expected last > first."),
        ({"first": 1, "last": 9, "factor": 1}, "stop: factor=1, expected factor >= 2."),
    ],
)
def test_a_rule_that_could_end_no_trial_is_refused(fields, said):
    with pytest.raises(SearchError) as caught:
        Stop(step="tuned", **fields)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"every": 0, "last": 9}, "population: every=0, expected every >= 1."),
        ({"every": 5, "last": 4}, "population: last=4, expected last >= every."),
        ({"every": 1, "last": 9, "share": 0.6}, "population: share=0.6, expected 0 < share <= 0.5."),
        ({"every": 1, "last": 9, "drawn": 2}, "population: drawn=2, expected 0 <= drawn <= 1."),
    ],
)
def test_a_population_that_could_not_be_compared_is_refused(fields, said):
    with pytest.raises(SearchError) as caught:
        Population(step="tuned", **fields)
    assert str(caught.value) == said


def test_yaml_gives_the_numbers_that_python_gives():
    read = TypeAdapter(Dimension).validate_python({"log_uniform": ["1e-5", 1]})
    assert read == Dimension(log_uniform=(1e-5, 1.0))


@pytest.mark.parametrize(
    ("dimension", "inside", "outside"),
    [
        (DENSITY, [0.1, 0.5, 1], [0.0, 1.1, "0.5", True, None]),
        (Dimension(log_uniform=(1e-5, 1e-2)), [1e-5, 1e-3], [1e-6]),
        (Dimension(integer=(1, 3)), [1, 2, 3], [0, 4, 1.5, True]),
        (Dimension(choice=(1, "x", {"name": "ties"})), [1, "x", {"name": "ties"}], [True, 2, {"name": "slerp"}]),
    ],
)
def test_a_value_lies_in_a_dimension_or_not(dimension, inside, outside):
    assert [dimension.holds(v) for v in inside] == [True] * len(inside)
    assert [dimension.holds(v) for v in outside] == [False] * len(outside)


def test_the_values_that_tell_whether_all_are_allowed():
    low, high, middle = DENSITY.telling
    assert (low, high) == (0.1, 1.0)
    assert 0.1 < middle < 1.0
    assert Dimension(uniform=(2, 8)).telling[2] % 1 != 0  # no integer, so that a field for these refuses it
    assert Dimension(log_uniform=(1e-4, 1.0)).telling[2] == pytest.approx(1e-4**0.618034)
    assert Dimension(integer=(1, 3)).telling == (1, 3)
    assert WAY.telling == ("a", "b")


def test_what_has_a_condition_counts_only_where_it_holds():
    space = {"m.way": WAY, "m.times": ONLY_A, "m.last": Dimension(choice=(1, 2), when={"m.times": 2})}
    drawn = {"m.way": "a", "m.times": 2, "m.last": 1}
    assert active(space, drawn) == drawn
    assert active(space, {**drawn, "m.times": 3}) == {"m.way": "a", "m.times": 3}
    assert active(space, {**drawn, "m.way": "b"}) == {"m.way": "b"}
    assert active(space, {"m.times": 2}) == {}


@pytest.mark.parametrize(
    ("space", "objectives", "sampler", "extent", "said"),
    [
        ({"m.density": DENSITY}, [LOSS], "tpe", Extent(), []),
        ({"m.way": WAY, "m.times": ONLY_A}, [LOSS, SIZE], "tpe", Extent(), []),
        ({"m.times": Dimension(integer=(1, 3)), "m.way": WAY}, [LOSS], "grid", Extent(num_trials=6), []),
        ({"m.density": DENSITY}, [LOSS], "cma_es", Extent(), []),
        ({}, [], "tpe", Extent(), ["space: empty", "objectives: empty"]),
        ({"m.way": WAY}, [LOSS], "cma_es", Extent(), ["'m.way' is a choice, expected numbers alone"]),
        (
            {"m.way": WAY, "m.times": ONLY_A},
            [LOSS],
            "cma_es",
            Extent(),
            ["'m.way' is a choice", "'m.times' is conditional, expected numbers alone"],
        ),
        ({"m.density": DENSITY}, [LOSS, SIZE], "cma_es", Extent(), ["sampler='cma_es' with 2 objectives"]),
        ({"m.density": DENSITY}, [LOSS], "grid", Extent(), ["'m.density' has no end of values"]),
        (
            {"m.times": Dimension(integer=(1, 3)), "m.way": WAY},
            [LOSS],
            "grid",
            Extent(num_trials=5),
            ["num_trials=5, expected at least the 6 points of the grid"],
        ),
        (
            {"m.times": ONLY_A, "m.way": WAY},
            [LOSS],
            "tpe",
            Extent(),
            ["'m.times' when 'm.way', expected a field above"],
        ),
        (
            {"m.density": DENSITY, "m.times": Dimension(integer=(1, 2), when={"m.density": 0.5})},
            [LOSS],
            "tpe",
            Extent(),
            ["when 'm.density', expected one that is a choice"],
        ),
        (
            {"m.way": WAY, "m.times": Dimension(integer=(1, 2), when={"m.way": "c"})},
            [LOSS],
            "tpe",
            Extent(),
            ["when 'm.way' is 'c', expected one of its values"],
        ),
    ],
)
def test_what_no_sampler_can_search_is_said(space, objectives, sampler, extent, said):
    found = list(problems_of(space, objectives, sampler, extent))
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


TOGETHER = Population(step="m", every=2, last=4)
EARLY = Stop(step="m", first=1, last=4)


@pytest.mark.parametrize(
    ("space", "objectives", "sampler", "num_trials", "rules", "said"),
    [
        ({"m.density": DENSITY}, [LOSS], "random", 4, {"population": TOGETHER}, []),
        ({"m.density": DENSITY}, [LOSS], "random", 4, {"stop": EARLY}, []),
        ({"m.density": DENSITY}, [LOSS], "tpe", 4, {"population": TOGETHER}, ["sampler='tpe' with a population"]),
        ({"m.density": DENSITY}, [LOSS], "random", 1, {"population": TOGETHER}, ["num_trials=1 with a population"]),
        ({"o.density": DENSITY}, [LOSS], "random", 4, {"population": TOGETHER}, ["expected fields of that step alone"]),
        (
            {"m.way": WAY, "m.times": ONLY_A},
            [LOSS],
            "random",
            4,
            {"population": TOGETHER},
            ["'m.times' is conditional"],
        ),
        (
            {"m.density": DENSITY},
            [LOSS],
            "random",
            4,
            {"population": TOGETHER, "stop": EARLY},
            ["stop: given with a population, expected one of the two"],
        ),
        (
            {"m.density": DENSITY},
            [LOSS, SIZE],
            "random",
            4,
            {"stop": EARLY},
            ["stop: no measure beside 2 objectives, expected the one of step 'm'"],
        ),
        (
            {"m.density": DENSITY},
            [LOSS, SIZE],
            "random",
            4,
            {"population": TOGETHER},
            ["population: no measure beside 2"],
        ),
        (
            {"m.density": DENSITY},
            [LOSS, SIZE],
            "random",
            4,
            {"stop": Stop(step="m", first=1, last=4, measure="loss")},
            [],
        ),
    ],
)
def test_what_follows_trials_and_cannot_is_said(space, objectives, sampler, num_trials, rules, said):
    found = list(problems_of(space, objectives, sampler, Extent(num_trials=num_trials), **rules))
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


def test_the_front_is_what_no_other_beats():
    rows = [(1.0, 5.0), (2.0, 4.0), (3.0, 4.0), (2.0, 4.0), (5.0, 1.0), (6.0, 1.5)]
    assert front(rows) == [0, 1, 3, 4]
    for numbers in itertools.product(range(3), repeat=4):  # against the words of the definition
        pairs = [numbers[:2], numbers[2:]]
        beaten = [any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in pairs) for p in pairs]
        assert front(pairs) == [i for i, lost in enumerate(beaten) if not lost]
