"""Who may compile an extension of torch's: one process at a time, and not one that is dead."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton
from typing_extensions import override


class Baton(FileBaton):
    """Torch's own, a file that is there while somebody compiles, save that it does not outlive who made it.

    By itself it stays when that process is killed, and whoever comes later waits for ever.
    """

    @override
    def try_acquire(self) -> bool:
        _drop_if_abandoned(Path(self.lock_file_path))
        return bool(super().try_acquire())

    @override
    def wait(self) -> None:
        while os.path.exists(self.lock_file_path):
            time.sleep(self.wait_seconds)
            _drop_if_abandoned(Path(self.lock_file_path))


def compile_in_turn() -> None:
    """Have this process take and heed such a baton."""
    cpp_extension.FileBaton = Baton  # type: ignore[attr-defined]


def _drop_if_abandoned(file: Path) -> None:
    """Delete a baton that no process holds open, as the one that made it does while it lives."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # or of two who look the second would delete what a third made in between
        if file.exists() and not _open(file.resolve()):
            file.unlink(missing_ok=True)
    finally:
        os.close(folder)


def _open(file: Path) -> bool:
    for handle in Path("/proc").glob("[1-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or it went meanwhile
            if handle.readlink() == file:
                return True
    return False
