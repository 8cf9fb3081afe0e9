"""What commands print: JSON, or a table."""

import json
import sys
from typing import Any

from rich.console import Console, RenderableType


def printed(value: Any) -> int:
    """Print `value` as JSON; the exit code of a command that does nothing else."""
    print(json.dumps(value, indent=2, default=str))
    return 0


def shown(rows: RenderableType) -> None:
    """A table as wide as it needs to be where nobody's terminal sets a width."""
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    console.print(rows)
