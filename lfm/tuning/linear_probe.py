"""Linear probing."""

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lfm.method import Needs
from lfm.tuning.base import Inject, Tune


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbe(Tune):
    """Train only the last linear layer of a classifier: what its features already tell, and where fine-tuning starts.

    With frozen features `f(x)`, the result tells labels by `softmax(W @ f(x) + b)`, of which only `W` and `b` learn.

    Differs from the paper:
        It fits the head as a regularized logistic regression; here it follows the same gradient steps as every other
        method. A head of several layers keeps all but its last as they are.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
        >>> LinearProbe().attach(model, inject=lambda kind, **fields: None)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['2.weight', '2.bias']

    Reference:
        Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022.
        https://arxiv.org/abs/2202.10054
    """

    reference, area, leaf = "arXiv:2202.10054", "tuning", "A1a"
    gives = "model"
    needs = Needs(access="gradients", data="labelled", architecture="classifier")

    @override
    def attach(self, model: nn.Module, inject: Inject) -> None:
        layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
        layers[-1].requires_grad_(True)
