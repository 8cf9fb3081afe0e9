"""Error -> the class of its failure, which decides whether a step is tried again, and how. Pure."""

import errno
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum

from lfm.errors import LfmError


class Failure(StrEnum):
    """Why an attempt failed."""

    USER = "user"
    """Its code or what it was given is wrong: it would fail in the same way again."""
    MEMORY = "memory"
    """The host or the device had too little of it."""
    PREEMPTION = "preemption"
    """Its node was taken away, with notice."""
    NODE = "node"
    """Its node was lost."""
    STORAGE = "storage"
    """A disk or an object store refused or lost something."""
    TIMEOUT = "timeout"
    """It did not end in the time that it had."""
    CAPACITY = "capacity"
    """Nothing in the cluster could hold it, for as long as it may wait for that."""
    RESTED = "rested"
    """It was to go no further, and keeps what it had done."""
    OTHER = "other"
    """Its process died, or anything else."""


BUDGETS: Mapping[Failure, int] = {
    Failure.USER: 0,
    Failure.MEMORY: 1,
    Failure.PREEMPTION: 64,
    Failure.NODE: 4,
    Failure.STORAGE: 2,
    Failure.TIMEOUT: 0,
    Failure.CAPACITY: 0,
    Failure.RESTED: 0,
    Failure.OTHER: 0,
}
"""How many failures of each class a step survives."""

BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    SyntaxError,
    SystemExit,
    TypeError,
    ValueError,
)
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOMEM}
NO_MEMORY = ("can't allocate memory", "out of memory")  # what torch says of the host, and devices of themselves
# By name, so that neither torch nor Ray nor a storage has to be imported to ask.
NAMES = {
    "StorageFailed": Failure.STORAGE,
    "DamagedArtifact": Failure.STORAGE,
    "MissingArtifact": Failure.STORAGE,
    "OutOfMemoryError": Failure.MEMORY,
    "Preempted": Failure.PREEMPTION,
    "PreemptionError": Failure.PREEMPTION,
    "Rested": Failure.RESTED,
    "Terminated": Failure.OTHER,
    "NodeLost": Failure.NODE,
    "NodeDiedError": Failure.NODE,
}


def classify(error: BaseException) -> Failure:
    """The class of what a step raised, or of what Ray says became of its process.

    What was raised because of something that tells more than that it failed is of that one's class; so is a group of
    workers, of which one may have died only because another one raised.
    """
    chain = list(_chain(error))
    workers = [getattr(e, "_base_exc", e) for one in chain for e in getattr(one, "worker_failures", {}).values()]
    telling = next((f for f in map(_alone, [*chain, *workers]) if f not in (Failure.USER, Failure.OTHER)), None)
    if telling is not None:
        return telling
    found = [_alone(e) for e in (workers or chain)]
    return Failure.USER if workers and Failure.USER in found else found[0]


def _alone(error: BaseException) -> Failure:
    if getattr(error, "preempted", False):  # what Ray says of an actor
        return Failure.PREEMPTION
    named = next((NAMES[c.__name__] for c in type(error).__mro__ if c.__name__ in NAMES), None)
    if named is not None:
        return named
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error).casefold() for said in NO_MEMORY)
    ):
        return Failure.MEMORY
    if _errno(error) in REFUSED:
        return Failure.STORAGE
    return Failure.USER if isinstance(error, (LfmError, *BUGS)) else Failure.OTHER


def _errno(error: BaseException) -> int | None:
    """The operating system's number for an error; what is written in Rust, as safetensors is, has it in its words."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
