"""Where training happens: in the step's own process, or in a group of workers of Ray Train."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from operators.loop import Job, Place, train
from operators.training import Training
from operators.workspace import Workspace


def fit(
    work: Workspace, make: Callable[..., Job], arguments: Mapping[str, Any], training: Training
) -> tuple[Path, dict[str, float]]:
    """Train what `make` puts together.

    Args:
        work: The step's workspace.
        make: A function of a module, called with a `Place` and `arguments` where the training happens.
        arguments: Plain data and paths that every worker can read.
        training: The settings.

    Returns:
        The folder that the job's export wrote, and ``steps`` and ``loss_tokens``.
    """
    place = Place(device=torch.device("cuda" if work.resources.gpus else "cpu"))
    job = make(place, **arguments)
    trained = train(job, training, place, work, work.scratch)
    folder = work.scratch / "trained"
    folder.mkdir()
    job.export(trained.weights, folder)
    return folder, {"steps": trained.steps, "loss_tokens": trained.loss_tokens}
