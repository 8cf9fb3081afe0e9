"""A step's own forward and backward on tensors that have shapes and no memory: what it holds and computes, counted.

Nothing here knows an architecture or a loss: what runs is what trains, so that gradient checkpointing, the attention
that transformers chooses, adapters and chunks of logits are counted as they are.
"""

import gc
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count
from typing_extensions import override

from lfm.chunks import chunks_of
from operators.data.batches import Batch, Rows
from operators.sharing.heap import LARGE, LOST

SHALLOW = 1
"""Layers of the models that are rehearsed where the real ones have more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """One micro-batch, as it would be on a CPU.

    A backward pass begins with all activations and no gradient and ends with all gradients and no activation. What it
    holds in between lies in between, so that its two halves tell the most.

    Attributes:
        learnt: Values that learn.
        bytes: Of all parameters and buffers, those that learn too.
        saved: Bytes that the forward pass leaves for the backward pass.
        early: The most that is held beside the parameters up to the middle of the backward pass.
        late: The same from there on.
        early_besides: As `early`, without the gradients that are whole by then.
        late_besides: As `late`, without them.
        flops: Floating-point operations of both passes.
        heap: Bytes of a heap in which small tensors lie, which the four before do not count then; 0 without one.
    """

    learnt: float
    bytes: float
    saved: float
    early: float
    late: float
    early_besides: float
    late_besides: float
    flops: float
    heap: float = 0.0

    @property
    def peak(self) -> float:
        """The most that both passes hold at once beside the parameters; at their end all gradients are there."""
        return max(self.early, self.late, 4 * self.learnt) + self.heap

    @property
    def besides(self) -> float:
        """The most that both hold beside parameters and gradients."""
        return max(self.early_besides, self.late_besides) + self.heap

    def plus(self, less: "Rehearsal", more: "Rehearsal", times: float) -> "Rehearsal":
        """With what `more` has beyond `less`, so many times."""
        mine, low, high = asdict(self), asdict(less), asdict(more)
        return Rehearsal(**{name: mine[name] + times * (high[name] - low[name]) for name in mine})


def rehearsed(
    objective: nn.Module,
    asked: Sequence[nn.Module] = (),
    *,
    rows: int,
    length: int,
    targets: int,
    precision: str,
    device: str = "cpu",
    heap: bool = False,
) -> Rehearsal:
    """Count what a micro-batch takes.

    Args:
        objective: What gives the loss of a batch, on the device ``meta``; where nothing of it learns only its forward
            pass is counted.
        asked: Other modules that it calls, which are no part of it.
        rows: Of the micro-batch.
        length: Tokens of a row.
        targets: How many of all these tokens have a loss.
        precision: Of the forward pass.
        device: Where it will run: as many logits are held at once as there.
        heap: Whether small tensors lie in a heap of the C library, as they do on a CPU.
    """
    with (
        chunks_of(torch.device(device)),
        FakeTensorMode(),
    ):  # unlike ``meta`` it computes as a CPU does: attention and mixed precision are the device's
        there = [value for module in (objective, *asked) for value in _settle(module)]
        learnt = [p for p in objective.parameters() if p.requires_grad]
        counted = _Counted(there, len(learnt), LARGE if heap and learnt else 0)
        return _rehearsed(objective, learnt, counted, rows, length, targets, getattr(torch, precision))


def _settle(module: nn.Module) -> Collection[Tensor]:
    """Have the weights be of a CPU, so to speak, and give them; those that are tied stay so."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is not None and value.device.type == "meta":
                    if id(value) not in moved:
                        fresh = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                        isolated = isinstance(value, nn.Parameter)
                        moved[id(value)] = nn.Parameter(fresh, value.requires_grad) if isolated else fresh
                    own[name] = moved[id(value)]  # type: ignore[assignment]
    return moved.values()


def _rehearsed(
    objective: nn.Module,
    learnt: Sequence[nn.Parameter],
    counted: "_Counted",
    rows: int,
    length: int,
    targets: int,
    dtype: torch.dtype,
) -> Rehearsal:
    gc.freeze()  # so that a collection looks at little
    handles = [p.register_post_accumulate_grad_hook(counted.settle) for p in learnt]  # type: ignore[no-untyped-call]
    objective.train(bool(learnt))
    try:
        with _flops() as flops, counted, _Chosen(targets), torch.set_grad_enabled(bool(learnt)):
            batch = _batch(rows, length)
            before = counted.live
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = objective(batch)
            gc.collect()
            saved = counted.live - before
            if learnt:
                loss.backward()
    finally:
        gc.unfreeze()
        for handle in handles:
            handle.remove()
    return Rehearsal(
        learnt=sum(p.numel() for p in learnt),
        bytes=held(objective),
        saved=saved,
        early=counted.peak[0],
        late=counted.peak[1],
        early_besides=counted.besides[0],
        late_besides=counted.besides[1],
        heap=counted.heap,
        flops=float(flops.get_total_flops()),
    )


Make = Callable[..., Sequence[nn.Module]]
"""Makes an objective of models with so many layers each, and the models that it asks."""


def foreseen(
    make: Make,
    depths: Sequence[int | None],
    *,
    rows: int,
    length: int,
    targets: int,
    chunk: int,
    precision: str,
    device: str = "cpu",
    heap: bool = False,
) -> Rehearsal:
    """The same of a deep model, of which one layer holds and computes what another does.

    So a shallow model with few targets is rehearsed, and what one more layer adds, and more targets.

    Args:
        make: Called with numbers of layers, None for all.
        depths: How many there are; None makes all of them, where they are not alike.
        rows: Of the micro-batch.
        length: Tokens of a row.
        targets: How many of these have a loss.
        chunk: How many tokens' logits are held at once.
        precision: Of the forward pass.
        device: Where it will run.
        heap: As in `rehearsed`.
    """

    def at(layers: Sequence[int | None], some: int) -> Rehearsal:
        with torch.device("meta"):
            objective, *asked = make(*layers)
        sizes = {"rows": rows, "length": length, "targets": some}
        return rehearsed(objective, asked, **sizes, precision=precision, device=device, heap=heap)

    few = min(targets, 2 * chunk)
    shallow = [None if depth is None else min(SHALLOW, depth) for depth in depths]
    base = found = at(shallow, few)
    for i, (deep, some) in enumerate(zip(depths, shallow, strict=True)):
        if deep is not None and some is not None and deep > some:
            deeper = at([*shallow[:i], some + 1, *shallow[i + 1 :]], few)
            found = found.plus(base, deeper, deep - some)
    if targets > few:
        found = found.plus(base, at(shallow, 2 * few), (targets - few) / few)
    return found


def held(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    found = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.numel() * t.dtype.itemsize for t in found.values())


def _batch(rows: int, length: int) -> Batch:
    """A batch of which every row is full."""
    ids, targets = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    positions = torch.arange(length).expand(rows, length).contiguous()
    empty = np.zeros((rows, 1), np.int32)
    return Batch(ids, positions, targets, np.arange(rows), Rows(empty, empty, empty))


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of what is made while it is on: what there is, and the most that there was."""

    def __init__(self, there: Sequence[Tensor], learnt: int, large: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.large = large  # what is smaller lies in the heap
        self.live = self.settled = 0
        self.small = self.most_small = self.all_small = 0
        self.peak, self.besides = [0, 0], [0, 0]  # of the first half and of the second
        self._left, self._half = learnt, learnt / 2
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for value in there:
            self._seen[value.untyped_storage()] = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._take(made.untyped_storage())
        return out

    def settle(self, parameter: Tensor) -> None:
        """A gradient is whole, and stays until the optimizer has used it."""
        gc.collect()  # under a mode, what gradient checkpointing computes again is in cycles
        self._left -= 1
        if parameter.grad is not None:
            size = int(parameter.grad.untyped_storage().nbytes())
            self.settled += size if size >= self.large else 0

    def _take(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = int(storage.nbytes())
        self._seen[storage] = size
        self.live += size
        if size < self.large:
            self.small += size
            self.all_small += size
            self.most_small = max(self.most_small, self.small)
        half = int(self._left < self._half)
        self.peak[half] = max(self.peak[half], self.live - self.small)
        self.besides[half] = max(self.besides[half], self.live - self.small - self.settled)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size
        self.small -= size if size < self.large else 0

    @property
    def heap(self) -> float:
        """Bytes that small ones take, which is more than they are: see `LOST`."""
        return self.most_small + LOST * self.all_small


class _Chosen(TorchFunctionMode):
    """Masks choose the tokens that have a loss: how many these are nobody can read off values that are not there."""

    def __init__(self, targets: int) -> None:
        super().__init__()
        self.targets = targets

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            whole, mask = args
            if mask.ndim == 1:
                return whole.clone()
            flat = whole.flatten(0, mask.ndim - 1)
            return flat[: self.targets].clone() if self.targets < len(flat) else flat.clone()
        return func(*args, **(kwargs or {}))


def _attended(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attended_backward(into: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(into, query, key, value))  # type: ignore[no-untyped-call]


def _added(into: Any, left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(mm_flop(left, right))


def _flops() -> FlopCounterMode:
    """Torch's counter, which does not know the attention of a CPU, nor what adds a product in place."""
    aten = torch.ops.aten
    custom = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attended,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attended_backward,
        aten.addmm_: _added,
    }
    return FlopCounterMode(display=False, custom_mapping=custom)
