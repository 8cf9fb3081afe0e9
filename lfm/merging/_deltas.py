"""What several merging methods share."""

import torch
from jaxtyping import Float
from torch import Tensor

from lfm.errors import HyperparameterError


def one_each(
    method: str, field: str, value: float | tuple[float, ...], experts: Float[Tensor, "experts *shape"]
) -> Float[Tensor, "experts ..."]:
    """A number for each expert, shaped to multiply the stack `experts`.

    Raises:
        HyperparameterError: There are more or fewer numbers than experts.
    """
    count = len(experts)
    numbers = value if isinstance(value, tuple) else (value,) * count
    if len(numbers) != count:
        raise HyperparameterError(method, field, value, f"one number for each of the {count} experts")
    column = torch.tensor(numbers, dtype=experts.dtype, device=experts.device)
    return column.reshape(count, *(1 for _ in experts.shape[1:]))
