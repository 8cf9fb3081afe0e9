"""What `lfm.json` says of the folder in which it lies; read without torch, so that a plan can look too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm.weight_index import parsed
from operators.artifact import REWRITES


def described(folder: Path) -> Mapping[str, Any]:
    """All that it says; nothing where there is none.

    Raises:
        WeightsError: It is no JSON object.
    """
    path = folder / REWRITES
    return parsed(path, path.read_bytes()) if path.is_file() else {}
