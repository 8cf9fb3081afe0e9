"""Results -> what an artifact came from, down to the data."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lfm.errors import LfmError
from pipelines.lineage import find_run, history, runs
from pipelines.registry import Registry
from pipelines.storage.base import Storage, at_once
from pipelines.store import MissingArtifact, Result, Store


class UnknownArtifact(LfmError, LookupError):
    """A name that stands for no artifact."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, known

    def __str__(self) -> str:
        return (
            f"{self.name!r} names no artifact, expected RUN/STEP, a step of some run, a registered NAME@ALIAS or "
            "NAME:VERSION, or the first letters of a digest. Steps that made something: "
            f"{', '.join(self.known) or 'none'}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ancestor:
    """One thing that an artifact came from.

    Attributes:
        depth: How many steps lie between it and what was asked for.
        made_by: The result that it is of; None for what came from outside.
        remade: Where the step that made it has made something else since: that result.
    """

    depth: int
    role: str
    digest: str
    kind: str = ""
    uri: str = ""
    made_by: Result | None = None
    remade: Result | None = None


def ancestry(store: Store, digest: str, maker: Result | None = None) -> list[Ancestor]:
    """An artifact and everything it came from, each followed by its own inputs; what is met again is not opened.

    A step that lets its input through (a gate) makes what another made before: the digest is the same. Where one
    result's inputs say by fingerprint which step they came from, that step is the maker; else the one is, of all
    that made the digest, that is not among those met on the way.

    Args:
        store: Where results are.
        digest: What is asked about.
        maker: The step that is asked about, where it is known.
    """
    return list(_Walk(store).down({"digest": digest, "kind": "", "uri": ""}, "", 0, maker, ()))


class _Walk:
    """One look at all results."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.named: dict[str, Result] = {}
        self.makers: dict[str, list[Result]] = {}
        self.opened: set[str] = set()
        for one in results(store):
            self.named[one.fingerprint] = one
            self.makers.setdefault(one.digest, []).append(one)

    def down(
        self, source: Mapping[str, Any], role: str, depth: int, named: Result | None, way: tuple[str, ...]
    ) -> Iterator[Ancestor]:
        """What fills an edge, and then what that came from.

        `named` is the result of the step that it is known to be from, `way` are the fingerprints of what it went into.
        """
        remade = named if named is not None and named.digest != source["digest"] else None
        maker = self.maker(source["digest"], way) if named is None or remade else named
        kind = source["kind"] or (maker.kind if maker else self.kind(source["digest"]))
        yield Ancestor(depth=depth, role=role, made_by=maker, remade=remade, **{**source, "kind": kind})
        if maker is None or maker.fingerprint in self.opened:
            return
        self.opened.add(maker.fingerprint)
        for name, one, fingerprint in sources(maker):
            yield from self.down(one, name, depth + 1, self.named.get(fingerprint), (*way, maker.fingerprint))

    def maker(self, digest: str, way: tuple[str, ...]) -> Result | None:
        """What made a digest, where nothing says which step it was.

        Of what is asked about that is the last that handed it on; of what it came from, one that did not get it.
        """
        found = [r for r in self.makers.get(digest, ()) if r.fingerprint not in way]
        handed = {fingerprint for r in found for _, _, fingerprint in sources(r)}

        def rank(one: Result) -> tuple[bool, bool, str, str]:
            hands_on = any(source["digest"] == digest for _, source, _ in sources(one))
            return hands_on is not bool(way), one.fingerprint not in handed, one.run, one.fingerprint

        return max(found, key=rank, default=None)

    def kind(self, digest: str) -> str:
        """What an artifact is that no result speaks of."""
        try:
            return str(self.store.manifest(digest)["kind"])
        except MissingArtifact:
            return ""


def ancestor_line(one: Ancestor) -> str:
    """One line of an ancestry: what it is, what made it, its digest."""
    role = f"{one.role}: " if one.role else ""
    return f"{'  ' * one.depth}{role}{one.kind} {_origin(one)} digest {one.digest}"


def _origin(one: Ancestor) -> str:
    if one.made_by is None and one.remade is not None:
        return f"{_made_by(one.remade)}, which has made digest {one.remade.digest} since,"
    if one.made_by is None:
        return one.uri or "of a step that the store has forgotten"
    return _made_by(one.made_by)


def _made_by(result: Result) -> str:
    method = result.components["method"]
    return f"{result.step} ({result.components['operator']}){f' {method[0]}' if method else ''}"


def sources(result: Result) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """What a step took: the edge and the place in it, ``{kind, digest, uri}``, and its maker's fingerprint if known."""
    for edge, filled in result.inputs.items():
        known = result.components.get("inputs", {}).get(edge)
        if isinstance(filled, list):
            for i, one in enumerate(filled):
                yield f"{edge}[{i}]", one, known[i] if known else ""
        elif isinstance(filled.get("digest"), str):
            yield edge, filled, known[0] if known else ""
        else:
            for name, one in filled.items():
                yield f"{edge}.{name}", one, known[name] if known else ""


def results(store: Store) -> list[Result]:
    """Every result in the store."""
    names = [k.removeprefix("results/").removesuffix(".json") for k in store.storage.list("results")]
    return [r for r in at_once(store.result, names) if r is not None]


def find_artifact(store: Store, name: str) -> str:
    """The digest that `name` means.

    It is ``RUN/STEP``, a ``STEP`` of the last run that made it, ``NAME@ALIAS`` or ``NAME:VERSION`` of the registry, or
    how a digest begins.

    Raises:
        UnknownArtifact: None, or more than one.
        UnknownRun: No such run.
        UnknownName: Nothing is registered so.
        UnknownVersion: It has no such version.
    """
    return _found(store, name)[0]


def find_maker(store: Store, name: str) -> Result | None:
    """The step that made what `name` means, where the name says so; an effect's too, which is no stored result.

    Raises:
        UnknownArtifact: As `find_artifact`.
        UnknownRun: No such run.
    """
    _, run, step = _found(store, name)
    return recorded(store.storage, run)[step] if run else None


def _found(store: Store, name: str) -> tuple[str, str, str]:
    """A digest, and the run and step that were named."""
    if re.fullmatch(r"[\w.-]+[@:][\w-]+", name):
        return Registry(store.storage).find(name).digest, "", ""
    if re.fullmatch("[0-9a-f]{6,64}", name):
        found = [d for d in store.storage.folders("artifacts") if d.startswith(name)]
        if len(found) == 1:
            return found[0], "", ""
    run, slash, step = name.rpartition("/")
    made: dict[str, str] = {}
    for one in (find_run(store.storage, run),) if slash else reversed(runs(store.storage)):
        made = {**_made(store.storage, one), **made}
        if step in made:
            return made[step], one, step
    raise UnknownArtifact(name, tuple(made))


def _made(storage: Storage, run: str) -> dict[str, str]:
    """The digests of what a run's steps made, by step."""
    return {e.step: str(e.data["digest"]) for e in history(storage, run) if e.kind in ("commit", "reuse")}


def recorded(storage: Storage, run: str) -> dict[str, Result]:
    """What each step of a run made, by its name, as the run's journal has it: effects too, which the store forgets.

    What was reused took what it took when it was made: as the store has it, where that still has it. So did what
    hands on more than its inputs, as a search does.
    """
    events = history(storage, run)
    began = [e.data for e in events if e.kind == "started"][-1]
    made = {e.step: e for e in events if e.kind in ("commit", "reuse")}

    def source(name: str) -> dict[str, str]:
        if name in began["inputs"]:
            return dict(began["inputs"][name])
        return {"kind": made[name].data["artifact"], "digest": made[name].data["digest"], "uri": ""}

    found = {}
    wanted = [
        began["steps"][step] for step, event in made.items() if event.kind == "reuse" or "search" in event.data["about"]
    ]
    prints = [planned["fingerprint"] for planned in wanted]
    stored = {r.fingerprint: r for r in at_once(Store(storage).result, prints) if r is not None}
    for step, event in made.items():
        planned = began["steps"][step]
        known = stored.get(planned["fingerprint"])
        if known is not None and known.digest == event.data["digest"]:
            found[step] = replace(known, step=step)
            continue
        found[step] = Result(
            fingerprint=planned["fingerprint"],
            kind=event.data["artifact"],
            digest=event.data["digest"],
            about=event.data["about"],
            run=event.data.get("run", run),
            step=step,
            seconds=event.data["seconds"],
            inputs={edge: _filled(names, source) for edge, names in planned["inputs"].items()},
            components=planned["components"],
        )
    return found


def _filled(names: Any, source: Callable[[str], dict[str, str]]) -> Any:
    """What fills an edge, in its shape."""
    if isinstance(names, str):
        return source(names)
    if isinstance(names, Mapping):
        return {k: source(n) for k, n in names.items()}
    return [source(n) for n in names]
