"""A pipeline on a cluster that grows with what its steps ask for, under Ray's real autoscaler."""

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import look as look_module
from cluster.seen import Seen, look
from pipelines.__main__ import main
from pipelines.lineage import Event, history, runs
from pipelines.profiles import read_profile
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage
from pipelines.view import measured
from tests.cluster.autoscaler import autoscaling, drain
from tests.conftest import Project

PROFILE = """
name: grows
place: address
address: "{address}"
storage: {store}
shared: [/]
head: {{cpus: 1, memory_gib: 1}}
groups:
  cpu: {{cpus: 1, memory_gib: 1, max_nodes: 1, idle_timeout_s: 2}}
  l4: {{cpus: 1, memory_gib: 1, gpus: 1, accelerator: L4, max_nodes: 1, idle_timeout_s: 2}}
  h100: {{cpus: 1, memory_gib: 1, gpus: 2, accelerator: H100, max_nodes: 1, idle_timeout_s: 2}}
  spot: {{cpus: 2, memory_gib: 1, max_nodes: 1, idle_timeout_s: 2, market: spot, fallback: steady}}
  steady: {{cpus: 2, memory_gib: 1, max_nodes: 1, idle_timeout_s: 2}}
"""
STEPS, HOLD, EVERY = 150, 25, 10
PIPELINE = f"""
name: grows
uses: [noop.py, slow_learner.py]
inputs:
  text: {{dataset: TEXT}}
steps:
  plain: {{operator: noop, inputs: {{after: [text]}}}}
  one: {{operator: noop, inputs: {{after: [plain]}}, resources: {{gpus_per_worker: 1, accelerator: L4}}}}
  two: {{operator: noop, inputs: {{after: [one]}}, resources: {{gpus_per_worker: GPUS, accelerator: H100}}}}
  line:
    operator: learn
    inputs: {{after: [plain]}}
    params: {{folder: PLACES, max_steps: {STEPS}, checkpoint_every: {EVERY}, batch_size: 8}}
    resources: {{cpus_per_worker: 2}}
"""
LEARNER = Path(__file__).parent.parent / "pipelines" / "slow_learner.py"
GROUPS = ("cpu", "l4", "h100")
NOTICE_S = 600  # how long a drained node has: longer than it takes
WAIT_S = 600.0  # how long anything may take, on a machine that is busy


class Written:
    """A user's folder with the pipeline and the profile."""

    def __init__(self, folder: Path) -> None:
        self.project, self.store, self.places = Project(folder), folder / "store", folder / "places"
        self.places.mkdir()
        (self.places / f"wait-{HOLD}").touch()
        (folder / LEARNER.name).write_text(LEARNER.read_text())
        self.profile, self.pipeline = folder / "profile.yaml", folder / "grows.yaml"
        self.write()

    def write(self, address: str = "127.0.0.1:1", gpus: int = 2) -> None:
        text = PIPELINE.replace("GPUS", str(gpus)).replace("TEXT", f"{self.project.folder}/text.txt")
        self.pipeline.write_text(text.replace("PLACES", str(self.places)))
        self.profile.write_text(PROFILE.format(address=address, store=self.store))

    @property
    def words(self) -> list[str]:
        return ["run", str(self.pipeline), "--cluster", str(self.profile)]

    def storage(self) -> Storage:
        return open_storage(str(self.store))

    def events(self, kind: str = "", step: str = "") -> list[Event]:
        found = runs(self.storage())
        events = history(self.storage(), found[0]) if found else []
        return [e for e in events if kind in ("", e.kind) and step in ("", e.step)]

    def attempts(self, step: str) -> list[list[int]]:
        """The steps of the optimizer that each attempt has measured."""
        logs = [e.data["log"] for e in self.events("start", step)]
        return [[line["done"] for line in measured(self.storage(), log)] for log in logs]


def test_what_no_group_can_grow_to_is_refused_before_anybody_is_asked_for_it(tmp_path, capsys):
    written = Written(tmp_path)
    written.write(gpus=4)
    assert main(written.words) == 2
    said = capsys.readouterr().err
    assert "step 'two': asks for 4 GPUs, expected at most 3, which is all there is." in said
    written.write(gpus=3)
    assert main(written.words) == 2
    assert "step 'two': asks for 1 x 1 CPU and 3 GPUs, each on one machine" in capsys.readouterr().err
    assert not runs(written.storage())


@dataclass(frozen=True, kw_only=True, slots=True)
class Grown:
    """What became of a run of which one node was drained: what its cluster saw, and what it wrote down itself."""

    seen: Seen
    printed: dict[str, object]
    events: Sequence[Event]
    attempts: Sequence[Sequence[int]]
    places: Sequence[str]
    drained: str


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """One run for all tests, as a head and a driver take seconds to come up."""
    written = Written(tmp_path_factory.mktemp("grows"))
    with autoscaling(read_profile(str(written.profile))) as (address, environment):
        written.write(address)
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *written.words], env=environment, stdout=subprocess.DEVNULL
        )
        try:
            until(lambda: [a for a in written.attempts("line") if max(a, default=0) >= 2 * EVERY], driver)
            (place,) = places(written)
            drain(address, place, NOTICE_S, environment)
            (written.places / f"wait-{HOLD}").unlink()
            assert driver.wait(WAIT_S) == 0
        finally:
            driver.kill()
            driver.wait()
        now = until(lambda: [s for s in [look(address, environment)] if sum(n.alive for n in s.nodes) == 1])[0]
        alone = [sys.executable, "-c", inspect.getsource(look_module), address]  # as the head of a cloud is asked
        asked = subprocess.run(alone, env=environment, cwd="/", check=True, capture_output=True, text=True)
    return Grown(
        seen=now,
        printed=json.loads(asked.stdout),
        events=written.events(),
        attempts=written.attempts("line"),
        places=places(written),
        drained=place,
    )


def until(what, driver=None):
    """What there is, as soon as there is something."""
    limit = time.monotonic() + WAIT_S
    while not (found := what()):
        assert driver is None or driver.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    return found


def places(written):
    """The nodes where the line was learnt, in that order."""
    files = sorted(written.places.glob("*.json"), key=lambda p: p.name.split("-")[1])
    return [json.loads(p.read_text())["node"] for p in files]


@pytest.mark.ray
@pytest.mark.slow
def test_each_group_comes_when_a_step_asks_for_it_and_goes_when_none_does(grown):
    # Each was there once, for its own step, and has gone: what the cluster has seen.
    assert {n["group"] for n in grown.printed["nodes"]} > {"head", *GROUPS}
    own = [n for n in grown.seen.nodes if n.group in GROUPS]
    assert sorted(n.group for n in own) == sorted(GROUPS)
    began = {n.group: n.began for n in own}
    assert began["cpu"] < began["l4"] < began["h100"]

    # And what the run has written down, from none to none but for the last step's.
    assert grown.events[-1].data["status"] == "done"
    counts = [e.data["nodes"] for e in grown.events if e.kind == "nodes"]
    assert counts[0] == {"cpu": 1}
    assert {group for count in counts for group in count} >= {*GROUPS}
    assert all(count.get(group, 1) == 1 for count in counts for group in GROUPS)


@pytest.mark.ray
@pytest.mark.slow
def test_a_spot_node_that_is_drained_costs_an_interval_at_most(grown):
    (failed,) = [e.data for e in grown.events if e.kind == "fail"]
    assert (failed["error"], failed["class"]) == ("Preempted", "preemption")
    before, after = grown.attempts
    assert max(before) >= HOLD
    assert max(before) - min(after) < EVERY, "no more than an interval is learnt again"
    assert {*before, *after} == set(range(1, STEPS + 1))

    # It went on where the autoscaler brought another machine, and the drained one has gone.
    first, second = (next(n for n in grown.seen.nodes if n.id == place) for place in grown.places)
    assert (first.id, first.group, first.market) == (grown.drained, "spot", "spot")
    assert second.group in ("spot", "steady")
    assert first.began < first.ended
    assert first.began < second.began
    counts = [e.data["nodes"] for e in grown.events if e.kind == "nodes"]
    assert {*counts[-1]} <= {first.group, second.group}, "the others have gone before"
    assert any(first.group in count for count in counts)
