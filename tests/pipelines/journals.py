"""A run written by hand, as its driver and its steps write it, in a moment and without Ray."""

import json
import os

from cluster import processes
from pipelines.lineage import Event, Journal
from pipelines.registry import Registry
from pipelines.store import canonical

TEXT = {"kind": "dataset", "uri": "/data/text.txt", "digest": "1" * 64}
BASE = {"kind": "model", "uri": "hf://someone/base@abc", "digest": "2" * 64}
RESOURCES = {"workers": 1, "accelerator": "cpu"}
BEGAN = 1_800_000_000.0
SETS = {"chat": {"documents": 3, "loss": 1.5, "digest": "7" * 8, "perplexity": 4.5}}


def planned(operator, kind, inputs, method=None, **params):
    return {
        "operator": operator, "kind": kind, "inputs": inputs, "method": method, "params": params,
        "resources": RESOURCES, "fingerprint": f"f-{operator}",
    }  # fmt: skip


def artifact(store, kind, text):
    folder = store.storage.scratch()
    (folder / "config.json").write_text(json.dumps(text))
    return store.put(folder, kind, {})


class Written:
    """The run `name` of the pipeline `pipeline`: a step is reused, one fails once, a model is judged and registered."""

    STEPS = {  # noqa: RUF012
        "prepared": planned("prepare", "dataset", {"data": "text"}),
        "tuned": planned(
            "tune", "adapter", {"model": "base", "data": "prepared"}, {"name": "lora", "rank": 4},
            max_steps=2, schedule=["warm", 0.5], note="as it is",
        ),
        "merged": planned("merge", "model", {"base": "base", "experts": ["tuned"]}, {"name": "ties", "density": 0.5}),
        "measured": planned("evaluate", "metrics", {"model": "merged", "data": {"chat": "prepared", "raw": "text"}}),
        "passed": planned("gate", "model", {"model": "merged", "results": {"all": "measured"}}),
        "named": planned("register", "model", {"model": "passed"}, name="helper"),
    }  # fmt: skip

    def __init__(self, store, name="r", pipeline="story"):
        self.store, self.name, self.pipeline = store, name, pipeline
        self.registered = f"{pipeline}-helper"
        self.made = {
            "prepared": artifact(store, "dataset", [pipeline, name, "p"]),
            "tuned": artifact(store, "adapter", [pipeline, name, "t"]),
            "merged": artifact(store, "model", [pipeline, name, "m"]),
            "measured": artifact(store, "metrics", [pipeline, name, "e"]),
        }
        self.made["passed"] = self.made["named"] = self.made["merged"]
        self.abouts = {
            "prepared": {"rows": 9},
            "tuned": {"base": BASE["digest"], "steps": 2, "packed": True},
            "merged": {"kept": 0.5},
            "measured": {"sets": SETS},
            "passed": {"kept": 0.5, "gate": [{"said": "better", "mean": -0.25}]},
            "named": {"kept": 0.5, "gate": [{"said": "better", "mean": -0.25}]},
        }
        dead = {"host": processes.host(), "pid": os.getpid(), "born": 1.0}
        epoch = claim_as(store, name, dead)
        self.journal = Journal(store.storage, name, epoch)
        self.clock = BEGAN

    def write(self, kind, step="", **data):
        self.clock += 1
        self.journal.write([Event(kind, step, data, self.clock)])

    def begin(self, *steps, **changes):
        chosen = {s: {**self.STEPS[s], **changes} for s in steps or self.STEPS}
        spec = {"name": self.pipeline}
        inputs = {"text": TEXT, "base": BASE}
        self.write("started", run=self.name, spec=spec, inputs=inputs, steps=chosen, version="0.1.0")

    def trial(self, of, **changes):
        """As a trial of a run, which judges a model that is there."""
        spec = {"name": self.pipeline}
        steps = {n: self.STEPS[n] for n in ("prepared", "tuned", "merged", "measured")}
        noted = {"of": of, "step": "found", "names": {"result": "merged", "judged": "measured"}, "changes": changes}
        inputs = {"text": TEXT, "base": BASE}
        self.write("started", run=self.name, spec=spec, inputs=inputs, steps=steps, version="0.1.0", trial=noted)
        for step in ("prepared", "tuned", "merged"):
            self.reuse(step)
        self.start("measured")
        self.commit("measured")
        self.end()
        return self

    def start(self, step, attempt=1):
        log = f"runs/{self.name}/logs/{step}/{attempt}.log"
        self.write("start", step, attempt=attempt, log=log)

    def measure(self, step, attempt, *losses):
        """Losses of the steps 1, 2, ..., and a line that only says how far it is."""
        lines = [
            {"done": i, "total": len(losses), "time": self.clock + i / 100, "measures": {"loss": loss}}
            for i, loss in enumerate(losses, 1)
        ]
        lines.insert(1, {"done": 1, "total": len(losses), "time": self.clock})
        key = f"runs/{self.name}/measures/{step}/{attempt}.jsonl"
        self.store.storage.append(key, "".join(json.dumps(one) + "\n" for one in lines).encode())

    def commit(self, step, attempt=1):
        about = self.abouts[step]
        if step == "named":
            registry = Registry(self.store.storage)
            version = registry.register(
                self.registered, self.made[step], "model", run=self.name, step=step, about={}
            ).number
            registry.point(self.registered, "champion", version)
            about = {**about, "registered": {"name": self.registered, "version": version, "alias": "champion"}}
        self.write("commit", step, artifact=self.STEPS[step]["kind"], digest=self.made[step], about=about, seconds=1.0,
                   attempt=attempt)  # fmt: skip

    def reuse(self, step):
        self.write("reuse", step, artifact=self.STEPS[step]["kind"], digest=self.made[step],
                   about=self.abouts[step], run="earlier", seconds=1.0)  # fmt: skip

    def fail(self, step, attempt):
        self.write("fail", step, error="ValueError", sentence="asked to fail", log="x", seconds=1.0, attempt=attempt)

    def end(self, status="done"):
        self.write("finished", status=status)

    def whole(self):
        """All of it."""
        self.begin()
        self.reuse("prepared")
        self.start("tuned")
        self.measure("tuned", 1, 3.0, 2.5)
        self.fail("tuned", 1)
        self.start("tuned", 2)
        self.measure("tuned", 2, 2.5, float("nan"))
        self.commit("tuned", 2)
        for step in ("merged", "measured", "passed", "named"):
            self.start(step)
            self.commit(step)
        self.end()
        return self

    def cached(self):
        """Nothing of it is executed."""
        self.begin("prepared")
        self.reuse("prepared")
        self.end()
        return self


def claim_as(store, run, process):
    """Have a process, which may be dead, be the run's next driver."""
    epoch = len(store.storage.list(f"runs/{run}/claims")) + 1
    counts = len(store.storage.list(f"runs/{run}/journal"))
    store.storage.put_if_absent(f"runs/{run}/claims/{epoch:06}.json", canonical({**process, "counts": counts}))
    return epoch
