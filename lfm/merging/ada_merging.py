"""AdaMerging."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.entropy import entropy
from lfm.merging.base import Weigh
from lfm.merging.task_arithmetic import TaskArithmetic


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaMerging(Weigh):
    """Task arithmetic whose scales are learnt: those with which the merged model is surest of texts without labels.

    With `deltas[k] = experts[k] - base`, and for each group of parameters a scale of each delta:

    1. Start. Every scale is `scale`, which is task arithmetic.
    2. Merge. The merged model is a function of the scales; nothing else of it learns.
    3. Look. Take `batch_size` rows of every task; the loss is the entropy of what the merged model tells of them.
    4. Learn. Follow its gradient for `steps` steps of Adam.

    The result is `base + sum(coefficients[group][k] * deltas[k])`.

    Attributes:
        granularity: ``task`` learns one scale for each expert, ``layer`` one for each expert in each layer.
        scale: What every scale starts at. The paper's lambda.
        steps: Steps of the optimizer, at least 0. The paper's figures take 500, its neighbours 1000.
        learning_rate: Adam's, above 0.
        batch_size: Rows of each task in a step, at least 1.
        clamp: Keep the scales that are used between 0 and 1, as the authors' code does.
        convention: What a layer is. ``paper``: a block of the network, or what stands outside of blocks. With
            ``fusion_bench``, and in the authors' code, every parameter is one.

    Differs from the paper:
        The entropy is the mean over the rows of all tasks, not the sum of the tasks' means: Adam's steps are the same.
        Of a language model it is that of each position's next token. Neighbours do not clamp, so that is off.

    Example:
        >>> experts = torch.tensor([[3.0, 1.0], [1.0, 5.0]])
        >>> AdaMerging().merge("w", torch.ones(2), experts, {"coefficients": torch.tensor([0.5, 0.25])})
        tensor([2., 2.])

    Reference:
        Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024.
        https://arxiv.org/abs/2310.02575
    """

    reference, area, leaf = "arXiv:2310.02575", "reuse", "C2a"

    granularity: Literal["task", "layer"] = "layer"
    scale: float = 0.3
    steps: int = 1000
    learning_rate: float = 1e-3
    batch_size: int = 16
    clamp: bool = False
    convention: Literal["paper", "fusion_bench"] = "paper"

    def __post_init__(self) -> None:
        self.require(self.granularity in ("task", "layer"), "granularity", "task or layer")
        self.require(self.steps >= 0, "steps", "steps >= 0")
        self.require(self.learning_rate > 0, "learning_rate", "learning_rate > 0")
        self.require(self.batch_size >= 1, "batch_size", "batch_size >= 1")
        self.require(not self.clamp or 0 <= self.scale <= 1, "scale", "0 <= scale <= 1, or clamp false")
        self.require(self.convention in ("paper", "fusion_bench"), "convention", "one of paper, fusion_bench")

    @property
    @override
    def elementwise(self) -> bool:
        return True

    @override
    def beside(self, num_experts: int) -> int:
        return TaskArithmetic().beside(num_experts)

    @override
    def groups(self, names: Sequence[str], layer_of: Callable[[str], str]) -> Mapping[str, str]:
        if self.granularity == "task":
            return dict.fromkeys(names, "all")
        return {name: layer_of(name) if self.convention == "paper" else name for name in names}

    @override
    def start(self, num_experts: int, num_groups: int) -> Float[Tensor, "groups experts"]:
        return torch.full((num_groups, num_experts), self.scale)

    @override
    def coefficients(self, learnt: Float[Tensor, "groups experts"]) -> Float[Tensor, "groups experts"]:
        return learnt.clamp(0, 1) if self.clamp else learnt

    @override
    def objective(self, logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
        return entropy(logits)

    @override
    def merge(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Float[Tensor, "*shape"]:
        scales = tuple(found["coefficients"].tolist())
        return TaskArithmetic(scale=scales).merge(name, base, experts, {})
