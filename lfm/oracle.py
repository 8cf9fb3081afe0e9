"""A model that may only be asked."""

from collections.abc import Callable

import torch
from torch import Tensor

from lfm.errors import LfmError

Ask = Callable[[Tensor], Tensor]


class GradientRefused(LfmError, TypeError):
    """A question through which somebody wants a gradient."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.shape = shape

    def __str__(self) -> str:
        return (
            f"oracle: was asked with a tensor of shape {self.shape} that requires a gradient, expected one that does "
            "not. Nothing flows back through it; detach the tensor."
        )


class BudgetSpent(LfmError, RuntimeError):
    """More questions than were agreed on."""

    def __init__(self, spent: int, asked: int, budget: int) -> None:
        super().__init__(spent, asked, budget)
        self.spent, self.asked, self.budget = spent, asked, budget

    def __str__(self) -> str:
        return (
            f"oracle: {self.asked} more questions after {self.spent}, expected {self.budget} in all. "
            "Raise the budget, or ask for less."
        )


class Oracle:
    """Answers questions, counts them, and lets no gradient through; whoever holds one has no other way to the model.

    Each entry of a question's first dimension counts as one: a prompt that is tried on all examples, or an image.

    Attributes:
        budget: How many questions it answers; None any number.
        spent: How many it has answered.
    """

    def __init__(self, ask: Ask, *, budget: int | None = None) -> None:
        """Nothing is asked yet.

        Args:
            ask: Gives probabilities for questions of shape (questions, ...).
            budget: At least 0.
        """
        self._ask = ask
        self.budget = budget
        self.spent = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The answers, in the order of the questions.

        Raises:
            GradientRefused: `x` requires a gradient.
            BudgetSpent: It would answer more questions than it may; none of these is answered.
        """
        if x.requires_grad:
            raise GradientRefused(tuple(x.shape))
        if self.budget is not None and self.spent + len(x) > self.budget:
            raise BudgetSpent(self.spent, len(x), self.budget)
        self.spent += len(x)
        with torch.inference_mode():  # under which not even the model itself can switch gradients on
            answer = self._ask(x)
        return answer.clone()
