"""Plans of any shape, whose steps do next to nothing, and what each of them makes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from operators.code import Code
from operators.resources import Resources
from pipelines.plan import Plan, PlannedStep
from pipelines.spec import Spec
from pipelines.store import canonical

OWN = '''
"""Operators that write down what they were given."""

from collections.abc import Sequence

from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace


def written(work: Workspace, after: Sequence[Dataset], word: str, fail: str) -> Dataset:
    """Keep a checkpoint, fail if asked to, and write a word and what came before."""
    (work.scratch / "checkpoint").mkdir()
    (work.scratch / "checkpoint" / "manifest.json").write_text("{}")
    work.keep(work.scratch / "checkpoint")
    work.progress(1, 1, loss=0.5)
    if fail:
        raise {"raise": ValueError, "other": RuntimeError, "memory": MemoryError}[fail]("asked to")
    before = " ".join((one.path / "text.txt").read_text() for one in after)
    (work.scratch / "made").mkdir()
    (work.scratch / "made" / "text.txt").write_text(f"{word}({before})")
    return work.save(Dataset, work.scratch / "made")


@operator()
def made(work: Workspace, *, after: Sequence[Dataset] = (), word: str, fail: str = "") -> Dataset:
    """Write it."""
    return written(work, after, word, fail)


@operator(effect=True)
def told(work: Workspace, *, after: Sequence[Dataset] = (), word: str, fail: str = "") -> Dataset:
    """The same, of which nobody knows what else it changes."""
    return written(work, after, word, fail)
'''
CODE = Code(("graphs.py",), (("graphs.py", OWN),))


@dataclass(frozen=True)
class Step:
    """One step of a graph; those with equal fields make the same."""

    needs: tuple[str, ...] = ()
    word: str = "x"
    effect: bool = False
    memory: int = 0


def planned(graph: Mapping[str, Step], only: Sequence[str] = ()) -> Plan:
    """The plan of a graph, or of some of its steps, which come in the order of their names."""
    prints: dict[str, str] = {}
    steps = {}
    for name, step in sorted(graph.items()):
        components = {"word": step.word, "effect": step.effect, "inputs": [prints[n] for n in step.needs]}
        prints[name] = hashlib.sha256(repr(components).encode()).hexdigest()
        steps[name] = _planned(name, step, prints[name], components)
    chosen = {n: s for n, s in steps.items() if not only or n in only}
    return Plan(spec=Spec(name="graph", inputs={}, steps={}, code=CODE), inputs={}, steps=chosen)


def _planned(name: str, step: Step, fingerprint: str, components: Mapping[str, Any]) -> PlannedStep:
    return PlannedStep(
        name=name,
        operator="told" if step.effect else "made",
        inputs={"after": step.needs},
        method=None,
        params={"word": step.word, "fail": ""},
        resources=Resources(memory=step.memory),
        kind="dataset",
        effect=step.effect,
        starts_workers=False,
        trains=False,
        needs=step.needs,
        fingerprint=fingerprint,
        components=components,
    )


def digests_of(graph: Mapping[str, Step]) -> dict[str, str]:
    """The digest of what each step makes, where nothing goes wrong."""
    texts: dict[str, str] = {}
    for name, step in sorted(graph.items()):
        texts[name] = f"{step.word}({' '.join(texts[n] for n in step.needs)})"
    found = {}
    for name, text in texts.items():
        file = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "size": len(text)}
        manifest = canonical({"about": {}, "files": {"text.txt": file}, "kind": "dataset"})
        found[name] = hashlib.sha256(manifest).hexdigest()
    return found
