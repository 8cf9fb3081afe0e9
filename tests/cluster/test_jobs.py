"""Which job of a run it is the turn of, and what a cluster must have: without one."""

import pytest

from cluster.jobs import Jobs, NoDashboard, OtherVersions, Versions, due, taken
from cluster.profile import Head, Profile
from cluster.tokens import NoToken


class FakeJobs:
    """Knows some attempts; `others` are those that somebody else submits just before this process does."""

    def __init__(self, states, others=()):
        self.states, self.others = dict(states), list(others)
        self.asked = []

    def of_run(self, run):
        return {int(job.rpartition("-")[2]): state for job, state in self.states.items()}

    def start(self, job):
        self.asked.append(job)
        if self.others:
            self.states[job] = self.others.pop(0)
            return False
        self.states[job] = "pending"
        return True

    def ended(self, job):
        self.states[job] = "succeeded"


@pytest.mark.parametrize(
    ("attempts", "turn"),
    [
        ({}, (1, False)),
        ({1: "pending"}, (1, True)),
        ({1: "running"}, (1, True)),
        ({1: "succeeded"}, (2, False)),
        ({1: "failed", 2: "stopped"}, (3, False)),
        ({1: "failed", 2: "running"}, (2, True)),
        ({9: "failed", 10: "failed"}, (11, False)),
    ],
)
def test_what_goes_on_is_followed_and_what_has_ended_gets_another_attempt(attempts, turn):
    assert due(attempts) == turn


@pytest.mark.parametrize(
    ("others", "job", "new", "asked"),
    [
        ((), "r-attempt-1", True, 1),
        (("running",), "r-attempt-1", False, 1),  # of two at once one wins, and the other follows it
        (("failed",), "r-attempt-2", True, 2),  # the winner's has ended in the meantime
    ],
)
def test_of_two_submitters_one_wins(others, job, new, asked):
    jobs = FakeJobs({}, others)
    assert taken(jobs, "r", jobs.start) == (job, new)
    assert len(jobs.asked) == asked


def test_a_job_that_only_has_to_end_is_waited_for():
    jobs = FakeJobs({"r-attempt-4": "running"})
    assert taken(jobs, "r", jobs.start, over=lambda job: job == "r-attempt-4") == ("r-attempt-5", True)


HERE = Versions("2.60.0", "3.11", "0.1.0")


@pytest.mark.parametrize("there", [HERE, Versions("2.60.0", "3.11", "")])
def test_a_cluster_with_the_same_versions_fits_and_this_project_comes_with_the_job(there):
    HERE.check("gpus", there)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (Versions("2.61.0", "3.11", "0.1.0"), "it has Ray 2.61.0, expected Ray 2.60.0 as here."),
        (Versions("2.61.0", "3.12", ""), "it has Ray 2.61.0, Python 3.12, expected Ray 2.60.0, Python 3.11 as here."),
        (Versions("2.60.0", "3.11", "0.2.0"), "it has lfm 0.2.0, expected lfm 0.1.0 as here."),
        (Versions("", "3.11", ""), "it has Ray none, expected Ray 2.60.0 as here."),
    ],
)
def test_another_version_is_named_with_the_one_here(there, said):
    with pytest.raises(OtherVersions) as refused:
        HERE.check("gpus", there)
    assert str(refused.value) == f"cluster 'gpus': {said} Change one of them."


def profile(**fields):
    return Profile(name="gpus", place="address", address="head:6379", head=Head(cpus=1, memory_gib=1), **fields)


def test_without_a_dashboard_or_a_token_nothing_is_asked(monkeypatch, tmp_path):
    with pytest.raises(NoDashboard, match="the profile names no dashboard, expected Ray's dashboard at"):
        Jobs(profile())
    monkeypatch.delenv("GONE", raising=False)
    for token in ("env:GONE", f"file:{tmp_path / 'gone'}"):
        with pytest.raises(NoToken, match="expected Ray's token"):
            Jobs(profile(dashboard="http://127.0.0.1:1", token=token))
