"""The process that sees a Ray of our own to its end: run as ``python -m cluster.warden FOLDER`` by `cluster.home`."""

import os
import signal
import sys
from pathlib import Path

from cluster.home import end


def main(folder: Path) -> None:
    """Wait until standard input is closed, which it is when the driver has ended in whatever way."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # who ends a whole service tells everybody
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1):
        pass
    end(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
