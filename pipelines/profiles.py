"""A profile's file -> Profile, and whether what a pipeline needs can be read where it says."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cluster.machines import located
from cluster.profile import STORES, Group, Head, Profile
from cluster.tokens import VARIABLES, authenticated
from lfm.errors import LfmError
from operators.artifact import Artifact
from pipelines.credentials import masked
from pipelines.fields import object_of
from pipelines.problems import Part, Problem, SpecError, near, shown
from pipelines.storage.base import cache
from pipelines.text import Text


class OutOfReach(LfmError, ValueError):
    """A cluster to which only its own machines connect."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__(name, place)
        self.name, self.place = name, place

    def __str__(self) -> str:
        return (
            f"cluster {self.name!r}: only its own machines connect to a place {self.place!r}, expected 'local' or "
            "'address'. Use lfm submit, which has it drive the run itself."
        )


def read_profile(name: str) -> Profile:
    """Read a profile's file.

    Raises:
        SpecError: There is no such file, or something is wrong with it: all of that at once.
    """
    path = Path(name)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        fix = f"{near(name, beside)} 'lfm cluster init' writes one."
        raise SpecError((f"profile {name!r}: no such file, expected a .yaml file. {fix}",))
    text = Text(path.read_text(encoding="utf-8-sig"), path.name)
    profile, problems = profile_of(text.raw)
    if profile is None or text.problems:
        raise SpecError(text.places.sentences([*text.problems, *problems]))
    return profile


def profile_of(raw: Any) -> tuple[Profile | None, list[Problem]]:
    """A profile, or None, and everything that is wrong with it."""
    if not isinstance(raw, dict):
        return None, [Problem((), f"{shown(raw)}, expected a mapping. 'lfm cluster init' writes one.")]
    problems: list[Problem] = []
    given = dict(raw)
    head = _part(("head",), given.get("head"), Head, "head", problems)
    groups = given.get("groups") or {}
    if not isinstance(groups, dict):
        problems.append(Problem(("groups",), f"groups: {shown(groups)}, expected a mapping of names to groups."))
        groups = {}
    made = {n: _part(("groups", n), g, Group, f"group {n!r}", problems) for n, g in groups.items()}
    if head is None or None in made.values():  # what depends on them would only repeat that
        given = {k: v for k, v in given.items() if k not in ("head", "groups")}
        _, wrong = object_of(Profile, {**given, "head": Head(cpus=1, memory_gib=1)}, "profile")
    else:
        found, wrong = object_of(Profile, {**given, "head": head, "groups": made}, "profile")
        if found is not None and not problems:
            return found, []
    return None, [*problems, *(Problem(path, sentence) for path, sentence in wrong)]


def _part(path: Part, raw: Any, cls: type[Any], what: str, problems: list[Problem]) -> Any:
    if not isinstance(raw, dict):
        problems.append(Problem(path, f"{what}: {shown(raw)}, expected a mapping with cpus, memory_gib and more."))
        return None
    made, wrong = object_of(cls, raw, what, [f.name for f in fields(cls)])
    problems += [Problem((*path, *below), sentence) for below, sentence in wrong]
    return made


def records() -> Path:
    """Where it is written down what `lfm cluster up` has started on this machine."""
    return cache() / "clusters"


def reached(profile: Profile) -> Profile:
    """The profile with the address of its cluster, which this machine can connect to; its token is in the environment.

    Raises:
        NotUp: It is one of this machine, and not up.
        OutOfReach: It is one that this machine cannot connect to.
    """
    if profile.place not in ("local", "address"):
        raise OutOfReach(profile.name, profile.place)
    there = located(profile, records())
    told = authenticated(os.environ, there.token)
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(told)
    return there


def unreadable(
    profile: Profile, *, store: str, mlflow: str, inputs: Mapping[str, Artifact] | None = None
) -> Iterator[Problem]:
    """Everything that a profile's other machines could not read: a folder of this one, a server of its own.

    Args:
        profile: Where the pipeline is to run.
        store: Where its artifacts are kept.
        mlflow: Where MLflow keeps its runs; empty or ``none`` keeps none, ``own`` is beside the artifacts.
        inputs: What comes from outside.
    """
    where = f"the {profile.most_nodes} machines of profile {profile.name!r}"
    if not store:
        yield Problem(("storage",), f"profile {profile.name!r}: no storage, expected {STORES}.")
    elif not profile.readable(store):
        yield Problem(("storage",), f"storage: {where} cannot read {masked(store)!r}, expected {STORES}.")
    if mlflow not in ("", "none", "own") and not profile.readable(mlflow):
        allowed = "a server that every machine reaches, 'own' or 'none'"
        yield Problem(("mlflow",), f"mlflow: {where} cannot read {masked(mlflow)!r}, expected {allowed}.")
    for name, artifact in (inputs or {}).items():
        if not _named(artifact.uri) and not profile.readable(artifact.uri):
            allowed = "a URI such as s3://BUCKET/KEY or hf://NAME, or a path below 'shared'"
            yield Problem(("inputs", name), f"{where} cannot read {artifact.uri!r}, expected {allowed}.")


def _named(uri: str) -> bool:
    """Whether a URI names what each machine has, or finds in the store."""
    return uri.startswith(("python://", "lfm://"))
