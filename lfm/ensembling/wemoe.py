"""The weight-ensembling mixture of experts."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lfm.ensembling.base import Build
from lfm.entropy import entropy
from lfm.hooks import Block, Blocks
from lfm.merging.task_arithmetic import TaskArithmetic

ROUTER, EXPERTS = "router", "experts"
START = 0.01  # standard deviation of the first of two matrices of a router, as the authors' code has it


@dataclass(frozen=True, kw_only=True, slots=True)
class WEMoE(Build):
    """Merge all but the MLPs, and let each text decide how much of every expert its MLPs take.

    With `deltas[k] = experts[k] - base`, the task vectors:

    1. Merge. What lies outside of MLPs is task arithmetic with `scale`.
    2. Route. Before each MLP a router turns what goes in, averaged over the text, into a share of each expert.
    3. Mix. The MLP computes with `base + sum(share[k] * deltas[k])`, other weights for each text.
    4. Start. A router says `scale` whatever it is asked, so that the whole is task arithmetic.
    5. Learn. Only routers follow the gradient of the entropy of what is told, for `steps` steps of Adam.

    The result computes `mlp(x, base + sum(router(x)[k] * deltas[k]))` in the place of every MLP.

    Attributes:
        scale: What multiplies the deltas outside of MLPs, and what every share starts at. The paper's lambda.
        layers: Matrices of a router: 2, with a ReLU between, 1, or 0, which learns a share for each MLP and expert
            that is the same for all texts.
        steps: Steps of the optimizer, at least 0.
        learning_rate: Adam's, above 0.
        batch_size: Rows of each task in a step, at least 1.

    Differs from the paper:
        A decoder must not see what follows: there each token has shares of its own, from what goes into the MLP at
        its place, so that text is the same whether it is read at once or token by token. Of other networks the average
        leaves padding out. The last matrix of a router starts at 0, not near it as in the authors' code. The entropy
        is the mean over the rows of all tasks, not the sum of the tasks' means: Adam's steps are the same.

    Example:
        >>> router = Router(4, 2, scale=0.3, layers=2, causal=True)
        >>> router(torch.randn(5, 4)).detach().unique()
        tensor([0.3000])

    Reference:
        Tang et al., "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts", ICML 2024.
        https://arxiv.org/abs/2402.00433
    """

    reference, area, leaf = "arXiv:2402.00433", "reuse", "C2d"

    scale: float = 0.3
    layers: Literal[0, 1, 2] = 2
    steps: int = 1000
    learning_rate: float = 1e-4
    batch_size: int = 16

    def __post_init__(self) -> None:
        self.require(self.layers in (0, 1, 2), "layers", "0, 1 or 2")
        self.require(self.steps >= 0, "steps", "steps >= 0")
        self.require(self.learning_rate > 0, "learning_rate", "learning_rate > 0")
        self.require(self.batch_size >= 1, "batch_size", "batch_size >= 1")

    @override
    def build(self, network: nn.Module, num_experts: int, *, causal: bool) -> Mapping[str, str]:
        blocks = Blocks(network)
        kept: dict[str, str] = {}
        for block in blocks:
            kept |= self._mixed(blocks, block, num_experts, causal)
        if not causal:
            network.register_forward_pre_hook(_remember_padding, with_kwargs=True)
        return kept

    def _mixed(self, blocks: Blocks, block: Block, num_experts: int, causal: bool) -> dict[str, str]:
        """Put a router and experts into one block."""
        width, _ = blocks.sizes(block.mlp_in[0])
        router = Router(width, num_experts, scale=self.scale, layers=self.layers, causal=causal)
        kept: dict[str, str] = {}
        for name in dict.fromkeys((*block.mlp_in, block.mlp_out)):
            matrix = blocks.module(name)
            experts = Experts(
                matrix, num_experts, router, last=name == block.mlp_out, transposed=blocks.transposed(name)
            )
            matrix.add_module(EXPERTS, experts)
            matrix.register_forward_hook(_with_experts)
            kept |= {f"{name}.{part}": f"{name}.{EXPERTS}.{part}" for part, _ in experts.named_parameters()}
        first = blocks.module(block.mlp_in[0])
        first.add_module(ROUTER, router.to(blocks.weight(block.mlp_in[0]).device))
        return kept

    @override
    def merge(
        self, name: str, base: Float[Tensor, "*shape"], experts: Float[Tensor, "experts *shape"]
    ) -> Float[Tensor, "*shape"]:
        return TaskArithmetic(scale=self.scale).merge(name, base, experts, {})

    @override
    def objective(self, logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
        return entropy(logits)


class Router(nn.Module):
    """Turns what goes into an MLP into a share of each expert, in float32 unless autocast says otherwise.

    Args:
        width: Of what goes into the MLP.
        num_experts: How many shares there are.
        scale: What they start at.
        layers: Matrices, from 0 to 2.
        causal: Whether each place has shares of its own, or all places of a text the same.
    """

    def __init__(self, width: int, num_experts: int, *, scale: float, layers: int, causal: bool) -> None:
        super().__init__()
        self.layers, self.causal = layers, causal
        # No `nn.Linear`: who looks for a block's matrices shall not find these.
        if layers == 2:
            self.inner_weight = nn.Parameter(START * torch.randn(width, width))
            self.inner_bias = nn.Parameter(torch.zeros(width))
        if layers:
            self.weight = nn.Parameter(torch.zeros(num_experts, width))
        self.bias = nn.Parameter(torch.full((num_experts,), float(scale)))
        self.padding: Int[Tensor, "rows length"] | None = None
        self.asked: Tensor | None = None
        self.said: Tensor | None = None

    @override
    def forward(self, hidden: Float[Tensor, "*places width"]) -> Float[Tensor, "*places experts"]:
        if not self.layers:
            return self.bias.expand(*hidden.shape[:-1], -1)
        hidden = hidden.to(self.weight.dtype)
        if self.layers == 2:
            hidden = torch.relu(nn.functional.linear(hidden, self.inner_weight, self.inner_bias))
        shares = nn.functional.linear(hidden, self.weight, self.bias)
        return shares if self.causal else self._averaged(shares)

    def of(self, hidden: Float[Tensor, "*places width"]) -> Float[Tensor, "*places experts"]:
        """The same, computed once for all matrices that are given the very same tensor."""
        if self.said is None or self.asked is not hidden:
            self.asked, self.said = hidden, self(hidden)
        return self.said

    def take(self) -> Float[Tensor, "*places experts"]:
        """What was said last, which is forgotten then."""
        said = self.said
        assert said is not None, "an MLP's last matrix came before its first"
        self.asked = self.said = None
        return said

    def _averaged(self, shares: Float[Tensor, "rows length experts"]) -> Float[Tensor, "rows 1 experts"]:
        """Over the places of a text that are no padding."""
        if self.padding is None:
            return shares.mean(dim=-2, keepdim=True)
        seen = self.padding[..., None].to(shares.dtype)
        return (shares * seen).sum(dim=-2, keepdim=True) / seen.sum(dim=-2, keepdim=True).clamp(min=1)


class Experts(nn.Module):
    """What each expert's fine-tuning added to one matrix of an MLP; all 0 until it is filled.

    Args:
        matrix: The base's.
        num_experts: How many experts there are.
        router: Of the MLP; it is no part of this module.
        last: Whether it is the MLP's last matrix, whose input says nothing to the router.
        transposed: Whether the weight is stored as (in, out).
    """

    def __init__(self, matrix: nn.Module, num_experts: int, router: Router, *, last: bool, transposed: bool) -> None:
        super().__init__()
        self.router, self.last, self.transposed = [router], last, transposed
        stacked = {
            name: nn.Parameter(parameter.new_zeros(num_experts, *parameter.shape))
            for name, parameter in matrix.named_parameters(recurse=False)
        }
        self.weight, self.bias = stacked["weight"], stacked.get("bias")

    @override
    def forward(self, x: Float[Tensor, "*places inside"]) -> Float[Tensor, "*places outside"]:
        router = self.router[0]
        shares = router.take() if self.last else router.of(x)
        weights = self.weight.mT if self.transposed else self.weight
        biases = [None] * len(weights) if self.bias is None else self.bias
        total = x.new_zeros(())
        for share, weight, bias in zip(shares.to(x.dtype).unbind(-1), weights, biases, strict=True):
            total = total + share[..., None] * nn.functional.linear(x, weight, bias)
        return total


def _with_experts(matrix: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """Add what the experts add to what a matrix gives: a hook that holds nothing, so that a copy finds its own."""
    experts: nn.Module = matrix.get_submodule(EXPERTS)
    added: Tensor = experts(arguments[0])
    return output + added.to(output.dtype)


def _remember_padding(network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Tell the routers what of the texts that the network is about to read is padding."""
    given = inspect.signature(network.forward).bind(*arguments, **named).arguments
    for module in network.modules():
        if isinstance(module, Router):
            module.padding = given.get("attention_mask")
