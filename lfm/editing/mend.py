"""MEND: model editor networks with gradient decomposition."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lfm.deltas import Delta, LowRank
from lfm.editing.base import EditError, Fact, Lesson, TrainedEdit
from lfm.errors import HyperparameterError
from lfm.hooks import Blocks, inputs_of, replaced

WEIGHT = ".weight"
EPSILON = 1e-7  # beside a deviation; the released code's


@dataclass(frozen=True, kw_only=True, slots=True)
class MEND(TrainedEdit):
    """Let a trained network turn the gradient of fine-tuning on a fact into a change that is local and general.

    1. `u` is what goes into a matrix at each token, `delta` the gradient of the fact's loss to what comes out of it:
       their products add up to the matrix's gradient. Tokens at which one of the two is 0 are left out.
    2. `z = (u, delta)`, each number brought to mean 0 and deviation 1 over the facts that the editor was trained on.
    3. `z = z + max(0, scale * (U @ V @ z + bias) + shift)`, `num_hidden + 1` times; `U` begins as 0, so that nothing
       is changed at first. Matrices of one shape share a network; `scale` and `shift` are each matrix's own.
    4. The halves of `z` are the new factors, and each matrix has a learning rate `rate` of its own, learnt too.
    5. The loss is that of the answer after a paraphrase in the edited model, and how far it went astray elsewhere.

    An edit is `W - rate * sum(delta @ u.T)` with the new factors. Training makes
    `edit_weight * -log p_edited(answer) + locality_weight * KL(p || p_edited)` small, each a mean over tokens.
    Several facts are changed together, each by what it would change alone.

    Attributes:
        num_blocks: The last so many blocks are edited, the matrices of their MLPs.
        rank: Of `U @ V`, where `z` is not smaller.
        num_hidden: Hidden layers of a network.
        rate: What the matrices' learning rates begin with. The paper's alpha.
        rate_speed: How many times faster these learn than the rest, under Adam: at the released code's learning rate of
            1e-6 they move by 1e-4 a step.
        edit_weight: Of the answer's loss. The paper's c_e.
        locality_weight: Of the divergence on texts about something else; in the paper 1.
        normalised: Whether the second step is taken.
        convention: ``paper``; ``released`` is the code that came with it and what copies it: it adds the change instead
            of subtracting it, so that the rates have to become negative, and draws `V` from a normal distribution of
            deviation 1 instead of Xavier's uniform one.

    Differs from the paper:
        Means and deviations are those of all facts that will be trained on, measured once before: the model is frozen
        and so they do not change; the released code's are running ones, which would depend on how a batch is split.
        The slope of `max(0, x)` at 0, where all begins, is 1, as in the released code; with 0 nothing would ever learn.
        The bias is there in every layer.

    Example:
        >>> MEND(num_blocks=1, normalised=False).rate
        0.0001

    Reference:
        Mitchell et al., "Fast Model Editing at Scale", ICLR 2022. https://arxiv.org/abs/2110.11309
    """

    reference, area, leaf = "arXiv:2110.11309", "editing", "E2c"

    num_blocks: int = 3
    rank: int = 1920
    num_hidden: int = 1
    rate: float = 1e-4
    rate_speed: float = 100.0
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    normalised: bool = True
    convention: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        self.require(self.num_blocks >= 1, "num_blocks", "num_blocks >= 1")
        self.require(self.rank >= 1, "rank", "rank >= 1")
        self.require(self.num_hidden >= 0, "num_hidden", "num_hidden >= 0")
        self.require(self.rate > 0, "rate", "rate > 0")
        self.require(self.rate_speed > 0, "rate_speed", "rate_speed > 0")
        self.require(self.edit_weight > 0, "edit_weight", "edit_weight > 0")
        self.require(self.locality_weight >= 0, "locality_weight", "locality_weight >= 0")
        self.require(self.convention in ("paper", "released"), "convention", "'paper' or 'released'")

    @override
    def check(self, num_layers: int) -> None:
        if self.num_blocks > num_layers:
            raise HyperparameterError(
                "MEND", "num_blocks", self.num_blocks, f"at most {num_layers}, the model's layers"
            )

    @override
    def changes(self, blocks: Blocks) -> tuple[str, ...]:
        self.check(len(blocks))
        chosen = [blocks[i] for i in range(len(blocks) - self.num_blocks, len(blocks))]
        return tuple(f"{matrix}{WEIGHT}" for b in chosen for matrix in (*b.mlp_in, b.mlp_out))

    @override
    def build(self, model: nn.Module, blocks: Blocks) -> "GradientEditor":
        sizes = {name: _sizes(blocks, name) for name in self.changes(blocks)}
        return GradientEditor(self, sizes)

    @override
    @torch.no_grad()
    def observe(self, editor: nn.Module, model: nn.Module, blocks: Blocks, facts: Sequence[Fact]) -> None:
        assert isinstance(editor, GradientEditor)
        for fact in facts if self.normalised else ():
            for name, (u, delta) in factors(model, editor.names, fact).items():
                editor.network(name).observe(torch.cat([u, delta], dim=-1))

    @override
    def loss(self, editor: nn.Module, model: nn.Module, blocks: Blocks, lesson: Lesson) -> Float[Tensor, ""]:
        changed = self._changed(editor, model, blocks, lesson.fact)
        weights = {name: model.get_parameter(name) + change.whole() for name, change in changed.items()}

        def edited(ids: Tensor) -> Tensor:
            found: Tensor = functional_call(model, weights, (), {"input_ids": ids}).logits
            return found

        answered = answer_loss(edited, lesson.asked, lesson.answer)
        with torch.no_grad():
            before = model(input_ids=lesson.others).logits[lesson.kept].float().log_softmax(-1)
        after = edited(lesson.others)[lesson.kept].float().log_softmax(-1)
        astray = F.kl_div(after, before, log_target=True, reduction="sum") / len(before)
        return self.edit_weight * answered + self.locality_weight * astray

    @override
    @torch.no_grad()
    def solve(
        self,
        model: nn.Module,
        blocks: Blocks,
        facts: Sequence[Fact],
        *,
        statistics: Mapping[str, Tensor],
        editor: nn.Module | None,
    ) -> Delta:
        if editor is None:
            raise EditError("MEND", "no editor", "one that was trained for this model", "Make it with 'train_editor'.")
        each = [self._changed(editor, model, blocks, fact) for fact in facts]
        return {
            name: LowRank(torch.cat([c[name].left for c in each], 1), torch.cat([c[name].right for c in each], 0))
            for name in self.changes(blocks)
        }

    def _changed(self, editor: nn.Module, model: nn.Module, blocks: Blocks, fact: Fact) -> dict[str, LowRank]:
        """What one fact adds to each matrix; the editor's parameters get its gradient, the model's none."""
        assert isinstance(editor, GradientEditor)
        sign = 1.0 if self.convention == "released" else -1.0
        found = {}
        for name, (u, delta) in factors(model, editor.names, fact).items():
            new_u, new_delta = editor(name, u, delta)
            rows, columns = sign * editor.rate(name) * new_delta, new_u
            if blocks.transposed(name.removesuffix(WEIGHT)):
                rows, columns = columns, rows
            found[name] = LowRank(rows.T, columns)
        return found


class GradientEditor(nn.Module):
    """The networks that turn factors of a gradient into those of a change, one for each shape of a matrix.

    Attributes:
        names: The parameters that it changes, by their names in the model.
        rates: The learning rate of each of them, divided by the method's `rate_speed`.
    """

    def __init__(self, method: MEND, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Make them.

        Args:
            method: Decides how large they are, and how they begin.
            sizes: How wide what goes into each matrix is, and what comes out of it, by the parameter's name.
        """
        super().__init__()
        self.names = tuple(sizes)
        self.speed, self.normalised = method.rate_speed, method.normalised
        alike: dict[str, list[str]] = {}
        for name, (wide_in, wide_out) in sizes.items():
            alike.setdefault(f"{wide_in}x{wide_out}", []).append(name)
        self._home = {name: (key, i) for key, names in alike.items() for i, name in enumerate(names)}
        width = {self._home[name][0]: sum(size) for name, size in sizes.items()}
        self.networks = nn.ModuleDict({k: _Network(method, width[k], len(alike[k])) for k in alike})
        self.rates = nn.Parameter(torch.full((len(self.names),), method.rate / method.rate_speed))

    def network(self, name: str) -> "_Network":
        """The network of a parameter."""
        found = self.networks[self._home[name][0]]
        assert isinstance(found, _Network)
        return found

    def rate(self, name: str) -> Float[Tensor, ""]:
        """The learning rate of a parameter."""
        return self.speed * self.rates[self.names.index(name)]

    def forward(
        self, name: str, u: Float[Tensor, "tokens in"], delta: Float[Tensor, "tokens out"]
    ) -> tuple[Float[Tensor, "tokens in"], Float[Tensor, "tokens out"]]:
        """The new factors of a parameter's change.

        Raises:
            EditError: It is to bring them to mean 0 and deviation 1, and has observed no facts.
        """
        network, number = self.network(name), self._home[name][1]
        z = torch.cat([u, delta], dim=-1)
        if self.normalised:
            z = network.normal(z)
        for layer in network.layers:
            z = layer(z, number)
        return z[:, : u.shape[-1]], z[:, u.shape[-1] :]


class _Network(nn.Module):
    """The layers that matrices of one shape share, and sums over the factors that they have observed."""

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, method: MEND, width: int, num_matrices: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(method, width, num_matrices) for _ in range(method.num_hidden + 1))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    def observe(self, z: Float[Tensor, "tokens width"]) -> None:
        """Add factors to the sums."""
        self.count += len(z)
        self.total += z.double().sum(0)
        self.squares += z.double().square().sum(0)

    def normal(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Factors at mean 0 and deviation 1, as far as those that were observed go."""
        if self.count < 2:
            fix = "Train it, or set normalised to false."
            raise EditError("MEND", "an editor that knows no facts", "one that has observed some", fix)
        mean = self.total / self.count
        spread = ((self.squares - self.count * mean.square()) / (self.count - 1)).clamp(min=0).sqrt()
        return (z - mean.float()) / (spread.float() + EPSILON)


class _Layer(nn.Module):
    """`z + max(0, scale * (U @ V @ z + bias) + shift)`, with a scale and a shift for each matrix."""

    def __init__(self, method: MEND, width: int, num_matrices: int) -> None:
        super().__init__()
        rank = min(method.rank, width)
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.V = nn.Parameter(torch.empty(rank, width))
        if method.convention == "released":
            nn.init.normal_(self.V)
        else:
            nn.init.xavier_uniform_(self.V)
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(num_matrices, width))
        self.shift = nn.Parameter(torch.zeros(num_matrices, width))

    def forward(self, z: Float[Tensor, "tokens width"], number: int) -> Float[Tensor, "tokens width"]:
        inner = F.linear(F.linear(z, self.V), self.U, self.bias)
        # The slope of clamp is 1 at its edge, that of relu 0.
        return z + (self.scale[number] * inner + self.shift[number]).clamp(min=0)


@torch.enable_grad()
def factors(model: nn.Module, names: Sequence[str], fact: Fact) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into each matrix, and the gradient of a fact's loss to what comes out: (tokens, in) and (tokens, out).

    Tokens at which one of the two is 0 are left out. Both are float32, and no graph leads to them: so nothing that is
    learnt with them differentiates the model twice, which not every attention can.
    """
    probes: dict[str, Tensor] = {}
    modules = [name.removesuffix(WEIGHT) for name in names]

    def probe(module: str) -> Callable[[Tensor], Tensor]:
        def added(output: Tensor) -> Tensor:
            probes[module] = torch.zeros_like(output, requires_grad=True)
            return output + probes[module]

        return added

    device = model.get_parameter(names[0]).device
    with ExitStack() as stack:
        # As exact here as where the edit is made, whatever the training computes in.
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for module in modules:
            stack.enter_context(replaced(model, module, probe(module)))
        seen = stack.enter_context(inputs_of(model, modules))
        loss = answer_loss(lambda ids: model(input_ids=ids).logits, fact.prompts[0].ids, fact.target, device=device)
    gradients = torch.autograd.grad(loss, [probes[module] for module in modules])
    return {name: _nonzero(seen[m].detach(), d) for name, m, d in zip(names, modules, gradients, strict=True)}


def _nonzero(u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    u, delta = u.flatten(0, -2).float(), delta.flatten(0, -2).float()
    counts = (u != 0).any(-1) & (delta != 0).any(-1)
    return u[counts], delta[counts]


def answer_loss(
    logits: Callable[[Tensor], Tensor],
    asked: Int[Tensor, "tokens"],
    answer: Int[Tensor, "answer"],
    *,
    device: torch.device | None = None,
) -> Float[Tensor, ""]:
    """The mean over an answer's tokens of their cross entropy after a prompt, in float32.

    Args:
        logits: What the model says after each token of a batch of ids.
        asked: The prompt.
        answer: What shall follow.
        device: Where the model is; None where the ids are there already.
    """
    ids = torch.cat([asked, answer[:-1]]).to(device)  # what follows the last token is nobody's loss
    return F.cross_entropy(logits(ids[None])[0, -len(answer) :].float(), answer.to(device))


def _sizes(blocks: Blocks, name: str) -> tuple[int, int]:
    """How wide what goes into a matrix is, and what comes out of it."""
    module = name.removesuffix(WEIGHT)
    first, second = blocks.weight(module).shape
    return (first, second) if blocks.transposed(module) else (second, first)
