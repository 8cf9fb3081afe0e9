"""Module -> library: what is installed under a name, as text that changes with what it does."""

import functools
import hashlib
import importlib.metadata
import json
from importlib.machinery import PathFinder
from pathlib import Path


def version_of(top: str) -> str | None:
    """What a library is: its version, or a digest of its files where there is none or where they are being edited."""
    version, tells_all = _installed(top)
    return " ".join(filter(None, (version, "" if tells_all else _source_digest(top)))) or None


@functools.cache
def _installed(top: str) -> tuple[str, bool]:
    """The versions of what was installed as the module `top`, and whether these say what it does."""
    try:
        owners = [importlib.metadata.distribution(top)]
    except importlib.metadata.PackageNotFoundError:
        owners = [importlib.metadata.distribution(name) for name in sorted({*_owners().get(top, ())})]
    return " ".join(d.version for d in owners), bool(owners) and not any(map(_editable, owners))


_owners = functools.cache(importlib.metadata.packages_distributions)  # which reads everything that is installed


def _editable(installed: importlib.metadata.Distribution) -> bool:
    told = json.loads(installed.read_text("direct_url.json") or "{}")
    return bool(told.get("dir_info", {}).get("editable"))


def _source_digest(top: str) -> str:
    """Of the bytes of a module's files, wherever Python finds them; empty where it finds none."""
    spec = PathFinder.find_spec(top)
    if spec is None:
        return ""
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".so", ".pyd")]
    found = hashlib.sha256()
    for file in sorted(files) if folders else [Path(str(spec.origin))]:
        found.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return f"files {found.hexdigest()[:16]}"
