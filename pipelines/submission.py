"""Plan x profile -> what a cluster is told: the run's name, the package with its code, the words that drive it."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.entrypoint import OWN, PROFILE, Entrypoint
from cluster.package import Package, packaged
from cluster.profile import Profile
from pipelines.files import carried
from pipelines.lineage import new_run
from pipelines.plan import Plan
from pipelines.source import ROOT
from pipelines.storage.base import Storage
from pipelines.store import canonical


def key_of(made: Mapping[str, Any], inputs: Mapping[str, Any], profile: Profile) -> str:
    """What is the same for the same pipeline, inputs and profile, and for nothing else.

    Args:
        made: Every step as a journal has it: with its fingerprint, and with all that this is a hash of, which tells
            apart what has none.
        inputs: What comes from outside, pinned.
        profile: Where it runs.
    """
    return hashlib.sha256(canonical({"steps": made, "inputs": inputs, "profile": asdict(profile)})).hexdigest()


def run_of(storage: Storage, key: str, pipeline: str) -> str:
    """The name of the run that a key stands for: whoever asks first gives it one, for all who ask later."""
    at = f"submissions/{key}.json"
    storage.put_if_absent(at, canonical({"run": new_run(pipeline)}))
    return str(json.loads(storage.read(at) or b"{}")["run"])


def packed(pipeline: str, profile: str, made: Plan) -> Package:
    """This project, a pipeline's files and a profile's as one.

    Args:
        pipeline: The pipeline's file, or a recipe's name.
        profile: The profile's file.
        made: The plan of the pipeline.

    Raises:
        PackageTooLarge: It is larger than code is.
    """
    own = {f"{OWN}/{name}": data for name, data in carried(pipeline, made.spec.code).items()}
    return packaged(ROOT, {**own, PROFILE: Path(profile).read_bytes()}, version=version("learn-from-model"))


def entrypoint(arguments: Namespace, made: Plan, profile: Profile, storage: Storage, run: str) -> Entrypoint:
    """The words that drive a run from inside of the cluster, given those of the command line.

    Inputs are named as they were pinned here: what is read there is what was planned, wherever it is read from.
    """
    pins = {n: a.uri for n, a in made.inputs.items() if a.uri != made.spec.inputs[n].uri}
    path = Path(arguments.pipeline)
    return Entrypoint(
        pipeline=f"{OWN}/{path.name}" if path.suffix else arguments.pipeline,
        run=run,
        store=storage.uri,
        changes=(*arguments.changes, *(f"{name}={uri}" for name, uri in pins.items())),
        until=arguments.until,
        mlflow=arguments.mlflow or profile.mlflow,
        deadline_s=arguments.deadline,
        max_cost=arguments.max_cost,
        priority=arguments.priority,
        labels=dict(arguments.labels),
    )
