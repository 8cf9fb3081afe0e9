"""Where training happens: in the step's own process, or in a group of workers of Ray Train."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lfm.errors import LfmError
from lfm.method import Method
from operators.code import brought
from operators.learning import elastic
from operators.learning.group import GROUP, GroupFailed, Make, learn, listening, packed, worker
from operators.learning.learner import Place
from operators.learning.stretches import refused_changes
from operators.needs import unmet
from operators.resources import Resources
from operators.sharing.notices import NodeLost, lost_since, nodes
from operators.sharing.room import spot
from operators.training import Training
from operators.workspace import Workspace

START_TRIES = 3  # of a group that has its place; without a limit Ray Train tries for ever
PLACE_S = 7 * 24 * 3600  # how long one may wait for its place: the schedule ends that, and knows what can still come
MORE_S = 60  # the same of more than the fewest workers, for which there was room: others may have taken it
PLACE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late it sees that all are done
}


def refused(training: Training, resources: Resources, method: Method | None = None) -> Iterator[str]:
    """What cannot be trained so on such resources, a clause each: part of an operator's ``problems``."""
    if method is not None:
        yield from unmet(method, resources=resources, training=training)
    yield from refused_changes(training, method)
    if training.precision == "float16" and not resources.gpus:
        yield "precision='float16' on a CPU, expected 'bfloat16' or 'float32' there. Change it or ask for a GPU."
    if resources.elastic and training.checkpoint_every == 0:
        fix = "Another number of workers goes on from these."
        yield f"checkpoint_every=0 with workers={resources.spoken}, expected checkpoints. {fix} Leave it out."
    if resources.most > 1 and resources.strategy == "single":
        yield (
            f"strategy='single' with workers={resources.spoken}, expected ddp, zero1, zero2 or zero3, or one worker. "
            "Name how they share the work."
        )


def fit(
    work: Workspace,
    make: Make,
    arguments: Mapping[str, Any],
    training: Training,
    resources: Resources | None = None,
) -> tuple[Path, dict[str, int]]:
    """Train what `make` puts together.

    Args:
        work: The step's workspace.
        make: A function of a module, called with a `Place` and `arguments` where the training happens.
        arguments: Plain data and paths that every worker can read.
        training: The settings.
        resources: Where and how; None takes the step's.

    Returns:
        The folder that the job's export wrote, and what there is to say of it: ``steps`` of the optimizer,
        ``loss_tokens`` learnt, ``rows`` of the data, documents that were ``cut`` and that were ``left_out``.

    Raises:
        GroupFailed: A group of workers did not start or lost one. What a worker raises on purpose comes as it is.
        NodeLost: It lost one with its machine, and not even the fewest workers have room any more.
        Preempted: Its machines are about to be taken away; there is a checkpoint.
    """
    home = work.scratch / "training"
    home.mkdir()
    asks = resources or work.resources
    if asks.grouped:
        import ray

        if not ray.is_initialized():
            raise GroupFailed(GROUP, "there is no Ray in this process")
        group = partial(_together, work, make, arguments, training, asks)
        folder, measures = elastic.trained(work, asks, home, group) if asks.elastic else (home, group(asks.most, home))
        return folder / "trained", measures
    place = Place(device=torch.device(asks.device))
    return home / "trained", learn(place, make, arguments, training, work, home)


def _together(
    work: Workspace,
    make: Make,
    arguments: Mapping[str, Any],
    training: Training,
    asks: Resources,
    number: int,
    home: Path,
) -> dict[str, int]:
    """Train in a group of so many workers, which share a folder."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    with (
        _as_before(PLACE_S if number == asks.least else MORE_S),
        listening(work, home) as heard,
        elastic.watched(asks, number, home, heard),
    ):
        trainer = TorchTrainer(
            worker,
            train_loop_config=packed(make, arguments, training, asks, home, brought()),
            torch_config=TorchConfig(backend="nccl" if asks.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=number,
                use_gpu=asks.gpus > 0,
                resources_per_worker=dict(spot(asks).needs),
                label_selector=asks.labels or None,
            ),
            # Nothing is resumed from it: checkpoints are the workspace's, and what is tried again the schedule decides.
            run_config=RunConfig(
                name=f"step-{work.seed:012x}",
                storage_path=str(home),
                failure_config=FailureConfig(
                    max_failures=0,
                    max_preemption_failures=0,
                    controller_failure_limit=START_TRIES if number == asks.least else 1,
                ),
            ),
        )
        before = nodes()
        try:
            measures: dict[str, int] = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _reason(error, partial(lost_since, before)) from error
    return measures


def _reason(error: Any, lost: Callable[[], tuple[str, ...]]) -> LfmError:
    """The one failure that explains the others: what a worker raised on purpose, a lost machine, or the first one's."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    failures = getattr(error, "worker_failures", None)
    if not failures:
        return GroupFailed(GROUP, _first_line(getattr(error, "controller_failure", error)))
    raised = {rank: getattr(e, "_base_exc", e) for rank, e in sorted(failures.items())}
    known = [e for e in raised.values() if isinstance(e, LfmError)]
    if known:
        return known[0]
    rank, first = next(iter(raised.items()))
    who, what = f"worker {rank}", f"{type(first).__name__}: {_first_line(first)}"
    # What one raises of its own is something else than what it, or Ray Train, sees of one that has died.
    seen = (RuntimeError, ConnectionError, WorkerHealthCheckFailedError)
    gone = lost() if any(isinstance(e, seen) for e in raised.values()) else ()
    return NodeLost(who, what, gone) if gone else GroupFailed(who, what)


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextmanager
def _as_before(place_s: int) -> Iterator[None]:
    """Set what Ray Train reads from the environment, and undo what it does to this process's signals."""
    asked = {**ENVIRONMENT, PLACE: str(place_s)}
    main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    before = {k: os.environ.get(k) for k in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
