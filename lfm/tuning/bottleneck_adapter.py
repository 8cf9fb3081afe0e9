"""Bottleneck adapters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lfm.hooks import Block, Blocks
from lfm.rewriting import Rewrite
from lfm.tuning.base import Inject, Tune

NAME = "adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class BottleneckAdapter(Tune, Rewrite):
    """Learn small networks that are put into every layer of a frozen model, after its attention and after its MLP.

    Each takes what the last matrix of its part gives, `hidden` of width d, before it is added to the stream:

    1. Start. `down` and `up` are drawn near 0, so that the model starts almost unchanged.
    2. Narrow. `down` takes `hidden` to `width` numbers, and a nonlinearity follows.
    3. Widen. `up` takes them back to d, and `hidden` is added.
    4. Train. Only the adapters learn, and with `norms` the model's own layer norms.

    The result computes `hidden + up(gelu(down(hidden)))` at each place: `2 * width * d + width + d` numbers.

    Attributes:
        width: Inner width of an adapter, at least 1. The paper's m.
        init: Standard deviation of the normal distribution, cut at twice itself, that `down` and `up` are drawn from,
            above 0. The paper finds up to 1e-2 equally good.
        norms: Whether the model's own layer norms learn too.
        convention: ``houlsby`` has two adapters in each layer and GELU; ``pfeiffer`` one, after the MLP, and ReLU
            (AdapterFusion, arXiv:2005.00247, whose norms are frozen: set `norms` to false).

    Differs from the paper:
        `init` is that of its code; its text has 1e-2. Where a model drops out what a part gives, it does so after the
        adapter, not before. Where a layer norm follows the part (Gemma), the adapter comes before it, as in BERT.
        ``pfeiffer`` leaves out that the adapter's input passes the layer norm that follows it, as only BERT has it.

    Example:
        >>> adapter = Bottleneck(768, 64, init=1e-3, nonlinearity="gelu")
        >>> sum(p.numel() for p in adapter.parameters()) == 2 * 64 * 768 + 64 + 768
        True

    Reference:
        Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019. https://arxiv.org/abs/1902.00751
    """

    reference, area, leaf = "arXiv:1902.00751", "tuning", "A1b"
    gives = "adapter"

    width: int = 64
    init: float = 1e-3
    norms: bool = True
    convention: Literal["houlsby", "pfeiffer"] = "houlsby"

    def __post_init__(self) -> None:
        self.require(self.width >= 1, "width", "width >= 1")
        self.require(self.init > 0, "init", "init > 0")

    @override
    def attach(self, model: nn.Module, inject: Inject) -> None:
        self.rewrite(model)
        for module in model.modules():
            if isinstance(module, Bottleneck) or (self.norms and _is_norm(module)):
                module.requires_grad_(True)

    @override
    def rewrite(self, model: nn.Module) -> None:
        blocks = Blocks(model)
        nonlinearity: Literal["gelu", "relu"] = "gelu" if self.convention == "houlsby" else "relu"
        for name in (n for block in blocks for n in self._places(block)):
            matrix = blocks.module(name)
            adapter = Bottleneck(blocks.sizes(name)[1], self.width, init=self.init, nonlinearity=nonlinearity)
            matrix.add_module(NAME, adapter.to(blocks.weight(name).device))
            matrix.register_forward_hook(_passed_on)

    def _places(self, block: Block) -> Iterator[str]:
        if self.convention == "houlsby":
            yield block.attention_out
        yield block.mlp_out


class Bottleneck(nn.Module):
    """`hidden + up(gelu(down(hidden)))`, in float32 unless autocast says otherwise; gives the dtype that it is given.

    Args:
        d: Width of what comes in and goes out.
        width: Inner width.
        init: Standard deviation of the weights at the start; biases are 0.
        nonlinearity: After `down`.
    """

    def __init__(self, d: int, width: int, *, init: float, nonlinearity: Literal["gelu", "relu"]) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, width), nn.Linear(width, d)
        self.nonlinearity = nonlinearity
        for matrix in (self.down, self.up):
            nn.init.trunc_normal_(matrix.weight, std=init, a=-2 * init, b=2 * init)
            nn.init.zeros_(matrix.bias)

    @override
    def forward(self, hidden: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        narrow = self.down(hidden.to(self.down.weight.dtype))
        narrow = nn.functional.gelu(narrow) if self.nonlinearity == "gelu" else torch.relu(narrow)
        added: Tensor = self.up(narrow).to(hidden.dtype)
        return hidden + added


def _passed_on(matrix: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """What a matrix gives goes through its adapter: a hook that holds nothing, so that a copy finds its own."""
    adapter: nn.Module = matrix.get_submodule(NAME)
    changed: Tensor = adapter(output)
    return changed


def _is_norm(module: nn.Module) -> bool:
    """Whether it scales: its own weight is a vector."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1
