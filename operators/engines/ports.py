"""Whether somebody can listen on a port; free of torch, as the plan and `lfm ui` ask too."""

import errno
import socket

from lfm.errors import LfmError

LAST_PORT = 65535


class PortBusy(LfmError, OSError):
    """A place where nobody can listen: another process does, or the host is not this machine."""

    def __init__(self, who: str, host: str, port: int, why: str) -> None:
        super().__init__(who, host, port, why)
        self.who, self.host, self.port, self.why = who, host, port, why

    def __str__(self) -> str:
        return f"{self.who}: {self.host}:{self.port} {self.why}, expected a free port. Give another one."


def check_port(who: str, host: str, port: int) -> None:
    """Raise `PortBusy` unless somebody can listen there.

    Args:
        who: What wants to, for the message.
        host: The machine's name or address.
        port: From 1 to `LAST_PORT`.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = f"cannot be listened on ({(error.strerror or str(error)).lower()})"
            raise PortBusy(who, host, port, "is in use" if error.errno == errno.EADDRINUSE else why) from error
