"""A pipeline's file, with the code it brings -> Spec."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lfm.errors import LfmError
from operators.catalog import Catalog
from operators.code import Code, bring
from pipelines.source import pack
from pipelines.spec import LOADER, Spec, SpecError, follow, near, parse

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class Opened:
    """A pipeline as far as it could be read, what it can name, and what is wrong with it."""

    spec: Spec
    catalog: Catalog
    problems: tuple[str, ...]


def opened(name: str, *, changes: Sequence[str] = ()) -> Opened:
    """Read a ``.yaml`` or ``.py`` file, or the recipe called `name`.

    A Python file holds a function with the file's name (`trace`).

    Raises:
        SpecError: There is no such file or recipe, or it cannot be read as one.
    """
    path = _path(name)
    if path.suffix == ".py":
        return _python(path, changes)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError((f"pipeline {name!r}: {error}. Give a readable file.",)) from error
    problems: list[str] = []
    code, catalog = _own(path.parent, _uses(text), path.name, problems)
    spec, found = parse(text, source=path.name, catalog=catalog, code=code, changes=changes)
    return Opened(spec, catalog, (*problems, *found))


def _path(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".py"):
        if path.is_file():
            return path
        raise SpecError((f"pipeline {name!r}: no such file. Check the path.",))
    recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    if name not in recipes:
        sentence = f"pipeline {name!r}: expected a .yaml or .py file or a recipe. {near(name, recipes)}"
        raise SpecError((sentence,))
    return RECIPES / f"{name}.yaml"


def _python(path: Path, changes: Sequence[str]) -> Opened:
    problems: list[str] = []
    code, catalog = _own(path.parent, (path.name,), path.name, problems)
    if problems:
        raise SpecError(tuple(problems))
    function = getattr(catalog.modules[0], path.stem, None)
    if not callable(function):
        sentence = f"{path.name}: no function {path.stem!r}, expected one that returns the last step."
        raise SpecError((sentence,))
    spec, found = follow(function, code=_operators_only(code, catalog), catalog=catalog, changes=changes)
    return Opened(spec, catalog, tuple(found))


def _operators_only(code: Code, catalog: Catalog) -> Code:
    """Nothing to bring along where the file only writes a pipeline: then it is the same spec as its YAML."""
    return code if catalog.has_own else Code()


def _own(folder: Path, uses: tuple[str, ...], source: str, problems: list[str]) -> tuple[Code, Catalog]:
    """The user's files `uses`, imported; a file that is missing or fails becomes a problem."""
    if not uses:
        return Code(), Catalog()
    try:
        code = pack(folder.absolute(), uses)
        return code, Catalog(bring(code, str(folder.absolute())))
    except LfmError as error:
        problems.append(f"{source}: {error}")
    except Exception as error:  # anything may happen in the user's own file
        problems.append(f"{source}: uses: importing {', '.join(uses)} raised {type(error).__name__}: {error}.")
    return Code(), Catalog()


def _uses(text: str) -> tuple[str, ...]:
    """What the file brings; what is wrong with its YAML is for `parse` to say."""
    try:
        raw = yaml.load(text, Loader=LOADER)
    except yaml.YAMLError:
        return ()
    uses = raw.get("uses") if isinstance(raw, dict) else None
    return tuple(map(str, uses)) if isinstance(uses, list) else ()
