"""Model-agnostic meta-learning."""

from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

from lfm.meta.base import HEAD, Examples, Meta, Parameters, mean_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class MAML(Meta):
    """Learn an initialisation from which a few steps of gradient descent on a few examples are enough.

    With `parameters` as what is learnt, of each task:

    1. Adapt. `steps` times go against the gradient of the mean loss on the support.
    2. Ask. The loss on the query with the adapted parameters is what the task costs.
    3. Learn. Its gradient is that with respect to `parameters`, through all steps of 1.

    One step gives `parameters - learning_rate * gradient(support loss, parameters)`.

    Attributes:
        learning_rate: Of the steps within a task, above 0; that of the outer loop is the trainer's. The paper's alpha.
        steps: How many of them while it learns, at least 1.
        evaluation_steps: How many of them where a model is measured, at least 1.
        first_order: Take the gradient at the adapted parameters as that at `parameters`, without second derivatives.
        anil: Adapt the head alone (ANIL, arXiv:1909.09157): the body has a `learning_rate` of 0 within a task.

    Differs from the paper:
        The defaults are those for miniImageNet; for 5-way Omniglot it has one step of 0.4, and 3 to measure. Batch
        normalisation takes the statistics of the examples at hand, in tests too, as the authors' code does: what is
        told of one example of a query depends on the others.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> support = Examples(torch.ones(1, 1), torch.tensor([0]))
        >>> maml = MAML(learning_rate=1.0, evaluation_steps=1)
        >>> maml.adapt(model, {"weight": torch.zeros(2, 1, requires_grad=True)}, support, training=False)["weight"]
        tensor([[ 0.5000],
                [-0.5000]])

    Reference:
        Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017.
        https://arxiv.org/abs/1703.03400
    """

    reference, area, leaf = "arXiv:1703.03400", "meta", "base"

    learning_rate: float = 0.01
    steps: int = 5
    evaluation_steps: int = 10
    first_order: bool = False
    anil: bool = False

    def __post_init__(self) -> None:
        self.require(self.learning_rate > 0, "learning_rate", "learning_rate > 0")
        self.require(self.steps >= 1, "steps", "steps >= 1")
        self.require(self.evaluation_steps >= 1, "evaluation_steps", "evaluation_steps >= 1")

    @override
    def check(self, *, head: bool) -> None:
        self.require(head or not self.anil, "anil", "false where no head is learnt")

    @override
    def adapt(self, model: nn.Module, parameters: Parameters, support: Examples, *, training: bool) -> Parameters:
        moving = [name for name in parameters if not self.anil or name.startswith(f"{HEAD}.")]
        adapted = dict(parameters)
        for _ in range(self.steps if training else self.evaluation_steps):
            if not training:
                adapted |= {name: adapted[name].detach().requires_grad_() for name in moving}
            with torch.enable_grad():
                loss = mean_loss(model, adapted, support)
                gradients = torch.autograd.grad(
                    loss, [adapted[name] for name in moving], create_graph=training and not self.first_order
                )
                adapted |= {
                    name: adapted[name] - self.learning_rate * gradient
                    for name, gradient in zip(moving, gradients, strict=True)
                }
        return adapted if training else {name: value.detach() for name, value in adapted.items()}
