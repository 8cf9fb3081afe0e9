"""Inputs from S3: ``s3://bucket/key`` or ``s3://bucket/folder``, pinned by what S3 says of their bytes."""

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TypeVar

from operators.artifact import Artifact
from pipelines.inputs.model_files import headed, lacking, needed
from pipelines.inputs.outlines import outline
from pipelines.plan import InputProblem
from pipelines.storage import s3_client
from pipelines.storage.base import StorageFailed, at_once, below, cache, remove

SCHEME = "s3://"

A = TypeVar("A", bound=Artifact)


def check(artifact: A) -> A | None:
    """The same with a local path to the headers of its files, where these can be told from a part of them.

    Raises:
        InputProblem: It is not, or it is empty, or no model or adapter in safetensors, or S3 does not let us look.
    """
    found = _objects(artifact)
    if not found:
        raise InputProblem(artifact.uri, "is not there", "Check the name and AWS_ENDPOINT_URL.")
    if not any(o.size for o in found.values()):
        raise InputProblem(artifact.uri, "is empty", "Give a key or folder with something in it.")
    problem = lacking(type(artifact), list(found))
    if problem is not None:
        raise InputProblem(artifact.uri, *problem)
    bucket, key = s3_client.split(artifact.uri)
    alone = _name(artifact.uri) if "" in found else ""
    objects = {alone: found[""]} if alone else {n: found[n] for n in headed(type(artifact), list(found))}

    def part(name: str, start: int, stop: int) -> bytes:
        return s3_client.part(bucket, objects[name], start, stop)

    with _looking(artifact):
        name = f"s3/{bucket}/{key}@{_digest(objects)[:12]}"
        folder = outline(name, {n: o.size for n, o in objects.items()}, part)
    return None if folder is None else replace(artifact, uri=str(folder / alone))


def pin(artifact: A) -> A:
    """The same with a digest of names, sizes and ETags; of a single object's name only the ending counts."""
    return replace(artifact, digest=_pinned(artifact, _wanted(artifact)))


def fetch(artifact: A) -> A | None:
    """The same with a path in this machine's cache, or None where it is not what was pinned any more."""
    found = _wanted(artifact)
    if _pinned(artifact, found) != artifact.digest:
        return None
    target = cache() / "inputs" / artifact.digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{artifact.digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir() and not _downloaded(artifact.uri, found, target):
            return None
    # The object may have come under another name, from a place that holds the same.
    return replace(artifact, uri=str(next(target.iterdir()) if "" in found else target))


def _downloaded(uri: str, found: Mapping[str, s3_client.Object], target: Path) -> bool:
    """Whether all objects were still the same when they had come; then they lie at `target`."""
    bucket, _ = s3_client.split(uri)
    folder = target.with_name(uuid.uuid4().hex)

    def get(name: str) -> bool:
        one = found[name]
        path = below(folder, name or _name(uri), uri)
        s3_client.download(bucket, one.key, path)
        path.chmod(0o444)
        return s3_client.tag(bucket, one.key) == one.etag

    try:
        same = all(at_once(get, found))
        if same:
            os.rename(folder, target)
    finally:
        remove(folder)
    return same


def _objects(artifact: Artifact) -> dict[str, s3_client.Object]:
    """What is there, by name below the folder; a single object has the empty name."""
    bucket, key = s3_client.split(artifact.uri)
    with _looking(artifact):
        found = {o.key: o for o in s3_client.listed(bucket, key)}
    if key in found:
        return {"": found[key]}
    start = f"{key}/" if key else ""
    below = {k.removeprefix(start): o for k, o in found.items() if k.startswith(start)}
    return {n: o for n, o in below.items() if n and not any(part.startswith(".") for part in n.split("/"))}


@contextmanager
def _looking(artifact: Artifact) -> Iterator[None]:
    try:
        yield
    except StorageFailed as error:
        fix = "Check the name, the credentials and AWS_ENDPOINT_URL."
        raise InputProblem(artifact.uri, f"could not be looked at ({error.what})", fix) from error


def _wanted(artifact: Artifact) -> dict[str, s3_client.Object]:
    found = _objects(artifact)
    return found if "" in found else {n: found[n] for n in needed(type(artifact), list(found))}


def _digest(found: Mapping[str, s3_client.Object]) -> str:
    lines = "".join(f"{found[n].etag} {found[n].size} {n}\n" for n in sorted(found))
    return hashlib.sha256(lines.encode()).hexdigest()


def _pinned(artifact: Artifact, found: Mapping[str, s3_client.Object]) -> str:
    return _digest({ending(_name(artifact.uri)) if "" in found else n: o for n, o in found.items()})


def ending(name: str) -> str:
    """The part of a file's name by which readers know how to read it: ``.jsonl``, ``.json.gz``."""
    return "".join(PurePath(name).suffixes[-2 if name.endswith(".gz") else -1 :])


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]
