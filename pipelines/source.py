"""Source -> identity: the modules that a piece of code imports, transitively, as text that comments cannot change."""

import ast
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm.errors import LfmError
from operators.code import OURS, Code, OwnCodeFailed, module_name

ROOT = Path(__file__).resolve().parent.parent


class MissingCode(LfmError, FileNotFoundError):
    """A Python file that a pipeline names and that is not there."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"uses: {self.path!r} is not there, expected a Python file beside the pipeline. Check the name."


@dataclass(frozen=True, slots=True)
class Reach:
    """What a module needs to compute: `modules` by name with a digest of each, `libraries` with versions."""

    modules: Mapping[str, str]
    libraries: Mapping[str, str]


def pack(folder: Path, uses: tuple[str, ...]) -> Code:
    """Read the files in `uses` and what they import from `folder`.

    Raises:
        MissingCode: One is not there.
        OwnCodeFailed: One is no Python.
    """
    files: dict[str, str] = {}
    queue = [folder / u for u in uses]
    while queue:
        path = queue.pop()
        name = path.relative_to(folder).as_posix()
        if name in files:
            continue
        if not path.is_file():
            raise MissingCode(name)
        files[name] = _text_of(path, name)
        try:
            imports = _scan(files[name], module_name(name))[1]
        except SyntaxError as error:
            raise OwnCodeFailed(name, error.lineno or 1, f"no Python, {error.msg}") from error
        for imported in imports:
            queue += _locate(imported, folder)
    return Code(uses=uses, files=tuple(sorted(files.items())))


def _text_of(path: Path, name: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OwnCodeFailed(name, data[: error.start].count(b"\n") + 1, "no UTF-8, expected text in it") from error


def reach(modules: tuple[str, ...], code: Code) -> Reach:
    """Everything `modules` import: this project's and the user's as digests, libraries as versions.

    Package ``__init__`` files hold no logic here and are left out; so are the standard library and a docstring's
    or a comment's text.
    """
    found: dict[str, str] = {}
    libraries: dict[str, str] = {}
    own = {module_name(path): text for path, text in code.files}
    queue = list(modules)
    while queue:
        module = queue.pop()
        if module in found:
            continue
        if module in own:
            digest, imports = _scan(own[module], module)
        elif module.partition(".")[0] in OURS:
            paths = _locate(module, ROOT)
            if not paths or paths[-1].name == "__init__.py":
                continue
            digest, imports = _scan_file(paths[-1], module)
        else:
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and (version := _version(top)):
                libraries[top] = version
            continue
        found[module] = digest
        queue += imports
    return Reach(dict(sorted(found.items())), dict(sorted(libraries.items())))


@functools.cache
def _scan_file(path: Path, module: str) -> tuple[str, tuple[str, ...]]:
    return _scan(path.read_text(), module)


@functools.lru_cache(maxsize=4096)
def _scan(text: str, module: str) -> tuple[str, tuple[str, ...]]:
    """Digest of the code without comments and docstrings, and every module it imports, lazily or not."""
    tree = ast.parse(text)
    imports: list[str] = []
    package = module if module.endswith("__init__") else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            imports += [base, *(f"{base}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                first.value.value = ""  # emptied, not removed: a body must not become empty
    digest = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return digest, tuple(dict.fromkeys(imports))


def _locate(module: str, folder: Path) -> list[Path]:
    """The files of `folder` that importing `module` runs, its packages first; [] if it is not there."""
    parts = module.split(".")
    packages = [folder.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
    file = folder.joinpath(*parts).with_suffix(".py") if parts[-1] else None
    found = [p for p in packages if p.is_file()]
    if file is not None and file.is_file():
        found.append(file)
    return found


@functools.cache
def _version(top: str) -> str | None:
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(top)
        return importlib.metadata.version(names[0]) if names else None
