"""Which files hold the weights of a folder that has several; without torch, so that a plan can look too."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from lfm.errors import LfmError


class WeightsError(LfmError, ValueError):
    """A folder that does not hold weights as it should."""

    def __init__(self, where: str, what: str, allowed: str) -> None:
        super().__init__(where, what, allowed)
        self.where, self.what, self.allowed = where, what, allowed

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected {self.allowed}."


def parsed(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in a file's bytes.

    Raises:
        WeightsError: There is none.
    """
    try:
        parsed = json.loads(data)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise WeightsError(str(path), "unreadable", "a JSON object")
    return parsed


def indexed(index: Path) -> dict[str, set[str]]:
    """The files that an index names, each with the parameters that it looks for in it.

    Raises:
        WeightsError: It is no index, or names what is no file of safetensors beside it.
    """
    places = parsed(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, dict):
        raise WeightsError(str(index), "no weight_map", "one that names a file for each parameter")
    wanted: dict[str, set[str]] = {}
    for name, file in places.items():
        # Loaders join what stands here to the folder, and unpickle a file that has another name.
        if not isinstance(file, str) or PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise WeightsError(str(index), f"names {file!r}", "files of safetensors that lie beside it")
        wanted.setdefault(file, set()).add(name)
    return wanted
