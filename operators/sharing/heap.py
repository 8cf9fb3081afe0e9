"""How the C library gets a process's memory, and when it hands that back: settings of glibc, nothing elsewhere.

By itself glibc keeps tensors in one heap, up to a size that rises to 32 MiB. Two kinds of work want it otherwise.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

LARGE = 1 << 20
"""Bytes from which on a tensor has pages of its own while something trains."""
LOST = 0.2
"""The share of all smaller ones in a step of training whose place in the heap is lost for others (see `mapped`)."""
HIGHEST = 32 << 20
"""The highest of such sizes that glibc takes."""
TRIM, MAP = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of malloc.h."""


@contextmanager
def mapped() -> Iterator[None]:
    """Have each large tensor be pages of its own, which the system has again as soon as the tensor goes.

    Training frees tensors between equal ones that stay for the backward pass. glibc cuts the place of an aligned tensor
    out of a larger one, and where small objects of the graph have taken the rest, the hole that it leaves later does
    not fit its equal: the heap grows to twice of what it holds. A step of LoRA that holds 1179 MiB took 2203 of them,
    and takes 1192 so. Of smaller tensors, for which the pages would cost more than they save, a plan counts what is
    lost. With a size of 4 MiB that step took 1727 MiB; to trim the heap between steps comes too late, as the first one
    reaches the most. The price is that pages come anew for each tensor: a third more of a processor's time by 4 KiB,
    and 5 % by 2 MiB, for which torch asks in a process that starts with THP_MEM_ALLOC_ENABLE.

    Afterwards what is freed is kept, as it is by itself once a large tensor has been freed.
    """
    _settle(size=LARGE)
    try:
        yield
    finally:
        keep()


def keep() -> None:
    """Have the process keep the memory that it frees, for work that takes as much again and again."""
    _settle(size=HIGHEST)


def _settle(*, size: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(MAP, size)
        mallopt(TRIM, 2 * HIGHEST)  # the end of the heap stays: small ones come again
