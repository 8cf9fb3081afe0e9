"""Names -> artifacts: versions that stay and aliases that move. This is the truth; MLflow mirrors it.

registry/<name>/versions/<number>.json   each written once, the numbers without a gap
registry/<name>/aliases.json             alias -> number, replaced as a whole
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from lfm.errors import LfmError, UnknownName
from operators.registration import check_alias, check_name
from pipelines.faults import reached
from pipelines.storage.base import MANIFEST, Storage, at_once
from pipelines.store import canonical


class UnknownVersion(LfmError, LookupError):
    """A version that a registered name does not have."""

    def __init__(self, name: str, version: str, last: int) -> None:
        super().__init__(name, version, last)
        self.name, self.version, self.last = name, version, last

    def __str__(self) -> str:
        return f"registered name {self.name!r}: version {self.version!r}, expected a number from 1 to {self.last}."


class NotStored(LfmError, LookupError):
    """A model from outside, which the registry could name but not hand out."""

    def __init__(self, name: str, digest: str) -> None:
        super().__init__(name, digest)
        self.name, self.digest = name, digest

    def __str__(self) -> str:
        return (
            f"register: name={self.name!r} for digest {self.digest[:12]}, which is not in the store, expected what a "
            "step has made. Register what comes of it, not an input of the pipeline."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One artifact under a name.

    Attributes:
        run: The run whose step registered it first.
        about: The artifact's own.
    """

    name: str
    number: int
    digest: str
    kind: str
    run: str = ""
    step: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Registry:
    """All registered names of one storage."""

    storage: Storage

    def names(self) -> tuple[str, ...]:
        """Every name that has a version, sorted."""
        return self.storage.folders("registry")

    def versions(self, name: str) -> tuple[Version, ...]:
        """All versions of a name, oldest first; none where nothing is called so."""
        keys = self.storage.list(f"registry/{name}/versions")
        return tuple(Version(**json.loads(data or b"{}")) for data in at_once(self.storage.read, keys))

    def aliases(self, name: str) -> dict[str, int]:
        """The number that each alias of a name points at."""
        found: dict[str, int] = json.loads(self.storage.read(f"registry/{name}/aliases.json") or b"{}")
        return found

    def register(
        self, name: str, digest: str, kind: str, *, run: str = "", step: str = "", about: Mapping[str, Any]
    ) -> Version:
        """The version that `digest` has under `name`: the one that it was given before, or a new one.

        Raises:
            BadRegisteredName: The name cannot be one.
            NotStored: The store has no such artifact.
        """
        check_name(name)
        if self.storage.read(f"artifacts/{digest}/{MANIFEST}") is None:
            raise NotStored(name, digest)
        made = partial(Version, name=name, digest=digest, kind=kind, run=run, step=step, about=about)
        while True:
            there = self.versions(name)
            same = [v for v in there if v.digest == digest]
            if same:
                return same[0]
            # Whoever loses the number reads again what the winner wrote: it may be the same digest.
            version = made(number=len(there) + 1)
            key = f"registry/{name}/versions/{version.number:06}.json"
            reached("register: before the version")
            if self.storage.put_if_absent(key, canonical(asdict(version))):
                reached("register: version is in")
                return version

    def point(self, name: str, alias: str, number: int) -> None:
        """Move an alias, which may be new, to a version.

        Raises:
            BadRegisteredName: The alias cannot be one.
        """
        check_alias(alias)
        key = f"registry/{name}/aliases.json"
        while True:
            old = self.storage.read(key)
            wanted = {**json.loads(old or b"{}"), alias: number}
            data = canonical(wanted)
            if data == old:
                return
            written = (
                self.storage.put_if_absent(key, data) if old is None else self.storage.replace_if_match(key, data, old)
            )
            if written:
                reached("register: alias has moved")
                return

    def find(self, reference: str) -> Version:
        """What ``name@alias`` or ``name:number`` means.

        Raises:
            UnknownName: No such name, or no such alias of it.
            UnknownVersion: It has no such version.
        """
        at = "@" if "@" in reference else ":"
        name, _, which = reference.partition(at)
        there = self.versions(name)
        if not there:
            raise UnknownName("registered model", name, self.names())
        if at == "@":
            aliases = self.aliases(name)
            if which not in aliases:
                raise UnknownName(f"alias of {name!r}", which, sorted(aliases))
            return there[aliases[which] - 1]
        if not which.isdecimal() or not 1 <= int(which) <= len(there):
            raise UnknownVersion(name, which, len(there))
        return there[int(which) - 1]
