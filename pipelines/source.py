"""Source -> identity: the modules that a piece of code imports, transitively, as text that comments cannot change."""

import ast
import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm.errors import LfmError
from operators.code import OURS, Code, OwnCodeFailed, module_name
from pipelines.libraries import version_of

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = ("import_module", "__import__")
UNNAMED = ("exec", "spec_from_file_location")


class MissingCode(LfmError, FileNotFoundError):
    """A Python file that a pipeline names and that is not there."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"uses: {self.path!r} is not there, expected a Python file beside the pipeline. Check the name."


@dataclass(frozen=True, slots=True)
class Reach:
    """What modules need to compute.

    Attributes:
        modules: By name, with a digest of each.
        libraries: By name, with what each is; Python is one of them.
        unnamed: The lines of the user's files, as ``file:line``, that run code that no import names.
    """

    modules: Mapping[str, str]
    libraries: Mapping[str, str]
    unnamed: tuple[str, ...] = ()


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
            module = module_name(name)
            imports = _scan(files[name], module, package=path.name == "__init__.py").imports
        except SyntaxError as error:
            raise OwnCodeFailed(name, error.lineno or 1, f"no Python, {error.msg}") from error
        for needed in (*packages_of(module), *imports):
            queue += _locate(needed, folder)
    return Code(uses=uses, files=tuple(sorted(files.items())))


def _text_of(path: Path, name: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OwnCodeFailed(name, data[: error.start].count(b"\n") + 1, "no UTF-8, expected text in it") from error


def reach(modules: tuple[str, ...], code: Code) -> Reach:
    """Everything `modules` import: this project's and the user's as digests, libraries as versions.

    An import counts wherever it stands and whether or not it is reached, one by ``import_module`` with its name in
    quotes too. This project's packages only count where their own name is imported: their ``__init__`` files hold no
    logic. The standard library counts as Python's version. Left out are comments, docstrings unless the user's
    files read some, and files that code opens by itself.
    """
    found: dict[str, str] = {}
    libraries = {"python": "{}.{}".format(*sys.version_info)}
    unnamed: list[str] = []
    own = {module_name(path): (path, text) for path, text in code.files}
    documented = any("__doc__" in text or "getdoc" in text for _, text in code.files)
    tops = {module.partition(".")[0] for module in own}
    queue = list(modules)
    while queue:
        module = queue.pop()
        if module in found:
            continue
        top = module.partition(".")[0]
        if module in own:
            path, text = own[module]
            scan = _scan(text, module, package=path.endswith("__init__.py"), docstrings=documented)
            unnamed += [f"{path}:{line}" for line in scan.unnamed]
            queue += packages_of(module)
        elif top in OURS:
            file = _file(module, ROOT)
            if file is None:
                continue
            scan = _scan(file.read_text(), module, package=file.name == "__init__.py")
            if scan.empty:
                continue
        else:
            known = top in tops or top in sys.stdlib_module_names or top in libraries
            if not known and (version := version_of(top)):
                libraries[top] = version
            continue
        found[module] = scan.digest
        queue += scan.imports
    return Reach(dict(sorted(found.items())), dict(sorted(libraries.items())), tuple(sorted(unnamed)))


def packages_of(module: str) -> list[str]:
    """The packages that importing a module imports first: ``a`` and ``a.b`` for ``a.b.c``."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


@dataclass(frozen=True, slots=True)
class _Scan:
    """What the text of a module says.

    Attributes:
        digest: Of its code without comments and docstrings.
        empty: Whether there is no code.
        imports: Every module that it imports, lazily or not.
        unnamed: The lines that run code that no import names.
    """

    digest: str
    empty: bool
    imports: tuple[str, ...]
    unnamed: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _scan(text: str, module: str, *, package: bool, docstrings: bool = False) -> _Scan:
    tree = ast.parse(text)
    here = module.split(".") if package else module.split(".")[:-1]
    imports: list[str] = []
    unnamed: list[int] = []

    def absolute(level: int, name: str) -> str:
        return ".".join([*here[: len(here) - level + 1], *filter(None, [name])]) if level else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [a.name for a in node.names]
            unnamed += [node.lineno for a in node.names if a.name == "runpy"]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.level, node.module or "")
            unnamed += [node.lineno for a in node.names if base == "runpy" or (a.asname and a.name in BY_NAME)]
            imports += [base, *(f"{base}.{a.name}" for a in node.names if a.name != "*")]
        elif isinstance(node, ast.Call) and (called := _called(node.func)) in (*BY_NAME, *UNNAMED):
            named = _named(node) if called in BY_NAME else None
            if named is None:
                unnamed.append(node.lineno)
            else:
                name = named.lstrip(".")
                imports.append(absolute(len(named) - len(name), name))
        elif isinstance(node, ast.Constant):
            node.kind = None  # the prefix in u"..." says nothing
        for field in () if docstrings else ("body", "orelse", "finalbody"):
            _without_strings(node, field)
    digest = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    empty = all(isinstance(statement, ast.Pass) for statement in tree.body)
    return _Scan(digest, empty, tuple(dict.fromkeys(filter(None, imports))), tuple(sorted(unnamed)))


def _called(what: ast.expr) -> str:
    """The name of what is called; `exec` only where it is Python's own."""
    if isinstance(what, ast.Name):
        return what.id
    return what.attr if isinstance(what, ast.Attribute) and what.attr != "exec" else ""


def _named(call: ast.Call) -> str | None:
    """The module that such a call imports, where its name is in quotes and relative to its own package if at all."""
    given = [*call.args, *(k.value for k in call.keywords if k.arg == "name")][:1]
    if not given or not isinstance(given[0], ast.Constant) or not isinstance(given[0].value, str):
        return None
    name = given[0].value
    package = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "package")]
    elsewhere = not all(isinstance(p, ast.Name) and p.id == "__package__" for p in package)
    return None if name.startswith(".") and elsewhere else name


def _without_strings(node: ast.AST, field: str) -> None:
    """Take the statements out of a block that are nothing but a string: docstrings, of attributes too."""
    block = getattr(node, field, None)
    if isinstance(block, list) and block:
        kept = [s for s in block if not (isinstance(s, ast.Expr) and _is_text(s.value))]
        filler = [ast.Pass()] if field == "body" and not isinstance(node, ast.Module) else []
        setattr(node, field, kept or filler)


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _locate(module: str, folder: Path) -> list[Path]:
    """The files of `folder` that importing `module` runs, its packages first; [] if it is not there."""
    return [file for name in (*packages_of(module), module) if (file := _file(name, folder)) is not None]


def _file(module: str, folder: Path) -> Path | None:
    """The file of `folder` that is `module`: of two that could be Python takes the package."""
    place = folder.joinpath(*module.split("."))
    return next((p for p in (place / "__init__.py", place.with_suffix(".py")) if p.is_file()), None)
