"""A store below s3://bucket/prefix: conditional writes are what cannot be done twice.

What `append` adds to a key lies in objects of about `PART` bytes: the key itself, then ``<key>~000002`` and so on.
Folders that were fetched, or made here, lie in a cache of this machine, one for each endpoint and location.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.storage import s3_client
from pipelines.storage.base import (
    MANIFEST,
    DamagedFolder,
    Entry,
    StorageFailed,
    UnsupportedStorage,
    at_once,
    below,
    cache,
    digest_of,
    new_scratch,
    remove,
)

PART = 1 << 18  # bytes that an append may have to send again
PAUSES_S = (0.1, 0.4, 1.6)
MARK = "store.json"


class S3Storage:
    """A location on S3 or on what speaks its protocol."""

    def __init__(self, uri: str) -> None:
        self.bucket, self.prefix = s3_client.split(uri)
        if not self.bucket:
            raise UnsupportedStorage(uri)
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._below = f"{self.prefix}/" if self.prefix else ""
        place = hashlib.sha256(f"{s3_client.endpoint()} {self.uri}".encode()).hexdigest()
        self.copies: Path = cache() / "s3" / f"{self.bucket}-{place[:12]}"
        self._tails: dict[str, tuple[int, bytes]] = {}
        self._check()

    @property
    def scratches(self) -> Path:
        """See `Storage`."""
        return self.copies / "scratch"

    def read(self, key: str) -> bytes | None:
        """See `Storage`."""
        data = last = self._get(key)
        number = 1
        while last is not None and data is not None and len(last) >= PART:
            number += 1
            last = self._get(_part(key, number))
            data += last or b""
        return data

    def list(self, prefix: str, *, after: str = "") -> tuple[str, ...]:
        """See `Storage`."""
        found = {_key(one.key.removeprefix(self._below)) for one in self._objects(_folder(prefix), after=after)}
        return tuple(sorted(key for key in found if key > after))  # more objects of the key `after` follow it

    def entries(self, prefix: str) -> tuple[Entry, ...]:
        """See `Storage`."""
        found: dict[str, Entry] = {}
        for one in self._objects(_folder(prefix)):
            key = _key(one.key.removeprefix(self._below))
            before = found.get(key, Entry(key, 0, 0.0))
            found[key] = Entry(key, before.size + one.size, max(before.modified, one.modified))
        return tuple(found[key] for key in sorted(found))

    def folders(self, prefix: str) -> tuple[str, ...]:
        """See `Storage`."""
        base = f"{self._below}{prefix}/" if prefix else self._below
        with s3_client.answered(f"{self.uri}/{prefix}"):
            pages = s3_client.client().get_paginator("list_objects_v2")
            found = [
                one["Prefix"].removeprefix(base).rstrip("/")
                for page in pages.paginate(Bucket=self.bucket, Prefix=base, Delimiter="/")
                for one in page.get("CommonPrefixes", ())
            ]
        return tuple(sorted(found))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Storage`."""
        return self._put(key, data, IfNoneMatch="*")

    def replace_if_match(self, key: str, data: bytes, old: bytes) -> bool:
        """See `Storage`."""
        from botocore.exceptions import ClientError

        with s3_client.answered(f"{self.uri}/{key}"):
            try:
                found = s3_client.client().get_object(Bucket=self.bucket, Key=self._below + key)
                there = found["Body"].read()
            except ClientError as error:
                if s3_client.code(error) == "NoSuchKey":
                    return False
                raise
        return there == old and self._put(key, data, IfMatch=found["ETag"])

    def adopt(self, folder: Path, key: str) -> bool:
        """See `Storage`: the manifest is sent last; the folder then moves into the cache."""
        manifest = (folder / MANIFEST).read_bytes()
        if self._get(f"{key}/{MANIFEST}") is not None:
            return False
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

        def send(name: str) -> None:
            with s3_client.answered(f"{self.uri}/{key}/{name}"):
                s3_client.client().upload_file(str(folder / name), self.bucket, f"{self._below}{key}/{name}")

        at_once(send, [n for n in names if n != MANIFEST])
        if not self.put_if_absent(f"{key}/{MANIFEST}", manifest):
            return False
        with s3_client.answered(f"cache {str(self.copies)!r}"), self._alone(key):
            self._settle(folder, key)
        return True

    def fetch(self, key: str) -> Path:
        """See `Storage`."""
        target = self.copies / key
        manifest = self._get(f"{key}/{MANIFEST}")
        if manifest is None:
            raise StorageFailed(f"{self.uri}/{key}", f"no {MANIFEST}")
        with self._alone(key):
            if self._cached(target, manifest):
                return target
            folder = self.scratch()
            try:
                self._download(key, folder, manifest)
                self._settle(folder, key)
            finally:
                remove(folder)
        return target

    def discard(self, key: str, to: str) -> None:
        """See `Storage`."""
        names = self._parts(key)

        def copy(name: str) -> None:
            source = {"Bucket": self.bucket, "Key": self._below + name}
            with s3_client.answered(f"{self.uri}/{name}"):
                s3_client.client().copy(source, self.bucket, f"{self._below}{to}{name.removeprefix(key)}")

        at_once(copy, names)
        self._delete(key, names)

    def delete(self, key: str) -> None:
        """See `Storage`."""
        self._delete(key, self._parts(key))

    def append(self, key: str, data: bytes) -> None:
        """See `Storage`: the last object is sent again with what is new, until it is large enough to stay."""
        number, tail = self._tails.get(key) or self._tail(key)
        tail += data
        with s3_client.answered(f"{self.uri}/{key}"):
            s3_client.client().put_object(Bucket=self.bucket, Key=self._below + _part(key, number), Body=tail)
        self._tails[key] = (number + 1, b"") if len(tail) >= PART else (number, tail)

    def scratch(self) -> Path:
        """See `Storage`."""
        return new_scratch(self.scratches)

    def _check(self) -> None:
        """Write a mark twice: what lets the second pass would let two drivers into one run."""
        if _checked.get(self.uri) == s3_client.endpoint():
            return
        data = json.dumps({"format": 1}).encode()
        if self.put_if_absent(MARK, data) and self.put_if_absent(MARK, data):
            raise StorageFailed(f"store {self.uri!r}", "writes over what is there despite If-None-Match")
        _checked[self.uri] = s3_client.endpoint()

    def _get(self, key: str) -> bytes | None:
        from botocore.exceptions import ClientError

        with s3_client.answered(f"{self.uri}/{key}"):
            try:
                data: bytes = s3_client.client().get_object(Bucket=self.bucket, Key=self._below + key)["Body"].read()
            except ClientError as error:
                if s3_client.code(error) == "NoSuchKey":
                    return None
                raise
        return data

    def _put(self, key: str, data: bytes, **condition: str) -> bool:
        """Write under a condition; whether an answer that got lost was a yes, what is there now tells."""
        from botocore.exceptions import ClientError, HTTPClientError

        lost = False
        with s3_client.answered(f"{self.uri}/{key}"):
            for pause in (*PAUSES_S, None):
                try:
                    once = s3_client.client(retries=1)
                    once.put_object(Bucket=self.bucket, Key=self._below + key, Body=data, **condition)
                    return True
                except ClientError as error:
                    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                    if s3_client.code(error) in ("PreconditionFailed", "NoSuchKey"):
                        return lost and self._get(key) == data
                    if pause is None or (status < 500 and status != 409):  # 409: another write was under way
                        raise
                    lost = lost or status >= 500
                except HTTPClientError:
                    if pause is None:
                        raise
                    lost = True
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _objects(self, prefix: str, *, after: str = "") -> Iterator[s3_client.Object]:
        return s3_client.listed(self.bucket, self._below + prefix, after=after and self._below + after)

    def _parts(self, key: str) -> tuple[str, ...]:
        """Every object that a key or folder consists of, the manifest first."""
        names = [
            one.key.removeprefix(self._below) for prefix in (f"{key}/", f"{key}~") for one in self._objects(prefix)
        ]
        if s3_client.tag(self.bucket, self._below + key):
            names.append(key)
        return tuple(sorted(names, key=lambda n: (n != f"{key}/{MANIFEST}", n)))

    def _delete(self, key: str, names: Sequence[str]) -> None:
        objects = [{"Key": self._below + n} for n in names]
        with s3_client.answered(f"{self.uri}/{key}"):
            for one in objects[:1]:  # alone, so that a folder is gone before it is incomplete
                s3_client.client().delete_object(Bucket=self.bucket, **one)
            for first in range(1, len(objects), 1000):
                rest = {"Objects": objects[first : first + 1000], "Quiet": True}
                for failed in s3_client.client().delete_objects(Bucket=self.bucket, Delete=rest).get("Errors", ()):
                    raise StorageFailed(f"s3://{self.bucket}/{failed['Key']}", failed["Code"])
        self._tails.pop(key, None)
        remove(self.copies / key)

    def _tail(self, key: str) -> tuple[int, bytes]:
        """Where an append goes on: the number of the last object and what is in it."""
        number, data = 1, self._get(key) or b""
        while len(data) >= PART:
            number += 1
            data = self._get(_part(key, number)) or b""
        return number, data

    def _settle(self, folder: Path, key: str) -> None:
        """Move a whole folder into the cache, for reading only."""
        target = self.copies / key
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o444)
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, target)

    def _cached(self, target: Path, manifest: bytes) -> bool:
        """Whether the cache has a folder with this manifest and files of the sizes that it names."""
        try:
            if (target / MANIFEST).read_bytes() != manifest:
                return False
            files = _files(manifest).items()
            return all(below(target, n, str(target)).stat().st_size == f["size"] for n, f in files)
        except OSError:
            return False

    def _download(self, key: str, folder: Path, manifest: bytes) -> None:
        names = [o.key.removeprefix(f"{self._below}{key}/") for o in self._objects(f"{key}/")]

        def get(name: str) -> None:
            s3_client.download(self.bucket, f"{self._below}{key}/{name}", below(folder, name, f"{self.uri}/{key}"))

        at_once(get, [n for n in names if n != MANIFEST])
        (folder / MANIFEST).write_bytes(manifest)
        for name, expected in _files(manifest).items():
            path = below(folder, name, f"{self.uri}/{key}")
            if not path.is_file() or digest_of(path) != expected["sha256"]:
                raise DamagedFolder(f"{self.uri}/{key}", name)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Let one process of this machine at a time fetch a folder."""
        locks = self.copies / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / hashlib.sha256(key.encode()).hexdigest()).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_checked: dict[str, str] = {}
"""Locations that this process has found to write conditionally, and at which endpoint."""


def _part(key: str, number: int) -> str:
    """Where the n-th object of an appended key is."""
    return key if number == 1 else f"{key}~{number:06}"


def _key(part: str) -> str:
    """The key that an object belongs to, the other way round."""
    return re.sub(r"~\d{6}$", "", part)


def _folder(prefix: str) -> str:
    """What the keys below a folder begin with; all keys are below the empty one."""
    return f"{prefix}/" if prefix else ""


def _files(manifest: bytes) -> dict[str, Any]:
    """What an artifact's manifest says of its files; a checkpoint's says nothing."""
    files: dict[str, Any] = json.loads(manifest).get("files") or {}
    return files
