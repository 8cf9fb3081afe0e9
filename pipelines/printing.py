"""What a step prints -> its log. Neither the log nor what a step measures is worth failing for."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipelines.storage.base import Storage, StorageFailed, named, remove

SHIP_S = 5.0  # how old the end of a log may be where it does not lie on this machine


class Unwritten:
    """Why some of what a step printed or measured is lost; `why` is empty where nothing is."""

    def __init__(self) -> None:
        self.why = ""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Go on where storage refuses something, and note the first time."""
        try:
            yield
        except StorageFailed as error:
            self.why = self.why or f"{error.where}: {error.what}"


@contextmanager
def logged(storage: Storage, key: str, unwritten: Unwritten) -> Iterator[None]:
    """Send everything that this process and its children print to the log; what cannot go there is lost."""
    with ExitStack() as stack:
        with unwritten.noted():
            if "://" not in storage.uri:
                stack.enter_context(_redirected(Path(storage.uri) / key, unwritten))
            else:
                folder = storage.scratch()
                stack.callback(remove, folder)
                stack.enter_context(_shipped(folder / "log", storage, key, unwritten))
                stack.enter_context(_redirected(folder / "log", unwritten))
        yield


@contextmanager
def _shipped(path: Path, storage: Storage, key: str, unwritten: Unwritten) -> Iterator[None]:
    where = f"log {str(path)!r}"
    with named(where):
        path.touch()
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        shipping = pool.submit(_ship, path, storage, key, ended)
        try:
            yield
        finally:
            ended.set()
        with unwritten.noted(), named(where):
            shipping.result()


def _ship(path: Path, storage: Storage, key: str, ended: threading.Event) -> None:
    """Append to the log what is new in a file, every few seconds and when it has ended."""
    with path.open("rb") as log:
        last, sent = False, 0
        while not last:
            last = ended.wait(SHIP_S)
            log.seek(sent)
            data = log.read()
            try:
                if data:
                    storage.append(key, data)
            except StorageFailed:
                if last:
                    raise
                continue  # the next time it may take it
            sent += len(data)


@contextmanager
def _redirected(path: Path, unwritten: Unwritten) -> Iterator[None]:
    where = f"log {str(path)!r}"
    with named(where):
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab", buffering=0)
    streams = _Forgiving(sys.stdout, where, unwritten), _Forgiving(sys.stderr, where, unwritten)
    for stream in streams:
        stream.flush()
    kept = os.dup(1), os.dup(2)
    with log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = (s.stream for s in streams)
            for there, number in zip(kept, (1, 2), strict=True):
                os.dup2(there, number)
                os.close(there)


class _Forgiving:
    """A text stream to which a full disk is no error: whoever prints could do nothing about it."""

    def __init__(self, stream: Any, where: str, unwritten: Unwritten) -> None:
        self.stream, self._where, self._unwritten = stream, where, unwritten

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._unwritten.noted(), named(self._where):
            self.stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._unwritten.noted(), named(self._where):
            self.stream.flush()
