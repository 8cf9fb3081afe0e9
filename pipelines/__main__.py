"""The command line: ``lfm <command>``. Nothing heavy is imported before a command runs."""

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Option = tuple[str, dict[str, Any]]


def _number(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    """Reads an option that is a whole number from `least` to `most`."""
    allowed = f"a whole number from {least} to {most}" if most < sys.maxsize else f"a whole number, {least} or more"

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {allowed}")
        return int(text)

    return read


def _duration(text: str) -> float:
    """Reads an option that is a time: ``90s``, ``45m``, ``8h``, ``1h30m``; gives seconds."""
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text)
    try:
        found = sum(float(n) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True) if n) if parts else 0
    except ValueError:
        found = 0
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a time such as 8h, 90m or 1h30m")
    return found


def _amount(text: str) -> float:
    """Reads an option that is an amount of money."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected an amount more than 0, such as 20")
    return float(text)


def _label(text: str) -> tuple[str, str]:
    """Reads an option that is a label: ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z][\w./-]*", name) or not value:
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE such as team=research")
    return name, value


PORT = _number(1, 65535)
STORED = "RUN/STEP, a step of the last run that made it, NAME@ALIAS, NAME:VERSION, or how a digest begins"
PIPELINE: Option = ("pipeline", {"help": "a .yaml or .py file, or the name of a recipe that comes along"})
RUN: Option = ("run", {"help": "a run's name, a part that only it has, or 'last'"})
STORE: Option = ("--store", {"default": ".lfm", "help": "where artifacts and runs are kept (default: .lfm)"})
JSON: Option = ("--json", {"action": "store_true", "help": "print data instead of text"})
SET: Option = ("--set", {"action": "append", "default": [], "metavar": "A.B=VALUE", "dest": "changes",
    "help": "change an input (name=URI), a step's field (step.field=value), or replace a step (step=URI)"})  # fmt: skip
UNTIL: Option = ("--until", {"default": "", "metavar": "STEP", "help": "leave out what STEP does not need"})
ADDRESS: Option = (
    "--address",
    {"default": "local", "help": "a running Ray cluster (default: one that ends with the run)"},
)

DETACH: Option = (
    "--detach",
    {
        "action": "store_true",
        "help": "show the run until its endpoints are up, then leave them to the background; 'lfm stop' ends them",
    },
)
MLFLOW: Option = ("--mlflow", {"default": "", "metavar": "URI",
    "help": "where MLflow keeps runs: a server, a database, 'own' (beside the artifacts) or 'none' (default: "
            "MLFLOW_TRACKING_URI, else own where the store is a folder)"})  # fmt: skip
CLUSTER: Option = ("--cluster", {"default": "", "metavar": "PROFILE",
    "help": "the profile of a cluster (a .yaml file), which says where that keeps artifacts and runs"})  # fmt: skip
LIMITS: list[Option] = [
    ("--deadline", {"type": _duration, "default": 0.0, "metavar": "TIME",
                    "help": "stop cleanly before the run has worked for longer, such as 8h"}),
    ("--max-cost", {"type": _amount, "default": 0.0, "metavar": "AMOUNT",
                    "help": "stop cleanly before the cluster's machines have cost more meanwhile"}),
    ("--priority", {"type": _number(-1000, 1000), "default": 0, "metavar": "N",
                    "help": "of runs that want the same machines, the one with the highest comes first (default: 0)"}),
    ("--label", {"type": _label, "action": "append", "default": [], "metavar": "NAME=VALUE", "dest": "labels",
                 "help": "whom the cost is for; the run's record keeps it"}),
]  # fmt: skip
AS: Option = ("--as", {"default": "", "dest": "name", "metavar": "NAME", "help": argparse.SUPPRESS})

COMMANDS: dict[str, tuple[str, str, list[Option]]] = {
    "plan": (
        "say what a run would do, what it takes and costs on a cluster, and everything that is wrong with the pipeline",
        "lfm plan pipeline.yaml --set distilled.max_steps=100 --cluster gpus.yaml",
        [PIPELINE, SET, UNTIL, STORE, ADDRESS, CLUSTER, JSON,
         ("--no-hash", {"action": "store_true", "help": "hash no local input; what depends on one stays unknown"})],
    ),
    "run": (
        "run a pipeline; what is in the store is reused",
        "lfm run pipeline.yaml --until merged",
        [PIPELINE, SET, UNTIL, STORE, ADDRESS, JSON,
         ("--force", {"action": "append", "default": [], "metavar": "STEP", "help": "run STEP although it is stored"}),
         ("--retries", {"type": _number(0), "default": 2, "metavar": "N",
                        "help": "try a step whose process died N times more (default: 2)"}),
         MLFLOW, DETACH, CLUSTER, *LIMITS, AS],
    ),
    "submit": (
        "run a pipeline on a cluster, which goes on with it whatever becomes of this machine",
        "lfm submit pipeline.yaml --cluster gpus.yaml --deadline 8h --max-cost 20",
        [PIPELINE, ("--cluster", {**CLUSTER[1], "required": True}), SET, UNTIL, MLFLOW, *LIMITS, JSON,
         ("--detach", {"action": "store_true", "help": "do not follow the run; 'lfm ps' and 'lfm logs' tell of it"})],
    ),
    "resume": (
        "go on with a run that was interrupted or failed",
        "lfm resume last",
        [RUN, STORE, ADDRESS, CLUSTER, MLFLOW, JSON],
    ),
    "stop": ("end a run that is going on, on this machine or another", "lfm stop last", [RUN, STORE, CLUSTER]),
    "ps": ("list runs", "lfm ps", [STORE, CLUSTER, JSON]),
    "show": (
        "show a run: steps, times and what they made",
        "lfm show last --html run.html",
        [RUN, STORE, CLUSTER, JSON,
         ("--html", {"default": "", "metavar": "FILE", "help": "write one self-contained page for a browser instead"})],
    ),
    "logs": (
        "print what a step printed, or what the driver did of a run that was submitted",
        "lfm logs last merged",
        [RUN, ("step", {"nargs": "?", "default": "", "help": "a step's name (default: the driver)"}), STORE, CLUSTER,
         ("--attempt", {"type": _number(0), "default": 0, "metavar": "N", "help": "which (default: the last)"})],
    ),
    "serve": (
        "serve a stored model as an endpoint with the OpenAI API, until Ctrl-C",
        "lfm serve up last/merged --port 8000",
        [("action", {"choices": ["up"], "help": "bring it up"}),
         ("model", {"help": STORED}),
         ("--base", {"default": "", "metavar": "MODEL", "help": "a stored model that its logits must differ from"}),
         ("--name", {"default": "model", "help": "what requests call it (default: model)"}),
         ("--host", {"default": "127.0.0.1", "help": "where it listens (default: 127.0.0.1)"}),
         ("--port", {"type": PORT, "default": 8000, "help": "the same (default: 8000)"}),
         STORE, ADDRESS, MLFLOW, JSON, DETACH, AS],
    ),
    "cluster": (
        "write a profile to begin with, print its documents, or start, look at and end its cluster",
        "lfm cluster init profile.yaml --place kuberay",
        [("action", {"choices": ["init", "render", "up", "down", "status"],
                     "help": "init: write a commented profile; render: print the documents for Kubernetes or for "
                             "Ray's launcher, with a pipeline those that run and serve it; up, down: start and end a "
                             "cluster of this machine or a cloud; status: nodes, jobs, hours and cost so far"}),
         ("profile", {"nargs": "?", "default": "", "help": "a profile's .yaml file (init without one prints it)"}),
         ("pipeline", {"nargs": "?", "default": "", "help": PIPELINE[1]["help"]}),
         ("--place", {"choices": ["local", "address", "kuberay", "aws", "gcp"], "default": "kuberay",
                      "help": "init: where pipelines are to run (default: kuberay)"}),
         ("--kind", {"default": "", "metavar": "KIND",
                     "help": "render: only this document, such as RayJob or RayService"}),
         ("--yes", {"action": "store_true", "help": "down: do not ask"}),
         ("--when-idle", {"action": "store_true",
                          "help": "down: wait until no job runs and nothing was used for the groups' idle_timeout_s"}),
         SET, UNTIL, MLFLOW, *LIMITS, JSON],
    ),
    "why": (
        "say why a step ran or was reused: which part of its fingerprint differs from the result nearest to it",
        "lfm why last merged",
        [RUN, ("step", {"help": "a step's name"}), STORE, JSON],
    ),
    "lineage": (
        "print what an artifact came from, down to the data",
        "lfm lineage last/merged",
        [("artifact", {"help": STORED}), STORE, JSON],
    ),
    "export": (
        "write a model or an adapter into a folder that transformers, PEFT and vLLM load, with a model card",
        "lfm export last/merged ./merged",
        [("artifact", {"help": STORED}), ("folder", {"help": "a new or an empty folder"}), STORE, JSON],
    ),
    "gc": (
        "delete what no run and no registered name refers to",
        "lfm gc --keep-last 20 --dry-run",
        [("--keep-last", {"type": int, "metavar": "N", "help": "drop all runs but the last N, and those going on"}),
         ("--run", {"action": "append", "default": [], "dest": "runs", "metavar": "RUN", "help": "drop this run"}),
         ("--dry-run", {"action": "store_true", "help": "only say what would go"}), STORE, JSON],
    ),
    "methods": (
        "list every method that a pipeline can name",
        "lfm methods merging",
        [("family", {"nargs": "?", "default": "", "help": "only this family"}), JSON],
    ),
    "ui": (
        "show the runs of a store on MLflow's own pages, until Ctrl-C",
        "lfm ui --port 5001",
        [STORE, MLFLOW, ("--port", {"type": PORT, "default": 5000, "help": "where it listens (default: 5000)"})],
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run one command and return the exit code: 0 only if all that was asked for happened."""
    words = sys.argv[1:] if arguments is None else arguments
    wrong = shadowed() or _no_command(words)
    if not wrong:
        parsed, unknown = parser().parse_known_args(words)
        wrong = _unknown(parsed.command, unknown)
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    parsed.words = words
    from cluster.home import clear
    from lfm.errors import LfmError
    from pipelines.interrupts import INTERRUPTED, interruptible

    try:  # Ctrl-C may come while torch is imported, which takes longest of all
        with interruptible():
            clear()
            module = importlib.import_module(f"pipelines.commands.{parsed.command}")
            act: Callable[[argparse.Namespace], int] = module.act
            return act(parsed)
    except LfmError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0


def _no_command(words: Sequence[str]) -> str:
    """A sentence about a first word that is no command, or nothing."""
    from pipelines.problems import near

    if not words or words[0].startswith("-") or words[0] in COMMANDS:
        return ""
    return f"lfm: no command is called {words[0]!r}. {near(words[0], COMMANDS)}"


def _unknown(command: str, words: Sequence[str]) -> str:
    """A sentence about the first of some words that a command does not take, an option before any other, or nothing."""
    from pipelines.problems import near

    if not words:
        return ""
    named = {word.startswith("-"): word for word in reversed(words)}
    names = [name for name, _ in COMMANDS[command][2]]
    if True in named:
        option = named[True].partition("=")[0]
        known = [name for name in names if name.startswith("-")]
        return f"lfm {command}: no option is called {option!r}. {near(option, known)}"
    taken = " and ".join(name for name in names if not name.startswith("-")) or "options"
    return f"lfm {command}: {named[False]!r} is one word too many, expected {taken} alone. Leave it out."


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="lfm", description="Pipelines of methods that learn from models, on Ray.", allow_abbrev=False
    )
    below = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (what, example, options) in COMMANDS.items():
        sub = below.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"Example: {example}",
            allow_abbrev=False,
        )
        for option, settings in options:
            sub.add_argument(option, **settings)
    return top


def shadowed() -> str:
    """A sentence about the first of our packages that the import path hides, or nothing."""
    for name in ("lfm", "operators", "cluster", "pipelines"):
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if where != ROOT / name:
            return (
                f"package {name!r}: Python finds {where}, expected {ROOT / name}. Rename yours, or start lfm from "
                "another folder."
            )
    return ""


if __name__ == "__main__":
    sys.exit(main())
