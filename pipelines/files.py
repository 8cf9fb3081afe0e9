"""A pipeline's file, with the code it brings -> Spec."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from operators.catalog import Catalog
from operators.code import Code, OwnCodeFailed, ShadowedModule, bring
from pipelines.builder import uses_of
from pipelines.problems import Part, Problem, SpecError, near
from pipelines.source import MissingCode, pack
from pipelines.spec import Draft, Spec, followed, parsed
from pipelines.text import Text

RECIPES = Path(__file__).parent / "recipes"
ENDS = (".yaml", ".yml", ".py")


@dataclass(frozen=True, slots=True)
class Opened:
    """A pipeline as far as it could be read, and what it can name."""

    draft: Draft
    catalog: Catalog

    @property
    def spec(self) -> Spec:
        """The pipeline without what is wrong with it."""
        return self.draft.spec

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with it, each a sentence that starts with where."""
        return self.draft.places.sentences(self.draft.problems)


def opened(name: str, *, changes: Sequence[str] = ()) -> Opened:
    """Read a ``.yaml`` or ``.py`` file, or the recipe called `name`.

    A Python file holds a function with the file's name (`trace`).

    Raises:
        SpecError: There is no such file or recipe, or it cannot be read as one.
    """
    path = _path(name)
    if path.suffix == ".py":
        return _python(path, changes)
    text = Text(_text_of(path), path.name)
    uses, _ = uses_of(text.raw)
    problems: list[Problem] = []
    code, catalog = _own(path.parent.absolute(), uses, problems)
    draft = parsed(text, catalog=catalog, code=code, changes=changes, partial=bool(problems))
    return Opened(replace(draft, problems=(*problems, *draft.problems)), catalog)


def carried(name: str, code: Code) -> dict[str, bytes]:
    """The files of a pipeline by their names beside it, its own first; none of a recipe, which is everywhere.

    Args:
        name: What `opened` was given.
        code: The pipeline's.
    """
    path = Path(name)
    if path.suffix not in ENDS:
        return {}
    files = dict(code.files) if path.suffix != ".py" else dict(pack(path.parent.absolute(), (path.name,)).files)
    return {path.name: path.read_bytes(), **{n: text.encode() for n, text in files.items()}}


def _path(name: str) -> Path:
    path = Path(name)
    if path.suffix in ENDS:
        if path.is_file():
            return path
        beside = [str(p) for p in path.parent.glob("*") if p.suffix in ENDS] if path.parent.is_dir() else []
        raise SpecError((f"pipeline {name!r}: no such file, expected a .yaml or .py file. {near(name, beside)}",))
    recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    if name not in recipes:
        raise SpecError((f"pipeline {name!r}: expected a .yaml or .py file or a recipe. {near(name, recipes)}",))
    return RECIPES / f"{name}.yaml"


def _text_of(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        what = (error.strerror or str(error)).lower()
        raise SpecError((f"{path.name}: {what}, expected a file that can be read. Give access.",)) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"the byte {data[error.start]:#04x} is no UTF-8, expected text in it. Convert the file."
        raise SpecError((f"{path.name}:{line}: {what}",)) from error


def _python(path: Path, changes: Sequence[str]) -> Opened:
    folder = path.parent.absolute()
    try:
        code = pack(folder, (path.name,))
        catalog = Catalog(bring(code, str(folder)))
        name = path.stem.replace("-", "_")
        function = getattr(catalog.modules[0], name, None)
        if not callable(function):
            fix = f"Write def {name}(...)."
            raise SpecError((f"{path.name}: no function {name!r}, expected one that returns the last step. {fix}",))
        draft = followed(function, code=_operators_only(code, catalog), brought=code, catalog=catalog, changes=changes)
    except OwnCodeFailed as error:
        raise SpecError((str(error),)) from error
    return Opened(draft, catalog)


def _operators_only(code: Code, catalog: Catalog) -> Code:
    """Nothing to bring along where the file only writes a pipeline: then it is the same spec as its YAML."""
    return code if catalog.has_own else Code()


def _own(folder: Path, uses: Mapping[str, str], problems: list[Problem]) -> tuple[Code, Catalog]:
    """The user's files `uses`, imported; one that is missing or fails becomes a problem."""
    for number, file in uses.items():
        with _noted(("uses", number), problems):
            pack(folder, (file,))
    if uses and not problems:
        with _noted(("uses",), problems):
            code = pack(folder, tuple(uses.values()))
            return code, Catalog(bring(code, str(folder)))
    return Code(), Catalog()


@contextmanager
def _noted(part: Part, problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except OwnCodeFailed as error:
        problems.append(Problem(part, f"uses: {error}"))
    except (MissingCode, ShadowedModule) as error:
        problems.append(Problem(part, str(error)))
