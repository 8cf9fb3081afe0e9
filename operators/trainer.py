"""Where training happens: in the step's own process, or in a group of workers of Ray Train."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from operators.loop import Job, Place, train
from operators.resources import Resources
from operators.training import Training
from operators.workspace import Workspace


def refused(training: Training, resources: Resources) -> Iterator[str]:
    """What cannot be trained so on such resources, a clause each: part of an operator's ``problems``."""
    if training.precision == "float16" and not resources.gpus:
        yield "precision='float16' on a CPU, expected 'bfloat16' or 'float32' there. Change it or ask for a GPU."


def fit(
    work: Workspace, make: Callable[..., Job], arguments: Mapping[str, Any], training: Training
) -> tuple[Path, dict[str, int]]:
    """Train what `make` puts together.

    Args:
        work: The step's workspace.
        make: A function of a module, called with a `Place` and `arguments` where the training happens.
        arguments: Plain data and paths that every worker can read.
        training: The settings.

    Returns:
        The folder that the job's export wrote, and what there is to say of it: ``steps`` of the optimizer,
        ``loss_tokens`` learnt, ``rows`` of the data, documents that were ``cut`` and that were ``left_out``.
    """
    place = Place(device=torch.device("cuda" if work.resources.gpus else "cpu"))
    job = make(place, **arguments)
    trained = train(job, training, place, work, work.scratch)
    folder = work.scratch / "trained"
    folder.mkdir()
    job.export(trained.weights, folder)
    rows = job.rows
    seen = {"rows": len(rows), "cut": rows.cut, "left_out": rows.left_out}
    return folder, {"steps": trained.steps, "loss_tokens": trained.loss_tokens, **seen}
