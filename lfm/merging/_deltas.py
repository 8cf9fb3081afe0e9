"""What several merging methods share."""

import torch
from jaxtyping import Float
from torch import Tensor

from lfm.method import Method


def check_one_each(method: Method, field: str, num_experts: int) -> None:
    """Raise `HyperparameterError` where a field has more or fewer numbers than there are experts."""
    value = getattr(method, field)
    fits = not isinstance(value, tuple) or len(value) == num_experts
    method.require(fits, field, f"one number for each of the {num_experts} experts")


def one_each(method: Method, field: str, experts: Float[Tensor, "experts *shape"]) -> Float[Tensor, "experts ..."]:
    """The numbers of a field, 1 where it has none, shaped to multiply the stack `experts`.

    Raises:
        HyperparameterError: There are more or fewer numbers than experts.
    """
    count = len(experts)
    check_one_each(method, field, count)
    value = getattr(method, field)
    numbers = value if isinstance(value, tuple) else (1.0 if value is None else value,) * count
    column = torch.tensor(numbers, dtype=experts.dtype, device=experts.device)
    return column.reshape(count, *(1 for _ in experts.shape[1:]))
