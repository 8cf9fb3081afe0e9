"""A model's blocks, found by what they do, and ways to look at or replace what flows through them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lfm.errors import LfmError


class NoBlocks(LfmError, ValueError):
    """A network in which the parts of a transformer are not to be found."""

    def __init__(self, network: str, what: str, allowed: str) -> None:
        super().__init__(network, what, allowed)
        self.network, self.what, self.allowed = network, what, allowed

    def __str__(self) -> str:
        return f"{self.network}: {self.what}, expected {self.allowed}. Choose a model that has it, or another method."


@dataclass(frozen=True, slots=True)
class Block:
    """One layer of a transformer.

    Attributes:
        name: Its name in the model.
        attention: The name of the part that mixes positions.
        attention_out: The name of its matrix that leads back into the stream between layers.
        mlp_in: The names of the matrices that widen what each position holds: one, or two where one gates the other.
        mlp_out: The name of the one that narrows it again; what goes into it are the MLP's keys.
    """

    name: str
    attention: str
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str


class Blocks:
    """The layers of one model, whatever its architecture calls them.

    They are the longest list of modules of one class; a layer's attention is what takes an ``attention_mask``, and the
    other matrices are its MLP's. So it holds for Llama, Qwen, Mistral, Gemma, Phi, GPT-2, GPT-NeoX, OPT and BERT.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find them.

        Raises:
            NoBlocks: There is no list of layers, or one of them has no attention, or no plain MLP.
        """
        self.model = model
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        lists = [(n, m) for n, m in self._modules.items() if isinstance(m, nn.ModuleList) and _layered(m)]
        if not lists:
            raise NoBlocks(type(model).__name__, "it has no list of layers with attention", "a transformer")
        home, layers = max(lists, key=lambda found: len(found[1]))
        self._blocks = tuple(self._block(f"{home}.{i}", layer) for i, layer in enumerate(layers))

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, layer: int) -> Block:
        return self._blocks[layer]

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def module(self, name: str) -> nn.Module:
        """The module of a name."""
        return self._modules[name]

    def weight(self, name: str) -> nn.Parameter:
        """The weight of a matrix, as the model stores it."""
        found = self._modules[name].weight
        assert isinstance(found, nn.Parameter), name
        return found

    def sizes(self, name: str) -> tuple[int, int]:
        """How wide what goes into a matrix is, and what comes out."""
        return _sizes(self._modules[name])

    def transposed(self, name: str) -> bool:
        """Whether a matrix is stored as (in, out), as GPT-2's are, not (out, in) as `nn.Linear` has it."""
        return not isinstance(self._modules[name], nn.Linear)

    def matrices(self, layer: int) -> tuple[str, ...]:
        """The names of all matrices of a layer, its attention's too."""
        name = self._blocks[layer].name
        inside = self._modules[name].named_modules()
        return tuple(f"{name}.{n}" for n, m in inside if _shape(m) is not None)

    def layer_of(self, parameter: str) -> int | None:
        """The number of the layer that a parameter is part of, by its name in the model; None where it is of none."""
        return next((i for i, b in enumerate(self._blocks) if parameter.startswith(f"{b.name}.")), None)

    def _block(self, name: str, layer: nn.Module) -> Block:
        attention = _attention(layer)
        matrices = [n for n, m in layer.named_modules() if _shape(m) is not None and not n.startswith(f"{attention}.")]
        width = _width(layer, attention)
        out = [n for n in matrices if _sizes(layer.get_submodule(n))[1] == width]
        into = [n for n in matrices if _sizes(layer.get_submodule(n))[0] == width and n not in out[-1:]]
        if not out or not into:
            raise NoBlocks(
                type(self.model).__name__, f"{name!r} has no plain MLP", "two or three matrices in each layer"
            )
        mixing = {n: m for n, m in layer.get_submodule(attention).named_modules() if _shape(m) is not None}
        back = [f"{name}.{attention}.{n}" for n, m in mixing.items() if _sizes(m)[1] == width]
        if not back:
            raise NoBlocks(
                type(self.model).__name__, f"{name!r} has no matrix after its attention", "one in each layer"
            )
        # As wide inside as outside, several fit: the last one is what leads back.
        mlp_in = tuple(f"{name}.{n}" for n in into)
        return Block(name, f"{name}.{attention}", back[-1], mlp_in, f"{name}.{out[-1]}")


def _layered(modules: nn.ModuleList) -> bool:
    classes = {type(m) for m in modules}
    return len(modules) > 0 and len(classes) == 1 and _attention(modules[0]) != ""


def _attention(layer: nn.Module) -> str:
    """The name of the outermost part with matrices that is told what may be attended to; empty where there is none."""
    parts: list[tuple[str, nn.Module]] = list(layer.named_modules())
    for name, module in parts:
        told = "attention_mask" in inspect.signature(module.forward).parameters
        if name and told and any(_shape(m) is not None for m in module.modules()):
            return name
    return ""


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """The shape of a matrix, also of transformers' `Conv1D`; None for everything else."""
    weight = getattr(module, "weight", None)
    plain = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return (weight.shape[0], weight.shape[1]) if plain and isinstance(weight, Tensor) and weight.ndim == 2 else None


def _sizes(module: nn.Module) -> tuple[int, int]:
    """How wide what goes into a matrix is, and what comes out."""
    shape = _shape(module)
    assert shape is not None
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else shape


def _width(layer: nn.Module, attention: str) -> int:
    """How wide the stream between layers is: what its norms scale, or where these have no weights what its parts share.

    These are the layer's own norms: an attention's may be those of its heads.
    """
    weights = [(n, getattr(m, "weight", None)) for n, m in layer.named_modules() if not n.startswith(f"{attention}.")]
    norms = {len(w) for _, w in weights if isinstance(w, Tensor) and w.ndim == 1}
    if len(norms) == 1:
        return norms.pop()
    shared = [_sizes(m) for m in layer.get_submodule(attention).modules() if _shape(m) is not None]
    return next((i for i, _ in shared if any(o == i for _, o in shared)), 0)


def cache_name(decoder: nn.Module) -> str:
    """What a decoder calls the keys and values of what it has read: transformers renames it within its version 5."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@contextmanager
def inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what goes into modules while the block runs: the last call's first argument, by name."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[name] = arguments[0]

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(look(n)) for n in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def streams_of(blocks: Blocks, depths: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect what flows between layers in the last call while the block runs, by depth.

    Args:
        blocks: Of the model that is called.
        depths: 0 is what goes into the first layer, `n` what comes out of the n-th.
    """
    seen: dict[int, Tensor] = {}

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[0] = arguments[0]

    def after(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            seen[depth] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        blocks.module(blocks[d - 1].name).register_forward_hook(after(d))
        if d
        else blocks.module(blocks[0].name).register_forward_pre_hook(before)
        for d in dict.fromkeys(depths)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put `change(output)` in the place of what a module gives while the block runs."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
