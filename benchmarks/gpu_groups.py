"""Parts of `gpu.py` that need Ray: worker groups against one process, ZeRO against whole copies, and offload."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import Bench, NotRun
from gpu_tensors import Alone
from gpu_training import drawn, training_of, tuning
from rounds import Figure, compared, interleaved

from lfm.tuning.full import Full
from operators.learning.trainer import fit
from operators.resources import Resources

WARM = 3
HERE = Path(__file__).resolve().parent


class Watched(Alone):
    """Remembers when each step was heard of."""

    def __init__(self, scratch: Path, resources: Resources) -> None:
        super().__init__(scratch, resources)
        self.times: list[float] = []

    def progress(self, done: int, total: int, **measures: float) -> None:
        """A step is done."""
        self.times.append(time.perf_counter())


def group(bench: Bench) -> Iterator[Figure | str]:
    """A worker group of one process against the step's own process: what Ray Train costs once it runs."""
    settings = {"a group of one": {"strategy": "ddp"}, "the step's process": {}}
    yield from _trained(bench, settings, "the step's process", workers=1)


def zero(bench: Bench) -> Iterator[Figure | str]:
    """ZeRO against whole copies, over two workers."""
    settings = {s: {"strategy": s, "workers": 2} for s in ("zero2", "zero3", "ddp")}
    yield from _trained(bench, settings, "ddp", workers=2)


def offload(bench: Bench) -> Iterator[Figure | str]:
    """ZeRO with the optimizer in the host's memory against ZeRO without, on one GPU."""
    if bench.device.type != "cuda":
        raise NotRun("it moves what a GPU holds, and there is none")
    settings = {
        "zero2, offload to the CPU": {"strategy": "zero2", "offload": "cpu"},
        "zero2": {"strategy": "zero2"},
    }
    yield from _trained(bench, settings, "zero2", workers=1)


def _trained(
    bench: Bench, settings: Mapping[str, Mapping[str, Any]], baseline: str, *, workers: int
) -> Iterator[Figure | str]:
    on_gpu = bench.device.type == "cuda"
    there = torch.cuda.device_count() if on_gpu else workers
    if there < workers:
        raise NotRun(f"needs {workers} GPUs, and there is {there}")
    size, training = bench.sizes["0.5b"], training_of(bench, 8)
    rows = drawn(training.batch_size * 2, training.length, size.vocabulary)
    arguments = {"folder": bench.folder(size), "method": Full(), "training": training, "rows": rows}
    gpus = {"gpus_per_worker": 1.0, "accelerator": "gpu"} if on_gpu else {}

    def rate(setting: Mapping[str, Any], number: int) -> float:
        bench.clear()
        work = Watched(Path(tempfile.mkdtemp(dir=bench.home)), Resources(**setting, **gpus))
        fit(work, tuning, arguments, training)
        if len(work.times) <= WARM:
            raise NotRun(f"only {len(work.times)} steps were heard of")
        spent = work.times[-1] - work.times[WARM - 1]
        return training.batch_size * training.length * (len(work.times) - WARM) / max(spent, 1e-9)

    with _ray(workers, on_gpu=on_gpu):
        values = interleaved(
            {n: partial(rate, s) for n, s in settings.items()}, min(2, bench.rounds), until=bench.until
        )
    for name in settings:
        if name != baseline:
            label = f"{name}, full tuning of 0.5b on {workers} {'GPU' if on_gpu else 'CPU'}s"
            yield compared(values, name, baseline, unit="tokens/s", label=label)


@contextmanager
def _ray(workers: int, *, on_gpu: bool) -> Iterator[None]:
    """A Ray of its own, whose workers find these scripts."""
    import ray

    path = f"{HERE}:{HERE.parent}"
    ray.init(
        num_cpus=workers + 1, num_gpus=workers if on_gpu else 0, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
