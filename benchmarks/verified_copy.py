"""What it costs to know that a copy is right: `lfm export` hashes a file while it copies it.

The hash is SHA-256, because artifacts are addressed by it: another, faster one could not tell whether a copy is what
the manifest says. Every rival has its bytes on disk when it returns, and reads a file that is in memory already.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rounds import Figure, command_line, compared, interleaved, said

from pipelines.storage.base import copied, digest_of

COPY, VERIFIED, TWICE, HASH = "copy and fsync", "hashed meanwhile", "hashed after it", "only hashed"


def figures_of(folder: Path, size: int, rounds: int) -> list[Figure]:
    """Of a file of so many bytes of noise."""
    source, target = folder / "source", folder / "target"
    with source.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    digest = digest_of(source)

    def copy() -> str:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        return digest

    def twice() -> str:
        copy()
        return digest_of(target)

    def speed(act: Callable[[], str]) -> Callable[[int], float]:
        def timed(_: int) -> float:
            target.unlink(missing_ok=True)
            os.sync()  # what others have left to write is not this one's
            began = time.perf_counter()
            found = act()
            took = time.perf_counter() - began
            assert found == digest, act
            return size / took / 1e9

        return timed

    rivals = {COPY: copy, VERIFIED: lambda: copied(source, target), TWICE: twice, HASH: lambda: digest_of(source)}
    values = interleaved({name: speed(act) for name, act in rivals.items()}, rounds)
    what = f"a file of {size >> 20} MiB"
    return [
        compared(values, VERIFIED, COPY, unit="GB/s", label=f"{what} copied and {VERIFIED}", aim=">= 0.8"),
        compared(values, TWICE, COPY, unit="GB/s", label=f"{what} copied and {TWICE}"),
        compared(values, HASH, COPY, unit="GB/s", label=f"{what} {HASH}, by one core"),
    ]


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=7)
    parser.add_argument("--size", type=int, default=1024, metavar="MiB", help="of the file")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="copies-") as folder:
        said(figures_of(Path(folder), asked.size << 20, asked.rounds), asked)


if __name__ == "__main__":
    main()
