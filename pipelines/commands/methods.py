"""`lfm methods`: list every method."""

from argparse import Namespace
from typing import Any

from rich.table import Table

import lfm
from lfm.errors import UnknownName
from pipelines.commands._output import printed, shown


def act(arguments: Namespace) -> int:
    """List every method."""
    families = {n.partition("/")[0] for n in lfm.names()}
    if arguments.family and arguments.family not in families:
        raise UnknownName("family", arguments.family, sorted(families))
    found: list[dict[str, Any]] = []
    for name in lfm.names(arguments.family or None):
        method = lfm.find(name)
        about = (method.__doc__ or "").strip().partition("\n")[0]
        found.append({"name": name, "class": method.__name__, "reference": method.reference, "area": method.area,
                      "leaf": method.leaf, "about": about})  # fmt: skip
    if arguments.json:
        return printed(found)
    rows = Table("method", "class", "reference", "what for", box=None, pad_edge=False, header_style="bold")
    for one in sorted(found, key=lambda m: (m["area"], m["leaf"], m["name"])):
        rows.add_row(one["name"], one["class"], one["reference"], one["about"])
    shown(rows)
    return 0
