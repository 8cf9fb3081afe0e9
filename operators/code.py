"""The Python files that a pipeline brings along, importable in any process without being written to its disk."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType

from lfm.errors import LfmError

OURS = ("lfm", "operators", "cluster", "pipelines")


class ShadowedModule(LfmError, ImportError):
    """A file of the user's that has the name of a module which others import."""

    def __init__(self, file: str, module: str, other: str) -> None:
        super().__init__(file, module, other)
        self.file, self.module, self.other = file, module, other

    def __str__(self) -> str:
        return (
            f"uses: {self.file!r} would be imported as {self.module!r}, which is {self.other} already, expected a name "
            "that nothing else has. Give the file another."
        )


@dataclass(frozen=True, slots=True)
class Code:
    """Python files with everything beside them that they import.

    Attributes:
        uses: The files that the pipeline names, relative to its own folder.
        files: Relative path and text of these and of what they import.
    """

    uses: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()

    @property
    def modules(self) -> dict[str, str]:
        """Module name -> path, for every file."""
        return {module_name(path): path for path, _ in self.files}


def module_name(path: str) -> str:
    """``pkg.mod`` for ``pkg/mod.py``, ``pkg`` for ``pkg/__init__.py``."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def bring(code: Code, folder: str = "") -> tuple[ModuleType, ...]:
    """Import what `code` names; from then on this process imports its files by their names.

    What was brought before is forgotten, so that one process can load pipelines one after another.

    Args:
        code: The files.
        folder: Where they come from, for tracebacks.

    Raises:
        ShadowedModule: A file is called like a module of Python, of this project or of an installed package.
        OwnCodeFailed: A file raised.
    """
    for finder in [f for f in sys.meta_path if isinstance(f, _Brought)]:
        sys.meta_path.remove(finder)
        for name in finder.code.modules:
            sys.modules.pop(name, None)
    for module, path in code.modules.items():
        other = _owner(module.partition(".")[0])
        if other:
            raise ShadowedModule(path, module, other)
    sys.meta_path.insert(0, _Brought(code, folder))
    with own(code):
        return tuple(importlib.import_module(module_name(u)) for u in code.uses)


def brought() -> Code:
    """What `bring` brought last to this process."""
    return next((f.code for f in sys.meta_path if isinstance(f, _Brought)), Code())


class OwnCodeFailed(LfmError, RuntimeError):
    """A user's file that raised, or that is no Python."""

    def __init__(self, file: str, line: int, what: str) -> None:
        super().__init__(file, line, what)
        self.file, self.line, self.what = file, line, what

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}. Correct it."


@contextmanager
def own(code: Code) -> Iterator[None]:
    """Say in which line of the user's files something went wrong; what did not begin there passes as it is.

    Raises:
        OwnCodeFailed: The user's code raised, or called what raised.
    """
    try:
        yield
    except OwnCodeFailed:
        raise
    except (Exception, SystemExit) as error:  # anything may happen in a file of the user's
        paths = dict(code.files)
        if isinstance(error, SyntaxError) and error.filename in paths:
            raise OwnCodeFailed(error.filename, error.lineno or 1, f"no Python, {error.msg}") from error
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in paths]
        if not frames:
            raise
        kind = "" if isinstance(error, LfmError) else f"{type(error).__name__}: "
        what = f"{kind}{str(error).strip().partition(chr(10))[0]}".rstrip(": .")
        raise OwnCodeFailed(frames[-1].filename, frames[-1].lineno or 1, what) from error


def _owner(top: str) -> str:
    """Who has the top-level name already, or nothing."""
    if top in sys.stdlib_module_names:
        return "Python's own"
    if top in OURS:
        return "LFM's own"
    found = PathFinder.find_spec(top)
    origin = found.origin if found is not None else None
    return origin if origin and "site-packages" in Path(origin).parts else ""


class _Brought(MetaPathFinder, InspectLoader):
    """Finds and loads the modules of a `Code`."""

    def __init__(self, code: Code, folder: str) -> None:
        self.code, self.folder = code, folder
        self._paths, self._texts = code.modules, dict(code.files)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._paths:
            return None
        origin = f"{self.folder}/{self._paths[fullname]}" if self.folder else self._paths[fullname]
        package = self._paths[fullname].endswith("__init__.py")
        spec = importlib.util.spec_from_loader(fullname, self, origin=origin, is_package=package)
        if spec is not None:
            spec.has_location = True
        return spec

    def is_package(self, fullname: str) -> bool:
        return self._paths[fullname].endswith("__init__.py")

    def get_source(self, fullname: str) -> str:
        return self._texts[self._paths[fullname]]

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.get_source(fullname), self._paths[fullname], "exec", dont_inherit=True)
