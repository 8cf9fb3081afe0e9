"""kNN-LM."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lfm.errors import HyperparameterError
from lfm.hooks import Blocks
from lfm.retrieval._search import Exact, Indexed, check_faiss, faiss_index
from lfm.retrieval.base import Array, Neighbours, Retrieve, Search

CODES = 256  # of one byte: so many keys at least have to be there to learn them
TRAINED = 256  # keys for each centroid, which is what FAISS takes at most


@dataclass(frozen=True, kw_only=True, slots=True)
class KNNLM(Retrieve):
    """Mix what a model says with what followed in the most similar states that it had in a corpus.

    With `key` what enters the MLP of the last layer at a token, after the norm, and `value` the token that followed:

    1. Store. Every token of the corpus but the first is a value; its key is the state at the token before.
    2. Search. A query is the state at the last token; its `k` nearest keys by squared L2 are `neighbours`.
    3. Weigh. `weights = softmax(-distances / temperature)` over these neighbours.
    4. Gather. `retrieved[token]` is the sum of the weights of neighbours whose value is this token.
    5. Mix. The model's distribution and `retrieved`, which is 0 for every token that was not found.

    The result is `log(share * retrieved + (1 - share) * softmax(logits))`.

    Attributes:
        k: How many neighbours, at least 1; all entries where there are fewer.
        share: What the retrieved distribution weighs, in [0, 1). The paper's lambda; 0 is the model alone.
        temperature: Divides distances, above 0. The paper has 1.
        key: What is compared: what enters an ``mlp`` (the paper's best), or the ``output``, what enters the head.
        layer: Whose MLP, from 0; None takes the last one. None with ``output``.
        search: ``exact`` compares all keys; ``flat`` does so with FAISS; ``ivf_pq`` with FAISS those of the nearest
            cells by codes, as in the paper.
        centroids: Cells of ``ivf_pq``, at least 1.
        probes: Cells that are looked into, from 1 to `centroids`.
        code_bytes: Bytes of a key's code, at least 1; it divides the key's width.

    Differs from the paper:
        Distances are always those of the stored keys, never of their codes. Of a query for which the index finds
        nothing the model alone tells.

    Example:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> found = Neighbours(torch.tensor([[1.0, 1.0]]), torch.tensor([[2, 2]]))
        >>> KNNLM(share=0.25).combine(logits, found).exp()
        tensor([[0.3750, 0.1875, 0.4375]])

    Reference:
        Khandelwal et al., "Generalization through Memorization: Nearest Neighbor Language Models", ICLR 2020.
        https://arxiv.org/abs/1911.00172
    """

    reference, area, leaf = "arXiv:1911.00172", "tuning", "A3a"

    k: int = 1024
    share: float = 0.25
    temperature: float = 1.0
    key: Literal["mlp", "output"] = "mlp"
    layer: int | None = None
    search: Literal["exact", "flat", "ivf_pq"] = "exact"
    centroids: int = 4096
    probes: int = 32
    code_bytes: int = 64

    def __post_init__(self) -> None:
        self.require(self.k >= 1, "k", "k >= 1")
        self.require(0 <= self.share < 1, "share", "0 <= share < 1")
        self.require(self.temperature > 0, "temperature", "temperature > 0")
        self.require(self.key in ("mlp", "output"), "key", "one of mlp, output")
        self.require(self.layer is None or (self.layer >= 0 and self.key == "mlp"), "layer", "layer >= 0, or none")
        self.require(self.search in ("exact", "flat", "ivf_pq"), "search", "one of exact, flat, ivf_pq")
        self.require(self.centroids >= 1, "centroids", "centroids >= 1")
        self.require(1 <= self.probes <= self.centroids, "probes", "1 <= probes <= centroids")
        self.require(self.code_bytes >= 1, "code_bytes", "code_bytes >= 1")

    @override
    def check(self, num_layers: int | None, width: int | None) -> None:
        if self.layer is not None and num_layers is not None and self.layer >= num_layers:
            raise HyperparameterError("KNNLM", "layer", self.layer, f"layer < {num_layers}, the model's layers")
        if self.search != "exact":
            check_faiss("KNNLM")
        if self.search == "ivf_pq" and width is not None and width % self.code_bytes:
            raise HyperparameterError("KNNLM", "code_bytes", self.code_bytes, f"a divisor of the keys' width {width}")

    @override
    def watched(self, blocks: Blocks) -> str | None:
        if self.key == "output":
            return None
        self.check(len(blocks), None)
        return blocks[len(blocks) - 1 if self.layer is None else self.layer].mlp_in[0]

    @override
    def build(self, keys: Array) -> Any:
        if self.search == "exact":
            return None
        self.check(None, keys.shape[1])
        if self.search == "flat":
            return faiss_index(keys, "Flat", 1)
        if len(keys) < (least := max(self.centroids, CODES)):
            what = f"at most the {len(keys)} entries, of which there have to be {least}"
            raise HyperparameterError("KNNLM", "centroids", self.centroids, what)
        kind = (
            f"IVF{self.centroids},PQ{self.code_bytes}np"  # without polysemous codes, which take long and serve nobody
        )
        return faiss_index(keys, kind, max(TRAINED * self.centroids, CODES))

    @override
    def opened(self, keys: Array, values: Array, index: Any) -> Search:
        if self.search == "exact":
            return Exact(keys, values)
        return Indexed(keys, values, index, probes=self.probes)

    @override
    def combine(self, logits: Float[Tensor, "queries vocab"], neighbours: Neighbours) -> Float[Tensor, "queries vocab"]:
        own = logits.float().log_softmax(dim=-1)
        retrieved = torch.zeros_like(own).scatter_add_(1, neighbours.tokens, self._weights(neighbours))
        return self._mixed(own, retrieved, neighbours)

    @override
    def told(
        self,
        log_probabilities: Float[Tensor, "queries"],
        targets: Int[Tensor, "queries"],
        neighbours: Neighbours,
    ) -> Float[Tensor, "queries"]:
        same = neighbours.tokens == targets[:, None]
        retrieved = (self._weights(neighbours) * same).sum(dim=1, keepdim=True)
        return self._mixed(log_probabilities.float()[:, None], retrieved, neighbours)[:, 0]

    def _weights(self, neighbours: Neighbours) -> Float[Tensor, "queries k"]:
        """They sum to 1, or are all 0 where nothing was found."""
        weights = (-neighbours.distances / self.temperature).softmax(dim=1)
        return weights.masked_fill(neighbours.distances.isinf(), 0.0)

    def _mixed(
        self, own: Float[Tensor, "queries n"], retrieved: Float[Tensor, "queries n"], neighbours: Neighbours
    ) -> Float[Tensor, "queries n"]:
        if self.share == 0:
            return own
        mixed = torch.logaddexp(own + math.log1p(-self.share), retrieved.log() + math.log(self.share))
        return torch.where(neighbours.distances.isinf().all(dim=1, keepdim=True), own, mixed)
