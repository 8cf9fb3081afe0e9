"""What a merging method is told of a parameter besides its weights: what was measured of each expert."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm.errors import LfmError
from lfm.merging.base import Merge
from lfm.weights import Header, Weights, parsed
from operators.artifact import Artifact, Statistics
from operators.needs import unmet

STEM = "statistics"
COEFFICIENTS = "coefficients"

Known = Callable[[str, int, tuple[int, ...]], Mapping[str, Tensor]]
"""What is known of a stretch of a parameter, given its name in the base, where it begins and its shape."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """What was learnt: for each group of parameters a number for each expert, in their order.

    Attributes:
        groups: By each parameter's name that of its group.
        values: By each group's name its numbers.
    """

    groups: Mapping[str, str]
    values: Mapping[str, Tensor]

    def __call__(self, name: str) -> Mapping[str, Tensor]:
        """What is known of a parameter, as `Merge.merge` takes it."""
        return {COEFFICIENTS: self.values[self.groups[name]]}

    def keep(self, folder: Path) -> None:
        """Write the numbers as they are into a folder from which `learnt_before` reads them."""
        save_file({COEFFICIENTS: torch.stack([*self.values.values()])}, folder / f"{COEFFICIENTS}.safetensors")

    def means(self) -> list[float]:
        """Over the groups, for each expert."""
        return [round(mean, 6) for mean in torch.stack([*self.values.values()]).mean(dim=0).tolist()]

    def write(self, folder: Path) -> None:
        """Write the numbers into a model's folder, for who wants to look at them."""
        told = {group: [round(v, 6) for v in values.tolist()] for group, values in self.values.items()}
        (folder / f"{COEFFICIENTS}.json").write_text(json.dumps(told, indent=2) + "\n")


def learnt_before(folder: Path | None) -> Tensor | None:
    """What is multiplied with the deltas, a row for each group, where a folder has it."""
    path = None if folder is None else folder / f"{COEFFICIENTS}.safetensors"
    return load_file(path)[COEFFICIENTS] if path is not None and path.is_file() else None


class Measured:
    """Statistics of all experts, read in the same stretches as the weights."""

    def __init__(self, kinds: Sequence[str], statistics: Sequence[Statistics], source: Mapping[str, Header]) -> None:
        """Read headers.

        Args:
            kinds: Those that the method needs.
            statistics: What was measured of each expert, in their order.
            source: The base's parameters.
        """
        self._kinds, self._source = kinds, source
        self._weights = [Weights(s.path, STEM) for s in statistics]

    def __call__(self, name: str, first: int, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        """By kind what was measured of a stretch in each expert, stacked; a kind that has nothing of it is left out."""
        return {kind: self._stack(key, name, first, shape) for kind, key in self._keys(name)}

    def bytes(self, name: str, size: int) -> int:
        """How many a stretch of `size` values takes."""
        headers = [self._weights[0].headers[key] for _, key in self._keys(name)]
        sizes = [size if h.shape == self._source[name].shape else h.size for h in headers]
        return 4 * len(self._weights) * sum(sizes)

    def _keys(self, name: str) -> Iterator[tuple[str, str]]:
        for kind in self._kinds:
            for key in (f"{kind}/{name}", f"{kind}/{name.removesuffix('.weight')}"):  # a parameter's, or its module's
                if all(key in w.headers for w in self._weights):
                    yield kind, key
                    break

    def _stack(self, key: str, name: str, first: int, shape: tuple[int, ...]) -> Tensor:
        header = self._weights[0].headers[key]
        if header.shape != self._source[name].shape:
            first, shape = 0, header.shape
        stack = torch.empty((len(self._weights), *shape))
        for weights, out in zip(self._weights, stack, strict=True):
            with weights.opened(key) as stored:
                stored.values(first, out)
        return stack


def unknown(
    method: Merge,
    statistics: Sequence[Statistics | None],
    experts: Sequence[Artifact | None],
    source: Mapping[str, Header] | None,
) -> Iterator[str]:
    """What headers tell against what was measured, a clause each; what is None cannot be looked at yet."""
    needed, name = method.needs.statistics, type(method).__name__
    if not statistics:
        yield from unmet(method, called="experts", statistics=())
    elif not needed:
        yield f"statistics: {len(statistics)} are given and {name} needs none. Leave them out."
    elif len(statistics) != len(experts):
        fix = "Name them in their order."
        yield f"statistics: {len(statistics)} for {len(experts)} experts, expected one of each. {fix}"
    else:
        for i, (one, expert) in enumerate(zip(statistics, experts, strict=True)):
            if one is not None:
                yield from _unfit(f"statistics[{i}] {one.uri!r}", i, one, expert, method, source)


def _unfit(
    where: str, i: int, one: Statistics, expert: Artifact | None, method: Merge, source: Mapping[str, Header] | None
) -> Iterator[str]:
    try:
        path = one.path / f"{STEM}.json"
        about = parsed(path, path.read_bytes()) if path.is_file() else {}
        headers = Weights(one.path, STEM).headers
    except LfmError as problem:
        yield str(problem)
        return
    measured = about.get("model")
    if measured and expert is not None and expert.digest and measured != expert.digest:
        fix = "Measure that one, or put them into the experts' order."
        yield f"{where}: measured of {measured!r}, expected experts[{i}], {expert.digest!r}. {fix}"
    yield from unmet(method, called="experts", statistics=_kinds(headers))
    for kind in method.needs.statistics:
        for key in (k for k in headers if source is not None and k.startswith(f"{kind}/")):
            parameter = key.removeprefix(f"{kind}/")
            of = source.get(parameter) if source is not None else None
            if of is not None and of.shape != headers[key].shape:
                fix = "Measure the model that is merged."
                yield f"{where}: {key!r} has shape {headers[key].shape}, expected {of.shape}. {fix}"
                return


def _kinds(names: Collection[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}
