"""Low-rank adaptation."""

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lfm.tuning.base import Inject, Tune


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRA(Tune):
    """Learn a low-rank change of each chosen weight while the weight itself stays frozen.

    For a frozen weight `W` of shape (out, in), with `A` of shape (rank, in) and `B` of shape (out, rank):

    1. Start. `A` is drawn at random and `B` is 0, so that the model starts unchanged.
    2. Train. Only `A` and `B` get a gradient; what goes into `A` passes dropout.

    The result computes `W + scale * B @ A` with `scale = alpha / rank`, or `alpha / sqrt(rank)` if `stable_rank`.

    Attributes:
        rank: Inner width of the change, at least 1. The paper's r.
        alpha: Numerator of the scale, above 0. The paper's alpha.
        dropout: Share of the inputs of `A` that are zeroed in training, in [0, 1).
        targets: Names of the modules that get a change (``q_proj``), or ``all-linear`` for every linear layer but
            the output head.
        stable_rank: Divide by the root of the rank, so that a larger one does not learn more slowly (rsLoRA,
            arXiv:2312.03732).

    Differs from the paper:
        It adapts the attention's query and value only; the default here is every linear layer, as in QLoRA.

    Example:
        >>> LoRA(rank=4, alpha=8).scale
        2.0

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
        https://arxiv.org/abs/2106.09685
    """

    reference, area, leaf = "arXiv:2106.09685", "tuning", "A1b"
    gives = "adapter"
    adjustable = frozenset({"dropout"})

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    stable_rank: bool = False

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "rank >= 1")
        self.require(self.alpha > 0, "alpha", "alpha > 0")
        self.require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1")
        self.require(bool(self.targets), "targets", "names of modules, or 'all-linear'")

    @property
    def scale(self) -> float:
        """What `B @ A` is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.stable_rank else self.rank)

    @override
    def attach(self, model: nn.Module, inject: Inject) -> None:
        inject(
            "LORA",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            use_rslora=self.stable_rank,
        )
