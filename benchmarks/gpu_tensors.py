"""Parts of `gpu.py`: the loss of distillation in chunks and whole, and merging on the device."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distillation_memory import DENSE, OURS as CHUNKED, chunked, dense, drawn
from gpu_models import Bench, OtherWork, close, seconds
from merging import made
from rounds import Figure, compared, interleaved
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm.chunks import chunk_size
from lfm.merging.base import Merge
from lfm.merging.task_arithmetic import TaskArithmetic
from lfm.merging.ties import TIES
from lfm.soft_targets import Dense
from operators.artifact import Artifact, Model
from operators.merging import merge
from operators.resources import Resources

OURS, BY_HAND = "lfm", "bare PyTorch"
SAME = 0.02  # by which share losses in bfloat16 may differ
EXPERTS = 3


def distillation_loss(bench: Bench) -> Iterator[Figure | str]:
    """Time and memory of one forward and backward pass of the head and the loss."""
    vocabulary, width = bench.either(151_936, 512), bench.either(896, 16)
    for tokens in bench.either((2048, 8192), (64,)):
        own = chunk_size(vocabulary, bench.device)
        sizes = bench.either(sorted({13, 128, 1024, own}), [8, min(own, tokens)])
        yield from _loss(bench, tokens, vocabulary, width, {f"{CHUNKED}, {n} at once": n for n in sizes}, own)


def _loss(
    bench: Bench, tokens: int, vocabulary: int, width: int, chunks: dict[str, int], own: int
) -> Iterator[Figure | str]:
    bench.clear()
    hidden, weight, teacher = drawn(tokens, vocabulary, width, bench.device)
    hidden = hidden.detach().bfloat16().requires_grad_()  # as autocast leaves it
    teacher = replace(teacher, hidden=teacher.hidden.bfloat16(), weight=teacher.weight.bfloat16())
    forms: dict[str, Any] = {name: partial(chunked, chunk=size) for name, size in chunks.items()}
    losses: dict[str, float] = {}
    memory: dict[str, list[float]] = {n: [] for n in (*forms, DENSE)}

    def once(name: str, number: int) -> float:
        hidden.grad = weight.grad = None
        bench.clear()
        before = bench.peak_gib()
        took = seconds(bench.device, partial(_kept, losses, name, {**forms, DENSE: dense}, (hidden, weight, teacher)))
        after = bench.peak_gib()
        memory[name] += [] if before is None or after is None else [after - before]
        return took

    names = (*forms, DENSE)
    for name in names:
        once(name, 0)  # what is chosen and allocated once
    if not close([losses[n] for n in forms], [losses[DENSE]] * len(forms), SAME):
        raise OtherWork(f"losses differ: {losses}")
    times = interleaved({n: partial(once, n) for n in names}, 2 * bench.rounds, until=bench.until)
    where = f"{tokens} tokens x {vocabulary} words"
    for name, size in chunks.items():
        label = f"{name}{' (ours)' if size == own else ''}, {where}"
        yield compared(times, name, DENSE, unit="s", label=f"distillation loss, {label}: time")
        if memory[name]:
            yield compared(memory, name, DENSE, unit="GiB", label=f"distillation loss, {label}: peak memory")
    if not memory[DENSE]:
        yield f"distillation loss, {where}: peak memory: not run: only a GPU counts it; see distillation_memory.py"


def _kept(losses: dict[str, float], name: str, forms: dict[str, Any], given: tuple[Tensor, Tensor, Dense]) -> None:
    with torch.autocast(given[0].device.type, torch.bfloat16):
        losses[name] = forms[name](*given)


def merging(bench: Bench) -> Iterator[Figure | str]:
    """A merge of tensors that are on the device, and one of files."""
    values = bench.either(1 << 26, 1 << 12)
    draws = torch.Generator(bench.device).manual_seed(0)
    base, *deltas = (torch.randn(values, device=bench.device, generator=draws) for _ in range(1 + EXPERTS))
    stack = torch.stack([base + 0.01 * d for d in deltas])
    del deltas
    size = (2 + EXPERTS) * values * 4 / 1e9
    for name, method, formula in (
        ("task arithmetic", TaskArithmetic(scale=0.3), added),
        ("TIES", TIES(density=0.2, convention="peft"), elected),
    ):
        torch.testing.assert_close(method.merge("w", base, stack, {}), formula(base, stack))

        def rate(rival: Any, number: int) -> float:
            with torch.no_grad():
                return size / seconds(bench.device, partial(rival, base, stack))

        rivals = {OURS: partial(rate, partial(_merged, method)), BY_HAND: partial(rate, formula)}
        found = interleaved(rivals, 3 * bench.rounds, until=bench.until)
        yield compared(found, OURS, BY_HAND, unit="GB/s", label=f"{name}, tensors on the device")
    del base, stack
    yield from _of_files(bench)


def _merged(method: Merge, base: Tensor, stack: Tensor) -> Tensor:
    return method.merge("w", base, stack, {})


def added(base: Tensor, experts: Sequence[Tensor] | Tensor) -> Tensor:
    """Task arithmetic in a line."""
    return base + 0.3 * sum(e - base for e in experts)


def elected(base: Tensor, experts: Tensor) -> Tensor:
    """TIES as one writes it: trim, elect, mean."""
    deltas = experts - base
    kept = int(0.2 * base.numel())
    places = deltas.abs().topk(kept, dim=-1).indices
    deltas = torch.zeros_like(deltas).scatter_(-1, places, deltas.gather(-1, places))
    sign = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    agree = (deltas.sign() == sign) & (deltas != 0)
    return base + (deltas * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


class Alone:
    """The workspace of a merge that nobody watches."""

    def __init__(self, scratch: Path, resources: Resources) -> None:
        self.scratch, self.seed, self.resources = scratch, 0, resources

    def progress(self, done: int, total: int, **measures: float) -> None:
        """Nobody looks."""

    def keep(self, folder: Path) -> None:
        """There is no second attempt."""

    def kept(self) -> None:
        """There was no first one."""

    def leaving(self) -> bool:
        """Never."""
        return False

    def save(self, kind: type[Artifact], path: Path, about: Any = None) -> Artifact:
        """Leave it where it is."""
        return kind(str(path), "", dict(about or {}))


def _of_files(bench: Bench) -> Iterator[Figure | str]:
    models = _tiny(bench) if bench.tiny else made(bench.home, 1 + EXPERTS, 2000 * 10**6, "bfloat16")
    resources = Resources(cpus_per_worker=bench.either(8.0, 1.0))
    if bench.device.type == "cuda":
        resources = replace(resources, gpus_per_worker=1.0, accelerator="gpu")
    size = sum((m / "model.safetensors").stat().st_size for m in (*models, models[0])) / 1e9
    out = bench.home / "merged"

    def ours() -> None:
        base, *experts = (Model(str(m), "") for m in models)
        merge.body(Alone(out, resources), base=base, experts=experts, method=TaskArithmetic(scale=0.3))

    def by_hand() -> None:
        base, *experts = (load_file(m / "model.safetensors", device=str(bench.device)) for m in models)
        found = {n: added(w.float(), [e[n].float() for e in experts]).to(w.dtype) for n, w in base.items()}
        save_file({n: w.cpu() for n, w in found.items()}, out / "model.safetensors")

    def rate(act: Any, number: int) -> float:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return size / seconds(bench.device, act)

    found = interleaved({OURS: partial(rate, ours), BY_HAND: partial(rate, by_hand)}, bench.rounds, until=bench.until)
    yield compared(found, OURS, BY_HAND, unit="GB/s", label="task arithmetic, files read and written")


def _tiny(bench: Bench) -> list[Path]:
    """Models of a few values."""
    folders = [bench.home / f"tiny-{i}" for i in range(1 + EXPERTS)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        draws = torch.Generator().manual_seed(number)
        save_file({"w": torch.randn(8, 16, generator=draws).bfloat16()}, folder / "model.safetensors")
    return folders
