"""Which files of a data set hold its rows, by their names alone."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from lfm.errors import LfmError

PARQUET = (".parquet",)
JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
# What hub folders and this project's store keep beside the rows.
NO_ROWS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "manifest.json", "state.json"}

# Words in the names of files and folders by which data say what they are for: not to be mixed.
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing"}
NUMBER = re.compile(r"[-_.]?\d+(-of-\d+.*)?$")  # of one file of several, as in ``train-00000-of-00003-1a2b``


class DatasetError(LfmError, ValueError):
    """Data that cannot be read, or that is not what its reader needs."""

    def __init__(self, where: str, what: str, fix: str) -> None:
        super().__init__(where, what, fix)
        self.where, self.what, self.fix = where, what, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}"


def files_of(path: Path, pattern: str | None = None) -> list[Path]:
    """The files of a data set in the order of their paths; hidden ones are no part of it.

    Args:
        path: A file, or a folder of files.
        pattern: Which files of a folder; without one they have to be of one part, all training data or all test data.

    Raises:
        DatasetError: There is none, or they are of several parts.
    """
    ends = ", ".join((*PARQUET, *JSON))
    if not path.exists():
        raise DatasetError(str(path), "is not there, expected a file or folder of rows", "Check the path.")
    if path.is_file():
        if pattern is not None:
            what = f"is a file, expected a folder to choose files={pattern!r} from"
            raise DatasetError(str(path), what, "Leave files out.")
        if not path.name.endswith((*PARQUET, *JSON)):
            raise DatasetError(str(path), f"ends in {path.suffix!r}, expected {ends}", "Convert the file.")
        return [path]
    inside = sorted((p.relative_to(path) for p in path.rglob("*")), key=PurePath.as_posix)
    found = [p for p in inside if may_hold_rows(p) and (path / p).is_file()]
    if not found:
        raise DatasetError(str(path), f"holds no file of rows, expected {ends}", "Check the path.")
    chosen = [p for p in found if pattern is None or fnmatchcase(p.as_posix(), pattern)]
    if not chosen:
        what = f"holds no file that matches files={pattern!r}, expected one of {_listed([p.as_posix() for p in found])}"
        raise DatasetError(str(path), what, "Correct the pattern.")
    parts = list(dict.fromkeys(map(_part, chosen)))
    if pattern is None and len(parts) > 1:
        what = f"holds {_listed([p or 'other files' for p in parts])}, expected one of them"
        named = min(filter(None, parts), key=lambda part: "train" not in part)
        raise DatasetError(str(path), what, f"Choose with prepare's files, such as files: '{named}*'.")
    return [path / p for p in chosen]


def may_hold_rows(path: PurePath) -> bool:
    """Whether a file of a data set, by its path in it, is one of rows and not hidden."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name not in NO_ROWS and path.name.endswith((*PARQUET, *JSON))


def _part(path: PurePath) -> str:
    """What a path says of the part of the data that is there, such as ``main/train``; empty where it says nothing."""
    *folders, name = path.parts
    stem = NUMBER.sub("", name[: name.index(".")])
    for depth, word in reversed([*enumerate(folders), (len(folders), stem)]):
        if SPLITS & set(re.split(r"[^a-z]+", word.casefold())):
            return "/".join([*folders[:depth], word])
    return ""


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(map(repr, names[:6]))
    return few if len(names) <= 6 else f"{few} and {len(names) - 6} more"
