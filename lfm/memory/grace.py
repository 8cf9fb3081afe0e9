"""GRACE."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lfm.editing.base import Fact
from lfm.errors import HyperparameterError
from lfm.hooks import Blocks, inputs_of
from lfm.memory.base import OtherMemory, Remember, State

MARGIN = 1e-3  # what rounding may put a distance off by, as a share of it


@dataclass(frozen=True, kw_only=True, slots=True)
class GRACE(Remember):
    """Replace what one layer gives, wherever what enters it is near to where an edit was made.

    With `f` the matrix that ends a layer's MLP, and `h` what enters it at one token:

    1. Ask. A fact that the model already says is left alone; else its `key` is `h` at the prompt's last token.
    2. Add. Where the nearest key is farther than its radius and `radius` together: `key` with `radius`.
    3. Expand. Where the nearest key has the same target: its radius grows until `key` is inside.
    4. Split. Where it has another target: `key` is added, and neither radius is more than half their distance.
    5. Train. Adam makes the new key's `value`, in `f(h)`'s place, say the target: `steps` of the answer's mean loss.

    The result is `value[i] if |h - key[i]| <= radius[i] else f(h)`, with `i` the nearest key.

    Attributes:
        layer: Which layer, from 0; None takes the one at three quarters of the depth. One above it has to be left for
            an answer of several tokens.
        radius: How far from its key an edit holds at first, above 0, in what enters the matrix. The paper's
            epsilon_init.
        steps: Of Adam for each value, at least 1.
        learning_rate: Its step size, above 0.
        start: Where a value starts: ``cold``, uniform in [0, 1), or ``warm``, what the matrix gives.

    Differs from the paper:
        Every token asks, not the prompt's last one alone, which nobody tells an endpoint; it is replaced by itself, so
        what comes after it sees the edit through attention. A conflict never makes a radius larger. A key that is hit
        again with another target gets that one, as its distance is 0. Targets are compared as tokens, where the code
        compares the means of their numbers. A value that already gives the target is not trained.

    Example:
        >>> book = Codebook(keys=torch.zeros(1, 2), values=torch.tensor([[7.0]]), radii=torch.tensor([0.5]))
        >>> book(torch.tensor([[0.3, 0.4], [0.3, 0.5]]), torch.tensor([[1.0], [2.0]]))
        tensor([[7.],
                [2.]])

    Reference:
        Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS 2023.
        https://arxiv.org/abs/2211.11031
    """

    reference, area, leaf = "arXiv:2211.11031", "editing", "E1"

    layer: int | None = None
    radius: float = 1.0
    steps: int = 100
    learning_rate: float = 1.0
    start: Literal["cold", "warm"] = "cold"

    def __post_init__(self) -> None:
        self.require(self.layer is None or self.layer >= 0, "layer", "layer >= 0, or none")
        self.require(self.radius > 0, "radius", "radius > 0")
        self.require(self.steps >= 1, "steps", "steps >= 1")
        self.require(self.learning_rate > 0, "learning_rate", "learning_rate > 0")
        self.require(self.start in ("cold", "warm"), "start", "one of cold, warm")

    @override
    def check(self, num_layers: int) -> None:
        if self.layer is not None and self.layer >= num_layers:
            raise HyperparameterError("GRACE", "layer", self.layer, f"layer < {num_layers}, the model's layers")

    @override
    def remember(
        self, state: State | None, model: nn.Module, blocks: Blocks, facts: Sequence[Fact], *, seed: int
    ) -> State:
        self.check(len(blocks))
        layer = self._layer(state, blocks)
        name = blocks[layer].mlp_out
        book = _opened(state, blocks, name)
        for fact in facts:
            if not _says(model, name, book, fact):
                book, place = self._placed(book, fact, *_at_prompt(model, name, fact), seed)
                if not _says(model, name, book, fact):
                    book = self._trained(book, place, model, name, fact)
        tensors = {"keys": book.keys.cpu(), "values": book.values.cpu(), "radii": book.radii.cpu()}
        return State(tensors, {"layer": layer, "targets": [list(t) for t in book.targets]})

    @override
    def attach(self, model: nn.Module, blocks: Blocks, state: State) -> RemovableHandle:
        name = blocks[self._layer(state, blocks)].mlp_out
        return _consult(model, name, _opened(state, blocks, name))

    def _layer(self, state: State | None, blocks: Blocks) -> int:
        chosen = (len(blocks) - 1) * 3 // 4 if self.layer is None else self.layer
        if state is None:
            return chosen
        kept = int(state.notes["layer"])
        if self.layer not in (None, kept):
            fix = "Leave layer out, or begin a memory of its own."
            raise OtherMemory("memory", f"its keys are of layer {kept}", f"layer {self.layer}, as the method says", fix)
        return kept

    def _placed(self, book: "Codebook", fact: Fact, key: Tensor, given: Tensor, seed: int) -> tuple["Codebook", int]:
        """The codebook with a place for a fact, and the number of the place."""
        target = tuple(fact.target.tolist())
        own = np.random.SeedSequence((seed, len(book.targets))).generate_state(1)[0]
        draws = torch.Generator().manual_seed(int(own))
        cold = torch.rand(len(given), generator=draws).to(given)
        value = cold if self.start == "cold" else given
        if not book.targets:
            return book.added(key, value, self.radius, target), 0
        distance, place = (t.item() for t in (book.keys - key).norm(dim=1).min(dim=0))
        place, near = int(place), float(book.radii[int(place)])
        if distance > near + self.radius:
            return book.added(key, value, self.radius, target), len(book.targets)
        reaching = book.with_radius(place, max(near, distance * (1 + MARGIN)))
        if book.targets[place] == target:
            return reaching, place
        if distance <= MARGIN * self.radius:
            targets = (*book.targets[:place], target, *book.targets[place + 1 :])
            return replace(reaching.with_value(place, value), targets=targets), place
        book = book.with_radius(place, min(near, distance / 2))
        return book.added(key, value, min(self.radius, distance / 2), target), len(book.targets)

    def _trained(self, book: "Codebook", place: int, model: nn.Module, name: str, fact: Fact) -> "Codebook":
        """The codebook with a value that makes the model say a fact."""
        value = book.values[place].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([value], lr=self.learning_rate)
        for _ in range(self.steps):
            loss = _loss(model, name, book.with_value(place, value), fact)
            (value.grad,) = torch.autograd.grad(loss, [value])
            optimizer.step()
        return book.with_value(place, value.detach())


@dataclass(frozen=True, slots=True)
class Codebook:
    """What takes the place of a matrix's output, and where.

    Attributes:
        keys: What enters the matrix where an edit was made.
        values: What it gives there instead.
        radii: How far from its key each holds.
        targets: The tokens that each shall make the model say.
    """

    keys: Float[Tensor, "places in"]
    values: Float[Tensor, "places out"]
    radii: Float[Tensor, "places"]
    targets: tuple[tuple[int, ...], ...] = ()

    def __call__(self, entering: Float[Tensor, "*tokens in"], given: Float[Tensor, "*tokens out"]) -> Tensor:
        """What the matrix gives, replaced at the tokens that are near to a key."""
        if not len(self.keys):
            return given
        # Without the matrix product, whose rounding puts what is at a key beside it.
        mode = "donot_use_mm_for_euclid_dist"
        flat = entering.detach().float().reshape(-1, entering.shape[-1])
        distance, nearest = torch.cdist(flat, self.keys, compute_mode=mode).min(dim=1)
        inside = (distance <= self.radii[nearest]).reshape(*given.shape[:-1], 1)
        return torch.where(inside, self.values[nearest].reshape(given.shape).to(given.dtype), given)

    def added(self, key: Tensor, value: Tensor, radius: float, target: tuple[int, ...]) -> "Codebook":
        """One place more."""
        return Codebook(
            keys=torch.cat([self.keys, key[None]]),
            values=torch.cat([self.values, value[None]]),
            radii=torch.cat([self.radii, self.radii.new_tensor([radius])]),
            targets=(*self.targets, target),
        )

    def with_radius(self, place: int, radius: float) -> "Codebook":
        """The same with another radius at one place."""
        radii = self.radii.clone()
        radii[place] = radius
        return replace(self, radii=radii)

    def with_value(self, place: int, value: Tensor) -> "Codebook":
        """The same with another value at one place."""
        return replace(self, values=torch.cat([self.values[:place], value[None], self.values[place + 1 :]]))


def _opened(state: State | None, blocks: Blocks, name: str) -> Codebook:
    """What is remembered, on the model's device."""
    weight = blocks.weight(name)
    width_out, width_in = weight.shape if not blocks.transposed(name) else tuple(reversed(weight.shape))
    if state is None:
        keys, values, radii = (
            torch.zeros(size, device=weight.device) for size in ((0, width_in), (0, width_out), (0,))
        )
        return Codebook(keys, values, radii)
    keys, values, radii = (state.tensors[part].to(weight.device) for part in ("keys", "values", "radii"))
    if (keys.shape[1], values.shape[1]) != (width_in, width_out):
        what = f"its keys and values are {keys.shape[1]} and {values.shape[1]} wide"
        raise OtherMemory(
            "memory", what, f"{width_in} and {width_out} as {name!r} is", "Use the model it was made for."
        )
    return Codebook(keys, values, radii, tuple(map(tuple, state.notes["targets"])))


def _consult(model: nn.Module, name: str, book: Codebook) -> RemovableHandle:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return book(arguments[0], output)

    return model.get_submodule(name).register_forward_hook(hook)


def _at_prompt(model: nn.Module, name: str, fact: Fact) -> tuple[Tensor, Tensor]:
    """What enters the matrix at a prompt's last token, and what it gives there."""
    with torch.no_grad(), inputs_of(model, [name]) as seen:
        model(input_ids=fact.prompts[0].ids[None].to(_device(model)))
        last = seen[name].reshape(-1, seen[name].shape[-1])[-1:]  # some models have their tokens in one row here
        return last[0].float(), model.get_submodule(name)(last)[0].float()


def _logits(model: nn.Module, name: str, book: Codebook, fact: Fact) -> tuple[Tensor, Tensor]:
    """What the model says at each place of a fact's target, shown those before, and the target."""
    prompt, target = fact.prompts[0].ids, fact.target.to(_device(model))
    ids = torch.cat([prompt.to(target.device), target])
    with _consult(model, name, book):
        logits = model(input_ids=ids[None]).logits[0]
    return logits[len(prompt) - 1 : -1], target


def _says(model: nn.Module, name: str, book: Codebook, fact: Fact) -> bool:
    with torch.no_grad():
        logits, target = _logits(model, name, book, fact)
    return torch.equal(logits.argmax(dim=-1), target)


def _loss(model: nn.Module, name: str, book: Codebook, fact: Fact) -> Tensor:
    return nn.functional.cross_entropy(*_logits(model, name, book, fact))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
