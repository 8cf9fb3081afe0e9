"""`lfm export`: write a model, an adapter or what belongs to a model into a folder that others load."""

import json
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm.errors import LfmError
from operators.artifact import KINDS, REWRITES, Adapter, Model, kind_of
from pipelines.ancestry import Ancestor, ancestry, find_artifact, find_maker
from pipelines.card import model_card
from pipelines.commands._output import printed
from pipelines.inputs import buckets, hub
from pipelines.inputs.inspector import fetch
from pipelines.inputs.model_files import OURS, STEMS
from pipelines.storage.base import DamagedFolder, copied, named
from pipelines.storage.opening import open_storage
from pipelines.store import MANIFEST, Store

CARD, CONFIG, BASE = "README.md", "adapter_config.json", "base"
EXPORTED = tuple(kind_of(kind) for kind in STEMS)


class NotExportable(LfmError, ValueError):
    """Something that is neither a model nor belongs to one."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name, kind)
        self.name, self.kind = name, kind

    def __str__(self) -> str:
        return f"export: {self.name!r} is a {self.kind}, expected one of {', '.join(EXPORTED)}. Name another step."


class FolderTaken(LfmError, FileExistsError):
    """A place for an export where something lies already."""

    def __init__(self, folder: str, what: str) -> None:
        super().__init__(folder, what)
        self.folder, self.what = folder, what

    def __str__(self) -> str:
        return f"export: {self.folder!r} {self.what}, expected a new or an empty folder. Give another."


class BaseUnknown(LfmError, LookupError):
    """An adapter of whose base the store knows nothing."""

    def __init__(self, name: str, digest: str) -> None:
        super().__init__(name, digest)
        self.name, self.digest = name, digest

    def __str__(self) -> str:
        return (
            f"export: {self.name!r} is an adapter of digest {self.digest[:12] or 'unknown'}, expected a base that its "
            "lineage or the store knows. Run the step that makes it again."
        )


def act(arguments: Namespace) -> int:
    """Write a model, an adapter or what belongs to a model into a folder that others load."""
    store = Store(open_storage(arguments.store))
    name, folder = arguments.artifact, Path(arguments.folder).expanduser().absolute()
    digest = find_artifact(store, name)
    kind = store.manifest(digest)["kind"]
    if kind not in EXPORTED:
        raise NotExportable(name, kind)
    found = ancestry(store, digest, find_maker(store, name))
    if folder.exists() and not folder.is_dir():
        raise FolderTaken(str(folder), "is a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise FolderTaken(str(folder), "is not empty")
    try:
        with named(f"export {str(folder)!r}"):
            base = exported(store, found, folder, name=name)
    except BaseException:
        for path in folder.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    if arguments.json:
        return printed({"kind": kind, "digest": digest, "folder": str(folder), "base": base, "files": files})
    print(f"{kind} digest {digest} is in {folder}: {len(files)} files, {sum(files.values())} bytes")
    if base:
        print(f"its base: {base}")
    return 0


def exported(store: Store, found: Sequence[Ancestor], folder: Path, *, name: str) -> str:
    """Copy the first of `found` and write a model's or an adapter's card; of an adapter, where its base is.

    Raises:
        BaseUnknown: Nobody knows an adapter's base.
        DamagedFolder: What is in the store is not what was put there.
    """
    one = found[0]
    _copied(store, one.digest, folder)
    if KINDS[one.kind] in OURS:  # a file of its own says which model it belongs to
        return ""
    base = _based(store, found, folder, name=name) if one.kind == kind_of(Adapter) else ""
    title = one.made_by.step if one.made_by is not None else one.digest[:12]
    own = (folder / REWRITES).is_file()
    (folder / CARD).write_text(model_card(store, found, name=title, base=base, own=own))
    return base


def _copied(store: Store, digest: str, folder: Path) -> None:
    """Copy an artifact, byte by byte: a link would lead to files that nobody may change."""
    source = store.get(digest).path
    for file, expected in store.manifest(digest)["files"].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if copied(source / file, path) != expected["sha256"]:
            raise DamagedFolder(f"artifact {digest[:12]}", file)


def _based(store: Store, found: Sequence[Ancestor], folder: Path, *, name: str) -> str:
    """Write into an adapter's config where its base is, as PEFT looks for it, and return that.

    That is the hub's name or a local folder where it came from there; else the base is copied beside the adapter.
    """
    wanted = str(store.manifest(found[0].digest)["about"].get("base", ""))
    base = next((a for a in found[1:] if a.digest == wanted), None)
    where: Mapping[str, Any]
    if base is not None and base.uri.startswith(hub.SCHEME):
        repository, _, revision = base.uri.removeprefix(hub.SCHEME).partition("@")
        where = {"base_model_name_or_path": repository, "revision": revision or None}
    elif base is not None and base.uri and "://" not in base.uri:
        where = {"base_model_name_or_path": base.uri, "revision": None}
    else:
        if base is not None and base.uri.startswith(buckets.SCHEME):
            there = fetch(Model(base.uri, base.digest)).path
            shutil.copytree(there, folder / BASE, copy_function=shutil.copyfile)
        elif store.storage.read(f"artifacts/{wanted}/{MANIFEST}") is not None:
            _copied(store, wanted, folder / BASE)
        else:
            raise BaseUnknown(name, wanted)
        where = {"base_model_name_or_path": str(folder / BASE), "revision": None}
    path = folder / CONFIG
    if path.is_file():  # whoever loads another kind of adapter says where its base is, as the card does
        path.write_text(json.dumps({**json.loads(path.read_text()), **where}, indent=2, sort_keys=True) + "\n")
    return str(where["base_model_name_or_path"])
