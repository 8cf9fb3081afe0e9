"""`lfm cluster`: the cluster that a profile describes."""

import importlib
from argparse import Namespace


def act(arguments: Namespace) -> int:
    """Do one action, which is a module of its own."""
    return int(importlib.import_module(f"pipelines.commands.clusters.{arguments.action}").act(arguments))
