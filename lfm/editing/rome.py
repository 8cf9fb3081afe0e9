"""Rank-One Model Editing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from lfm.deltas import Delta, LowRank, applied
from lfm.editing.base import TOKENS, Edit, EditError, Fact
from lfm.errors import HyperparameterError
from lfm.hooks import Blocks, inputs_of, replaced
from lfm.method import Needs

DEPTH = (17, 48)  # the layer that the paper edits, and how many the model has that it does it to (GPT-2 XL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ROME(Edit):
    """Write one fact into the last matrix of one layer's MLP, read as a store of values under keys.

    `W` is that matrix; what goes into it at the subject's last token is the subject's key:

    1. Key. `key` is the mean of the keys after all prompts: the bare one, and the same after other texts.
    2. Value. `start` is what the module gives for `key`. `change` is learnt: with `start + change` put in the place
       of its output there, the target is likely after every prompt, and what follows the essence stays.
    3. Insert. `moment` is the mean of k kᵀ over ordinary text: what is written under `key` disturbs that least.

    The result is `W + change (moment⁻¹ key)ᵀ / (keyᵀ moment⁻¹ key)`, which maps `key` to `start + change`.

    Attributes:
        layer: Whose MLP, counted from 0; none takes 17/48 of the depth, which the paper's causal traces found for
            GPT-2 XL. The paper's l*.
        steps: Steps of Adam for the value, at least 1.
        learning_rate: Of these, above 0.
        weight_decay: Weight of `|change| / |start|²` in its loss, at least 0.
        clamp: `|change|` stays below so many times `|start|`, above 0.
        kl_weight: Weight of the divergence of what follows the essence from what followed before, at least 0.
        ridge: Added to the diagonal of `moment`, in units of the diagonal's mean, at least 0: for text too little or
            too even, and for units that are never active.
        tokens_per_width: `moment` has to be of so many tokens for each of its rows, at least 0.
        convention: Whose arithmetic. ``paper`` as above (also known as r-ROME). ``released`` as in the authors' code:
            it divides by `(moment⁻¹ key)ᵀ k` with k the bare prompt's own key, so that not `key` but k is mapped to
            what was learnt; `change` is added to each prompt's own output; and the essence is looked at after its
            subject, not at its end.

    Differs from the paper:
        In a ridge, where it is not 0. Numbers that the paper leaves open are those of the authors' settings for
        GPT-2 XL. Several facts are written one after the other, each into the model as it is then: the change's rank
        is their number, and earlier ones wear off after a few dozen.

    Example:
        >>> change, key = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])
        >>> inserted(change, key, key, factor=torch.eye(2)).whole()
        tensor([[0.5000, 0.0000],
                [1.5000, 0.0000]])

    Reference:
        Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022.
        https://arxiv.org/abs/2202.05262. The equation against the code: Gupta et al., "Rebuilding ROME: Resolving
        Model Collapse during Sequential Model Editing", EMNLP 2024. https://arxiv.org/abs/2403.07175
    """

    reference, area, leaf = "arXiv:2202.05262", "editing", "E2b"
    needs = Needs(access="gradients", data="labelled", architecture="decoder", statistics=("gram",))

    layer: int | None = None
    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_weight: float = 0.0625
    ridge: float = 0.0
    tokens_per_width: float = 20.0
    convention: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        self.require(self.layer is None or self.layer >= 0, "layer", "layer >= 0, or none")
        self.require(self.steps >= 1, "steps", "steps >= 1")
        self.require(self.learning_rate > 0, "learning_rate", "learning_rate > 0")
        self.require(self.weight_decay >= 0, "weight_decay", "weight_decay >= 0")
        self.require(self.clamp > 0, "clamp", "clamp > 0")
        self.require(self.kl_weight >= 0, "kl_weight", "kl_weight >= 0")
        self.require(self.ridge >= 0, "ridge", "ridge >= 0")
        self.require(self.tokens_per_width >= 0, "tokens_per_width", "tokens_per_width >= 0")
        conventions = ("paper", "released")
        self.require(self.convention in conventions, "convention", f"one of {', '.join(conventions)}")

    @override
    def check(self, num_layers: int) -> None:
        if self.layer is not None and self.layer >= num_layers:
            raise HyperparameterError("ROME", "layer", self.layer, f"0 <= layer < {num_layers}, the model's layers")

    @override
    def judged(self, blocks: Blocks, statistics: Mapping[str, Tensor]) -> Mapping[str, float]:
        moment = self._moment(self._written(blocks), statistics)
        spread = torch.linalg.eigvalsh(moment)
        # Below what float64 tells apart an eigenvalue may come out negative.
        condition = float(spread[-1] / spread[0]) if spread[0] > 0 else float("inf")
        return {"condition": condition, "tokens_per_width": float(statistics[TOKENS]) / len(moment)}

    @override
    def solve(
        self,
        model: nn.Module,
        blocks: Blocks,
        facts: Sequence[Fact],
        *,
        statistics: Mapping[str, Tensor],
        editor: nn.Module | None,
    ) -> Delta:
        name = self._written(blocks)
        weight = blocks.weight(name)
        factor = _factor(self._moment(name, statistics).to(weight.device))
        done: LowRank | None = None
        for fact in facts:
            with applied(model, {} if done is None else {f"{name}.weight": done}):
                one = self._one(model, blocks, name, fact, factor)
            stored = LowRank(one.right.T, one.left.T) if blocks.transposed(name) else one
            done = stored if done is None else _beside(done, stored)
        return {} if done is None else {f"{name}.weight": done}

    def _written(self, blocks: Blocks) -> str:
        """The name of the matrix that is changed."""
        self.check(len(blocks))
        layer = len(blocks) * DEPTH[0] // DEPTH[1] if self.layer is None else self.layer
        return blocks[layer].mlp_out

    def _moment(self, name: str, statistics: Mapping[str, Tensor]) -> Float[Tensor, "width width"]:
        """The mean of k kᵀ, with the ridge, in float64."""
        gram = statistics.get(f"gram/{name}")
        if gram is None:
            fix = "Measure 'gram' of the MLPs' keys of this model."
            raise EditError("ROME", f"no statistics of {name!r}", "the second moment of what goes into it", fix)
        width, tokens = len(gram), float(statistics[TOKENS])
        if tokens < self.tokens_per_width * width:
            what = f"statistics of {tokens:.0f} tokens for keys of width {width}"
            allowed = f"at least {self.tokens_per_width:g} times the width"
            raise EditError("ROME", what, allowed, "Measure more text, or lower tokens_per_width and set a ridge.")
        moment = gram.double() / max(tokens, 1.0)
        moment.diagonal().add_(self.ridge * moment.diagonal().mean())
        return moment

    def _one(
        self, model: nn.Module, blocks: Blocks, name: str, fact: Fact, factor: Float[Tensor, "width width"]
    ) -> LowRank:
        """One fact's change of the matrix, as (out, in)."""
        asked = _Asked(fact, blocks.weight(name).device, essence_ends=self.convention == "paper")
        with torch.no_grad(), inputs_of(model, [name]) as seen:
            before = asked.essence(asked.logits(model))
        keys = asked.at_subjects(seen[name].detach())[:-1]
        key = keys.mean(dim=0)
        if not key.any():
            fix = "Choose another layer."
            raise EditError("ROME", f"nothing goes into {name!r} at the subject's last token", "a key", fix)
        with torch.no_grad():
            start = blocks.module(name)(key[None] if self.convention == "paper" else keys[:1])[0]
        change = self._learnt(model, name, asked, start, before)
        return inserted(change, key, key if self.convention == "paper" else keys[0], factor=factor)

    def _learnt(
        self, model: nn.Module, name: str, asked: "_Asked", start: Float[Tensor, "out"], before: Float[Tensor, "vocab"]
    ) -> Float[Tensor, "out"]:
        """What makes the target likely when it is added to what the module gives at the subject's last token."""
        change = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=self.learning_rate)
        most = self.clamp * start.norm()

        def value(own: Float[Tensor, "prompts out"]) -> Float[Tensor, "prompts out"]:
            return (start + change).expand_as(own) if self.convention == "paper" else own + change

        for _ in range(self.steps):
            with torch.enable_grad(), replaced(model, name, lambda output: asked.put(output, value)):
                logits = asked.logits(model)
                now = asked.essence(logits)
                divergence = (now.exp() * (now - before)).sum()
                decay = change.norm() / start.norm() ** 2
                loss = asked.surprise(logits) + self.kl_weight * divergence + self.weight_decay * decay
                (change.grad,) = torch.autograd.grad(loss, [change])  # the model's own gradients stay as they are
            optimizer.step()
            with torch.no_grad():
                change.mul_((most / change.norm()).clamp(max=1.0))
        return change.detach()


class _Asked:
    """The prompts of one fact with its target, and last the essence, as one batch."""

    def __init__(self, fact: Fact, device: torch.device, *, essence_ends: bool) -> None:
        rows = [torch.cat([p.ids, fact.target[:-1]]) for p in fact.prompts] + [fact.essence.ids]
        self.ids = pad_sequence(rows, batch_first=True).to(device)
        self.mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(device)
        self.rows = torch.arange(len(rows), device=device)
        subjects = [p.subject[1] - 1 for p in (*fact.prompts, fact.essence)]
        self.subjects = torch.tensor(subjects, device=device)
        ends = torch.tensor([len(p.ids) - 1 for p in fact.prompts], device=device)
        self.answers = ends[:, None] + torch.arange(len(fact.target), device=device)
        self.target = fact.target.to(device)
        self.looked_at = len(fact.essence.ids) - 1 if essence_ends else subjects[-1]

    def logits(self, model: nn.Module) -> Float[Tensor, "prompts length vocab"]:
        """What the model says after each token."""
        return model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits  # type: ignore[no-any-return]

    def essence(self, logits: Float[Tensor, "prompts length vocab"]) -> Float[Tensor, "vocab"]:
        """Log-probabilities of what follows the essence."""
        return logits[-1, self.looked_at].float().log_softmax(dim=-1)

    def surprise(self, logits: Float[Tensor, "prompts length vocab"]) -> Tensor:
        """The target's mean negative log-probability, over its tokens and the prompts."""
        said = logits[self.rows[:-1, None], self.answers].float().log_softmax(dim=-1)
        places: Int[Tensor, "prompts answer one"] = self.target.expand(len(said), -1)[..., None]
        return -said.gather(-1, places).mean()

    def at_subjects(self, flowing: Float[Tensor, "*places width"]) -> Float[Tensor, "prompts width"]:
        """What flows at each subject's last token; some architectures join prompts and tokens in one axis."""
        return self._apart(flowing)[self.rows, self.subjects]

    def put(
        self, flowing: Float[Tensor, "*places width"], value: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*places width"]:
        """The same with `value` of what is at the subjects in its place."""
        apart = self._apart(flowing).clone()
        apart[self.rows, self.subjects] = value(apart[self.rows, self.subjects])
        return apart.reshape(flowing.shape)

    def _apart(self, flowing: Tensor) -> Float[Tensor, "prompts length width"]:
        return flowing.reshape(*self.ids.shape, flowing.shape[-1])


def inserted(
    change: Float[Tensor, "out"],
    key: Float[Tensor, "width"],
    asked: Float[Tensor, "width"],
    *,
    factor: Float[Tensor, "width width"],
) -> LowRank:
    """The change of a matrix (out, in) that adds `change` to what it gives for `asked`, along `moment⁻¹ key`.

    Args:
        change: What is added.
        key: Under what it is written.
        asked: For what it is seen whole.
        factor: Lower triangular: `factor factorᵀ` is `moment`.
    """
    direction = torch.cholesky_solve(key.double()[:, None], factor.double())[:, 0]
    row = direction / (direction @ asked.double())
    return LowRank(change[:, None], row.to(change.dtype)[None])


def _factor(moment: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        fix = "Measure more text, or set a ridge."
        raise EditError("ROME", "the second moment of the keys has no inverse", "one that has", fix)
    return factor


def _beside(one: LowRank, other: LowRank) -> LowRank:
    return LowRank(torch.cat([one.left, other.left], dim=1), torch.cat([one.right, other.right]))
