"""An outlook that is kept up with a run says what the whole plan would say, whatever happens."""

import random
from collections import Counter

import pytest

from cluster.capacity import Capacity, Node
from operators.resources import Resources
from pipelines.failures import BUDGETS, Failure
from pipelines.plan import Plan, PlannedStep
from pipelines.schedule import (
    Finish,
    Outlook,
    Progress,
    Refuse,
    Reuse,
    Start,
    Wait,
    decide,
    eased,
    infeasible,
    pause,
    relief,
)
from pipelines.spec import Spec

ASKS = (
    Resources(),
    Resources(cpus_per_worker=3, memory=2),
    Resources(gpus_per_worker=1, accelerator="gpu", schedule_timeout=5),
    Resources(workers=2, strategy="ddp", memory=3),
)
LARGE = Node(cpus=4, gpus=2, memory=8)
CAPACITIES = (
    None,
    Capacity(cpus=4, gpus=1, memory=8),
    Capacity(cpus=4, gpus=0, memory=4),
    Capacity.of([Node(cpus=2, memory=4), Node(cpus=2, memory=4), LARGE]),
)
BUDGET = {**BUDGETS, Failure.OTHER: 1, Failure.MEMORY: 2}


def anything(draw, steps):
    """A plan whose steps need some of those before them; every fifth is one that is there already, or an effect."""
    found = {}
    for number in range(steps):
        name = f"s{number}"
        before = draw.sample(sorted(found), min(len(found), draw.choice((0, 1, 1, 2, 4))))
        found[name] = PlannedStep(
            name=name,
            operator="nothing",
            inputs={},
            method=None,
            params={"batch_size": 8},
            resources=draw.choice(ASKS),
            kind="dataset",
            effect=draw.random() < 0.1,
            starts_workers=False,
            trains=draw.random() < 0.3,
            needs=tuple(before),
            fingerprint=f"f{draw.randrange(number + 1) if draw.random() < 0.2 else number}",
            components={},
        )
    return Plan(spec=Spec(name="p", inputs={}, steps={}), inputs={}, steps=found)


def expected(plan, now, capacity):
    """The rules of `decide`, one step after the other."""

    def asks(name):
        return eased(plan.steps[name], now.failures.get(name, {}).get(Failure.MEMORY, 0)).resources

    def lacks(name):
        return [] if capacity is None else infeasible({name: asks(name)}, capacity)

    def hopeless(name):
        failed = now.failures.get(name, {})
        spent = any(times > BUDGET[failure] for failure, times in failed.items())
        helpless = failed.get(Failure.MEMORY) and (relief(plan.steps[name]) == "nothing" or lacks(name))
        return name not in now.done and bool(spent or helpless)

    held = {name: asks(name) for name in now.running}
    done, said = set(now.done), []
    for name, step in plan.steps.items():
        closed = name in now.done | now.running | now.elsewhere or hopeless(name)
        if closed or not done.issuperset(step.needs):
            continue
        if step.fingerprint in now.stored and name not in now.forced and not step.effect:
            said.append(Reuse(name))
            done.add(name)
        elif lacks(name):
            late = now.waited.get(name, 0) >= asks(name).schedule_timeout
            said.append((Refuse if late else Wait)(name, lacks(name)[0].sentence))
        else:
            trial = [*held.values(), asks(name)]
            fits = capacity is None or (
                sum(a.cpus for a in trial) <= capacity.cpus
                and sum(a.gpus for a in trial) <= capacity.gpus
                and sum(a.workers * a.memory for a in trial) <= capacity.memory
            )
            if fits:
                held[name] = asks(name)
                failed = now.failures.get(name, {})
                said.append(Start(name, failed.get(Failure.MEMORY, 0), pause(failed)))
    if said or now.running or now.elsewhere:
        return tuple(said)
    left = [n for n in plan.steps if n not in now.done]
    failed = tuple(n for n in left if hopeless(n))
    return (Finish(failed=failed, skipped=tuple(n for n in left if n not in failed)),)


def happens(draw, plan, outlook, decisions):
    """Something that a driver may tell an outlook."""
    starts = [d.step for d in decisions if isinstance(d, Start)]
    for decision in decisions:
        if isinstance(decision, Reuse):
            outlook.finish(decision.step)
    for name in starts[: draw.randint(0, len(starts))]:
        outlook.leave(name) if draw.random() < 0.1 else outlook.begin(name)
    if outlook.running and draw.random() < 0.8:
        name = draw.choice(sorted(outlook.running))
        outlook.end(name)
        if draw.random() < 0.6:
            outlook.finish(name)
        else:
            outlook.fail(name, draw.choice((Failure.MEMORY, Failure.MEMORY, Failure.NODE, Failure.OTHER)))
    if outlook.elsewhere and draw.random() < 0.5:
        name = draw.choice(sorted(outlook.elsewhere))
        if draw.random() < 0.5:
            outlook.find(plan.steps[name].fingerprint)
        outlook.take_back(name)
    if outlook.done and draw.random() < 0.1:
        name = draw.choice(sorted(outlook.done))
        outlook.lose(name)
        outlook.forget(plan.steps[name].fingerprint)
    outlook.waited = {d.step: draw.choice((0.0, 9.0)) for d in decisions if isinstance(d, Wait | Refuse)}


@pytest.mark.parametrize("seed", range(40))
def test_what_is_kept_up_with_is_decided_as_from_the_whole_plan(seed):
    draw = random.Random(seed)
    plan = anything(draw, draw.choice((3, 12, 30)))
    stored = frozenset(s.fingerprint for s in plan.steps.values() if draw.random() < 0.1)
    forced = frozenset(n for n in plan.steps if draw.random() < 0.1)
    outlook, capacity = Outlook(plan, Progress(stored=stored, forced=forced), budgets=BUDGET), CAPACITIES[0]
    said = Counter()
    for _ in range(60):
        decisions = outlook.decide(capacity)
        now = Progress(
            done=frozenset(outlook.done),
            running=frozenset(outlook.running),
            failures={n: dict(f) for n, f in outlook.failures.items()},
            stored=frozenset(outlook.stored),
            forced=forced,
            elsewhere=frozenset(outlook.elsewhere),
            waited=outlook.waited,
        )
        assert decisions == expected(plan, now, capacity) == decide(plan, now, capacity, budgets=BUDGET)
        assert outlook.decide(capacity) == decisions, "asking changes nothing"
        said.update(type(d) for d in decisions)
        happens(draw, plan, outlook, decisions)
        capacity = draw.choice(CAPACITIES[1:]) if draw.random() < 0.2 else capacity
    assert said[Start]
