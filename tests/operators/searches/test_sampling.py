import pytest

from operators.searches.sampling import Course, Draws, decoded, encoded, keep_secrets, searcher
from operators.searches.space import Dimension, Extent, Objective, active

SPACE = {
    "m.method": Dimension(choice=({"name": "ties"}, {"name": "slerp"})),
    "m.density": Dimension(uniform=(0.1, 1.0), when={"m.method": {"name": "ties"}}),
    "m.times": Dimension(integer=(1, 3)),
    "t.rate": Dimension(log_uniform=(1e-5, 1e-1)),
}
LOSS = Objective(measure="loss", direction="minimize")
SIZE = Objective(measure="size", direction="maximize")


def drawn(sampler, space, objectives, values, number, seed=0, known=()):
    """What a searcher suggests one after the other, told the values of each."""
    course = Course(sampler=sampler, seed=seed, extent=Extent(), concurrency=1, known=known)
    names = [f"objective {i}" for i, _ in enumerate(objectives, 1)]
    search = searcher(space, names, objectives, course)
    found = []
    for i in range(number):
        found.append(active(space, decoded(space, search.suggest(f"t{i}"))))
        told = values(found[-1])
        done = None if told is None else {**dict(zip(names, told, strict=True)), "training_iteration": 1}
        search.on_trial_complete(f"t{i}", result=done, error=told is None)
    return found


def test_a_point_comes_back_as_it_was():
    point = {"m.method": {"name": "slerp"}, "m.times": 2, "t.rate": 1e-3}
    assert encoded(SPACE, point) == {"m.method": 1, "m.times": 2, "t.rate": 1e-3}
    assert decoded(SPACE, encoded(SPACE, point)) == point


def test_what_is_drawn_lies_in_the_space_and_has_a_condition_only_where_that_holds():
    points = drawn("tpe", SPACE, [LOSS], lambda p: (p["t.rate"],), 30)
    assert {p["m.method"]["name"] for p in points} == {"ties", "slerp"}
    for point in points:
        assert ("m.density" in point) == (point["m.method"] == {"name": "ties"})
        assert all(SPACE[k].holds(v) for k, v in point.items())


@pytest.mark.parametrize("sampler", ["tpe", "cma_es"])
def test_the_same_seed_draws_the_same_and_learns(sampler):
    space = {"a": Dimension(uniform=(-4, 4)), "b": Dimension(uniform=(-4, 4))}

    def far(point):
        return ((point["a"] - 1) ** 2 + (point["b"] + 2) ** 2,)

    points = drawn(sampler, space, [LOSS], far, 60)
    assert points == drawn(sampler, space, [LOSS], far, 60)
    assert points != drawn(sampler, space, [LOSS], far, 60, seed=1)
    early, late = (sorted(far(p)[0] for p in some)[len(some) // 2] for some in (points[:15], points[-15:]))
    assert late < early / 4


def test_known_points_come_first_and_a_failed_one_stops_nothing():
    known = [{"m.method": {"name": "slerp"}, "m.times": 2, "t.rate": 1e-3}]
    points = drawn("tpe", SPACE, [LOSS], lambda p: None if p["m.times"] == 2 else (1.0,), 12, known=known)
    assert points[0] == known[0]
    assert len(points) == 12


def test_of_several_objectives_each_goes_its_own_way():
    space = {"a": Dimension(uniform=(0, 1))}
    points = drawn("tpe", space, [LOSS, SIZE], lambda p: (p["a"], 1.0), 40)
    assert sorted(p["a"] for p in points[-20:])[10] < 0.35


def test_a_drawing_is_sent_as_it_is():
    import pickle

    assert pickle.loads(pickle.dumps(Draws(SPACE))) == Draws(SPACE)


def test_workers_of_tune_are_not_given_keys(monkeypatch):
    from ray.tune.execution.class_cache import _ActorClassCache

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    keep_secrets()
    asked = _ActorClassCache().get(type("Trainable", (), {}))._default_options["runtime_env"]
    assert "PL_DISABLE_FORK" in str(asked)
    assert "AWS" not in str(asked)
