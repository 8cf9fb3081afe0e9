"""Source -> identity: the modules that a piece of code imports, transitively, as text that comments cannot change."""

import ast
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
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
    """What modules need to compute.

    Attributes:
        modules: By name, with a digest of each.
        libraries: By name, with what each is; Python is one of them.
        computed: The lines of the user's files, as ``file:line``, that import what only running them tells.
    """

    modules: Mapping[str, str]
    libraries: Mapping[str, str]
    computed: tuple[str, ...] = ()


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
    logic. The standard library counts as Python's version. Left out are comments, docstrings that no code of their
    module reads, and what no import tells: files that code opens by itself, whether data or code to `exec`.
    """
    found: dict[str, str] = {}
    libraries = {"python": "{}.{}".format(*sys.version_info)}
    computed: list[str] = []
    own = {module_name(path): (path, text) for path, text in code.files}
    tops = {module.partition(".")[0] for module in own}
    queue = list(modules)
    while queue:
        module = queue.pop()
        if module in found:
            continue
        top = module.partition(".")[0]
        if module in own:
            path, text = own[module]
            scan = _scan(text, module, package=path.endswith("__init__.py"))
            computed += [f"{path}:{line}" for line in scan.computed]
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
            if not known and (version := _version(top)):
                libraries[top] = version
            continue
        found[module] = scan.digest
        queue += scan.imports
    return Reach(dict(sorted(found.items())), dict(sorted(libraries.items())), tuple(sorted(computed)))


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
        computed: The lines that import what only running them tells.
    """

    digest: str
    empty: bool
    imports: tuple[str, ...]
    computed: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _scan(text: str, module: str, *, package: bool) -> _Scan:
    tree = ast.parse(text)
    read = "__doc__" in text  # then its docstrings may decide what it does
    here = module.split(".") if package else module.split(".")[:-1]
    imports: list[str] = []
    computed: list[int] = []

    def absolute(level: int, name: str) -> str:
        return ".".join([*here[: len(here) - level + 1], *filter(None, [name])]) if level else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.level, node.module or "")
            imports += [base, *(f"{base}.{a.name}" for a in node.names if a.name != "*")]
        elif isinstance(node, ast.Call) and _imports(node.func):
            named = _named(node)
            if named is None:
                computed.append(node.lineno)
            else:
                name = named.lstrip(".")
                imports.append(absolute(len(named) - len(name), name))
        elif isinstance(node, ast.Constant):
            node.kind = None  # the prefix in u"..." says nothing
        for field in () if read else ("body", "orelse", "finalbody"):
            _without_strings(node, field)
    digest = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    empty = all(isinstance(statement, ast.Pass) for statement in tree.body)
    return _Scan(digest, empty, tuple(dict.fromkeys(filter(None, imports))), tuple(sorted(computed)))


def _imports(called: ast.expr) -> bool:
    """Whether what is called is ``import_module`` or ``__import__``, under whatever it is written."""
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return name in ("import_module", "__import__")


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


def _version(top: str) -> str | None:
    """What a library is: its version, or a digest of its files where there is none or where they are being edited."""
    version, tells_all = _installed(top)
    return " ".join(filter(None, (version, "" if tells_all else _source_digest(top)))) or None


@functools.cache
def _installed(top: str) -> tuple[str, bool]:
    """The versions of what was installed as the module `top`, and whether these say what it does."""
    try:
        owners = [importlib.metadata.distribution(top)]
    except importlib.metadata.PackageNotFoundError:
        owners = [importlib.metadata.distribution(name) for name in sorted({*_owners().get(top, ())})]
    return " ".join(d.version for d in owners), bool(owners) and not any(map(_editable, owners))


_owners = functools.cache(importlib.metadata.packages_distributions)  # which reads everything that is installed


def _editable(installed: importlib.metadata.Distribution) -> bool:
    told = json.loads(installed.read_text("direct_url.json") or "{}")
    return bool(told.get("dir_info", {}).get("editable"))


def _source_digest(top: str) -> str:
    """Of the bytes of a module's files, wherever Python finds them; empty where it finds none."""
    spec = PathFinder.find_spec(top)
    if spec is None:
        return ""
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".so", ".pyd")]
    found = hashlib.sha256()
    for file in sorted(files) if folders else [Path(str(spec.origin))]:
        found.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return f"files {found.hexdigest()[:16]}"
