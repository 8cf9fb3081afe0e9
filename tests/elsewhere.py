"""A second device for machines without one: its tensors have values, and never meet those of the CPU.

    with elsewhere():
        there = torch.ones(3).to(THERE)
        there + torch.ones(3)  # raises, as on a GPU

torch calls it ``meta``; in the block that is no device without memory.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

THERE = torch.device("meta")
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
READS = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__}


class OtherDevice(RuntimeError):
    """Tensors of two devices in one operation."""


class There(Tensor):
    """A tensor of that device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=THERE, strides=held.stride(), storage_offset=held.storage_offset()
        )
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: None, size: Any, stride: Any) -> "There":
        return There(inner["held"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            return func(args[0].held)
        if func is Tensor.new_tensor:
            return Tensor.new_tensor(args[0].held, *args[1:]).to(THERE)
        if func is Tensor.numpy:
            raise OtherDevice("numpy looks at a CPU's memory only")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Compute on the CPU, and have the result where it belongs; a number without dimensions may come from anywhere."""
    if torch.is_inference_mode_enabled():  # then what is made of several operations comes as one
        with _Computes():
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    met = set()

    def held(value: Any) -> Any:
        if isinstance(value, Tensor) and (value.ndim or isinstance(value, There)):
            met.add(type(value) is There)
        return value.held if isinstance(value, There) else value

    given, named = tree_map(held, args), tree_map(held, dict(kwargs))
    if len(met) > 1 and func not in MOVES:
        raise OtherDevice(str(func))
    wanted = kwargs.get("device")
    if wanted is not None:
        named["device"] = torch.device("cpu")
    found = func(*given, **named)
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0]
    if (True in met) if wanted is None else torch.device(wanted) == THERE:
        return tree_map(lambda v: There(v) if isinstance(v, Tensor) else v, found)
    return found


class _Computes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Makes(TorchFunctionMode):
    """What makes tensors of numbers asks no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(named.get("device") or "cpu") == THERE:
            return func(*args, **{**named, "device": "cpu"}).to(THERE)
        return func(*args, **named)


class _Draws(torch.Generator):
    """Of what is drawn there too, which is drawn on the CPU."""

    def __new__(cls, device: Any = "cpu") -> "_Draws":
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Have such a device, in this thread, without autocast and without AdamW in one kernel."""
    adamw = torch.optim.AdamW
    with (
        _Computes(),
        _Makes(),
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "Generator", _Draws),
        mock.patch.object(torch.optim, "AdamW", lambda groups, fused=None, **more: adamw(groups, **more)),
    ):
        yield
