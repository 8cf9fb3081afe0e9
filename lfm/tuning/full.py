"""Full fine-tuning."""

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lfm.tuning.base import Inject, Tune


@dataclass(frozen=True, kw_only=True, slots=True)
class Full(Tune):
    """Let every weight of the model learn: the baseline of all tuning, and what an instruction model is made with.

    The result is the model itself, with every parameter moved by the gradient of the loss on answer tokens.

    As in the paper.

    Example:
        >>> model = nn.Linear(2, 2).requires_grad_(False)
        >>> Full().attach(model, inject=lambda kind, **fields: None)
        >>> all(p.requires_grad for p in model.parameters())
        True

    Reference:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018.
        https://arxiv.org/abs/1801.06146
    """

    reference, area, leaf = "arXiv:1801.06146", "tuning", "base"
    gives = "model"

    @override
    def attach(self, model: nn.Module, inject: Inject) -> None:
        model.requires_grad_(True)
