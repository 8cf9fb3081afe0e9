"""Stream one parameter at a time out of and into folders of safetensors."""

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lfm.errors import ShapeError, UnknownName
from lfm.weight_index import WeightsError as WeightsError, indexed, parsed as parsed

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Every dtype by the word that a safetensors header uses for it."""
WORDS = {dtype: word for word, dtype in DTYPES.items()}

SHARD_BYTES = 5_000_000_000  # what a file on the Hugging Face hub usually has at most
COMPARED = 1 << 20  # values that are compared at once


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a parameter before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter in a file that is open: any stretch of its values can be read, in the order of the flat parameter."""

    name: str
    header: Header
    path: Path
    descriptor: int
    offset: int

    def values(self, first: int, out: Tensor) -> None:
        """Read as many values as `out` has, from the `first` one on, into its memory, as float32.

        Args:
            first: Number of a value.
            out: Contiguous float32 of any shape.
        """
        if self.header.dtype == out.dtype:
            self._read(first, out)
        else:
            out.copy_(self.raw(first, out.numel()).view(out.shape))

    def raw(self, first: int, count: int) -> Tensor:
        """`count` values from the `first` one on, flat, in their stored dtype, in memory of their own."""
        out = torch.empty(count, dtype=self.header.dtype)
        self._read(first, out)
        return out

    def _read(self, first: int, out: Tensor) -> None:
        view = _bytes(out)
        offset = self.offset + first * out.dtype.itemsize
        while view:  # one call of the system reads 2 GiB at most
            count = os.preadv(self.descriptor, [view], offset)
            if not count:
                raise WeightsError(str(self.path), f"ends inside {self.name!r}", "the size that it had before")
            view, offset = view[count:], offset + count


class Weights:
    """The parameters of one folder, read one at a time.

    Attributes:
        headers: What every parameter is, by name, in the order in which the files hold them.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        """Read the headers.

        Args:
            folder: Holds `stem`.safetensors, or several files and `stem`.safetensors.index.json.
            stem: ``model``, or ``adapter_model`` for what PEFT writes.

        Raises:
            WeightsError: A file is missing, damaged or leads out of the folder.
        """
        self.headers: dict[str, Header] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path, wanted in _files(folder, stem):
            found = _read_header(path)
            missing = set(found if wanted is None else wanted) - found.keys()
            if missing:
                raise WeightsError(str(path), f"no parameter {min(missing)!r}", "what the index says")
            for name, (header, offset) in found.items():
                if wanted is None or name in wanted:
                    self.headers[name] = header
                    self._places[name] = path, offset

    def read(self, name: str) -> Tensor:
        """One parameter, in its stored dtype, in memory of its own.

        Raises:
            UnknownName: There is none of this name.
        """
        with self.opened(name) as stored:
            return stored.raw(0, stored.header.size).reshape(stored.header.shape)

    @contextmanager
    def opened(self, name: str) -> Iterator[Stored]:
        """One parameter, to be read in stretches while the block runs.

        Raises:
            UnknownName: There is none of this name.
        """
        if name not in self.headers:
            raise UnknownName("parameter", name, tuple(self.headers))
        path, offset = self._places[name]
        with path.open("rb", buffering=0) as file:
            yield Stored(name, self.headers[name], path, file.fileno(), offset)


def equal(one: Weights, name: str, other: Weights, its_name: str) -> bool:
    """Whether two stored parameters have the same shape, dtype and values; never holds them whole."""
    header = one.headers[name]
    if header != other.headers[its_name]:
        return False
    with one.opened(name) as here, other.opened(its_name) as there:
        for first in range(0, header.size, COMPARED):
            count = min(COMPARED, header.size - first)
            if not torch.equal(here.raw(first, count), there.raw(first, count)):
                return False
    return True


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return value.detach().reshape(-1).view(torch.uint8).numpy().data if value.numel() else memoryview(b"")


def _files(folder: Path, stem: str) -> list[tuple[Path, set[str] | None]]:
    """The files that hold weights, each with the names that the index looks for in it."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [(single, None)]
    if not index.is_file():
        raise WeightsError(str(folder), "no weights", f"{single.name} or {index.name}")
    wanted = indexed(index)
    for file in wanted:
        if not (folder / file).is_file():
            raise WeightsError(str(index), f"names {file!r}", "files that lie beside it")
    return [(folder / file, wanted[file]) for file in sorted(wanted)]


def _read_header(path: Path) -> dict[str, tuple[Header, int]]:
    """What a file holds, and where in it, in the file's order."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise WeightsError(str(path), f"{size} bytes", "a whole safetensors file")
        entries = parsed(path, file.read(length))
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(entries.items(), key=lambda e: (e[1]["data_offsets"], e[0])):
        if entry["dtype"] not in DTYPES:
            raise WeightsError(str(path), f"{name!r} of dtype {entry['dtype']}", f"one of {', '.join(DTYPES)}")
        header, (start, end) = Header(tuple(entry["shape"]), DTYPES[entry["dtype"]]), entry["data_offsets"]
        if end - start != header.bytes or 8 + length + end > size:
            raise WeightsError(str(path), f"{name!r} at bytes {start} to {end} of {size}", "a whole safetensors file")
        found[name] = header, 8 + length + start
    return found


@dataclass(frozen=True, slots=True)
class Shard:
    """One file that will be written.

    Attributes:
        file: Its name.
        head: Its first bytes.
        offsets: Where each parameter begins, counted from the file's begin.
        size: Bytes of the whole file.
    """

    file: str
    head: bytes
    offsets: Mapping[str, int]
    size: int


def layout(headers: Mapping[str, Header], shard_bytes: int = SHARD_BYTES, stem: str = "model") -> tuple[Shard, ...]:
    """Which byte of which file every parameter gets; the same wherever it is computed.

    Args:
        headers: What will be written, in its order.
        shard_bytes: A file takes no further parameter beyond this; one that is larger has a file of its own.
        stem: What the files' names begin with.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, header in headers.items():
        if groups[-1] and filled + header.bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += header.bytes
    count = len(groups)
    names = [
        f"{stem}-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors" for i in range(count)
    ]
    return tuple(_shard(file, {n: headers[n] for n in group}) for file, group in zip(names, groups, strict=True))


def _shard(file: str, headers: Mapping[str, Header]) -> Shard:
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    # Wide dtypes first: so every parameter begins at a multiple of its item's size.
    for name, header in sorted(headers.items(), key=lambda e: -e[1].dtype.itemsize):
        offsets[name], end = end, end + header.bytes
        entries[name] = {
            "dtype": WORDS[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Shard(file, head, {n: o + len(head) for n, o in offsets.items()}, len(head) + end)


Put = Callable[[int, Tensor], None]
"""Writes values, flat or not, to where a parameter has its values from the given number on."""


class Writer:
    """Writes parameters in any order, whole or in stretches, each straight to its place in files of their final size.

    As a context manager it allocates the files, and checks where it is left without an error that nothing is missing.
    """

    def __init__(
        self, folder: Path, headers: Mapping[str, Header], *, shard_bytes: int = SHARD_BYTES, stem: str = "model"
    ) -> None:
        """Lay out the files; writes nothing, so that several processes can write what one has allocated.

        Args:
            folder: Exists; files of weights in it are overwritten.
            headers: What will be written.
            shard_bytes: As in `layout`.
            stem: The same.
        """
        self.folder, self.stem, self.shards = folder, stem, layout(headers, shard_bytes, stem)
        self._headers = dict(headers)
        self._missing = dict.fromkeys(headers)
        self._places = {
            n: (folder / shard.file, offset) for shard in self.shards for n, offset in shard.offsets.items()
        }

    def allocate(self, *, but: Collection[str] = ()) -> None:
        """Make the files, with their final size and headers, and the index.

        Args:
            but: Names of files that are there already.
        """
        for shard in self.shards:
            if shard.file not in but:
                path = self.folder / shard.file
                path.write_bytes(shard.head)
                os.truncate(path, shard.size)
        if len(self.shards) > 1:
            files = {name: self._places[name][0].name for name in self._headers}
            sizes = {"total_size": sum(h.bytes for h in self._headers.values())}
            text = json.dumps({"metadata": sizes, "weight_map": files}, indent=2)
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(text + "\n")

    @contextmanager
    def opened(self, name: str) -> Iterator[Put]:
        """One parameter, to be written in stretches while the block runs.

        Raises:
            UnknownName: There is no place for one of this name.
        """
        if name not in self._headers:
            raise UnknownName("parameter", name, tuple(self._headers))
        header, (path, offset) = self._headers[name], self._places[name]
        with path.open("r+b", buffering=0) as file:

            def put(first: int, value: Tensor) -> None:
                assert value.dtype == header.dtype, (name, value.dtype, header.dtype)
                view, at = _bytes(value.cpu().contiguous()), offset + first * header.dtype.itemsize
                while view:  # one call of the system writes 2 GiB at most
                    written = os.pwrite(file.fileno(), view, at)
                    view, at = view[written:], at + written

            yield put

    def write(self, name: str, value: Tensor) -> None:
        """Write one parameter whole.

        Raises:
            UnknownName: There is no place for one of this name.
            ShapeError: Its shape is not the one that was announced.
        """
        if name in self._headers and tuple(value.shape) != self._headers[name].shape:
            fix = "Keep the shape that was announced."
            raise ShapeError(f"{name!r}", tuple(value.shape), self._headers[name].shape, fix)
        with self.opened(name) as put:
            put(0, value)
        self._missing.pop(name, None)

    def __enter__(self) -> Self:
        self.allocate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._missing:
            what = f"{len(self._missing)} parameters were not written, first {next(iter(self._missing))!r}"
            raise WeightsError("weights", what, "all that were announced")
