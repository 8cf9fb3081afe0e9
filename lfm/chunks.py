"""A loss on logits that are never held all at once: one chunk of tokens after another, gradients included."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 21  # logits at once, 8 MB in float32: small beside a model, large enough for the matrix product
GPU_ELEMENTS = 1 << 26  # 256 MB: with fewer tokens, to read the head for each chunk takes longer than to multiply by it

PerChunk = Callable[[Float[Tensor, "tokens vocab"], slice], Float[Tensor, ""]]
"""The sum of the loss of one chunk, from its logits and its place among the tokens."""


def chunked(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, "vocab"] | None,
    loss: PerChunk,
    *,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """The sum of `loss` over all tokens, where the logits are `hidden @ weight.T + bias`.

    The gradient is computed with the value, chunk by chunk, so that memory does not grow with tokens x vocabulary;
    the backward pass only multiplies it. Over the chunks the head's gradient adds up in float32, whatever the inputs'
    dtype. Products run in the dtype of autocast where it is on, and of the hidden states where it is not.

    Args:
        hidden: What goes into the head.
        weight: The head's weight.
        bias: The head's bias.
        loss: Called with the logits of each chunk; what else it needs it takes by the slice.
        chunk: Tokens at once; None takes as many as `chunk_size` says.
    """
    size = chunk or chunk_size(len(weight), weight.device)
    total: Tensor = _Chunked.apply(hidden, weight, bias, loss, size, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return total


_elsewhere: ContextVar[torch.device | None] = ContextVar("_elsewhere", default=None)


@contextmanager
def chunks_of(device: torch.device) -> Iterator[None]:
    """Have chunks be as large as they are on another device, for what foresees there what is to run here."""
    before = _elsewhere.set(device)
    try:
        yield
    finally:
        _elsewhere.reset(before)


def chunk_size(vocabulary: int, device: torch.device | None = None) -> int:
    """How many tokens' logits are held at once; on another device than a CPU, which None is, far more."""
    device = _elsewhere.get() or device
    on_cpu = device is None or device.type == "cpu"
    return max(1, (CHUNK_ELEMENTS if on_cpu else GPU_ELEMENTS) // vocabulary)


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "tokens"],
    *,
    bias: Float[Tensor, "vocab"] | None = None,
    shaped: Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """The summed cross entropy of `targets`, in float32.

    Args:
        hidden: What goes into the head.
        weight: The head's weight.
        targets: The token that follows each.
        bias: The head's bias.
        shaped: What the model does to its logits after the head, such as a soft cap.
        chunk: Tokens at once.
    """

    def loss(logits: Tensor, where: slice) -> Tensor:
        logits = logits.float()
        logits = logits if shaped is None else shaped(logits)
        return torch.nn.functional.cross_entropy(logits, targets[where], reduction="sum")

    return chunked(hidden, weight, bias, loss, chunk=chunk)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "torch.autograd.function.FunctionCtx",
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: PerChunk,
        size: int,
        learning: bool,  # inside of this function gradients are off always
    ) -> Tensor:
        device = hidden.device.type
        wanted = [learning and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        # What autocast would do to each product, done once: the head is the largest matrix there is.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = weight.to(dtype)
        into_hidden = torch.empty_like(hidden) if wanted[0] else None
        into_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        into_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), size):
                where = slice(start, min(len(hidden), start + size))
                part = hidden[where].to(dtype)
                logits = torch.nn.functional.linear(part, head, None if bias is None else bias.to(dtype))
                if not any(wanted):
                    total += loss(logits, where).float()
                    continue
                with torch.enable_grad():
                    value = loss(logits.requires_grad_(True), where)
                    (gradient,) = torch.autograd.grad(value, logits)
                total += value.detach().float()
                if into_hidden is not None:
                    into_hidden[where] = gradient @ head
                if into_weight is not None:
                    if dtype == torch.float32:
                        into_weight.addmm_(gradient.T, part)
                    else:
                        into_weight += gradient.T @ part
                if into_bias is not None:
                    into_bias += gradient.sum(dim=0, dtype=torch.float32)
        ctx.save_for_backward(into_hidden, into_weight, into_bias)  # type: ignore[arg-type]
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: "torch.autograd.function.FunctionCtx", scale: Tensor) -> tuple[Tensor | None, ...]:
        into_hidden, into_weight, into_bias = ctx.saved_tensors  # type: ignore[attr-defined]
        for_weight, for_bias = ctx.dtypes  # type: ignore[attr-defined]
        return (
            None if into_hidden is None else into_hidden * scale.to(into_hidden.dtype),
            None if into_weight is None else (into_weight * scale).to(for_weight),
            None if into_bias is None else (into_bias * scale).to(for_bias),
            None,
            None,
            None,
        )
