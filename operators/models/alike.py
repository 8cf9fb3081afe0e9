"""Whether the tensors of two models mean the same: what lies beside them and their headers tell."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from lfm.errors import ShapeError
from lfm.weights import Weights
from operators.models import classifiers, networks
from operators.models.description import described
from operators.models.language_models import config_of

# What a config says of how parameters are used: with other values the same shapes mean something else.
USES = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
DESCRIBES = (networks.KEY, "shape")  # the same in the description of a network


def used_otherwise(folder: Path, other: Path) -> tuple[str, str] | None:
    """What a model says otherwise of how its tensors are used than another: what it is, and what that one's is."""
    for found, read, fields in (("config", config_of, USES), ("lfm.json", described, DESCRIBES)):
        theirs, ours = read(folder), read(other)
        for field in fields:
            if field in theirs and field in ours and theirs[field] != ours[field]:
                return f"{field}={theirs[field]!r} in its {found}", repr(ours[field])
    return None


def other_labels(folder: Path, other: Path) -> tuple[str, str] | None:
    """The first label that a model has otherwise than another, as `used_otherwise` says it."""
    theirs, ours = _labels(folder), _labels(other)
    if not theirs or not ours:  # another kind of model, which has other parameters
        return None
    number = next((i for i, pair in enumerate(zip_longest(theirs, ours)) if pair[0] != pair[1]), None)
    if number is None:
        return None
    got, wanted = (repr(labels[number]) if number < len(labels) else "none" for labels in (theirs, ours))
    return f"label {number} is {got} in its config", wanted


def other_tensors(where: str, folder: Path, of: str, other: Path, fix: str) -> Iterator[str]:
    """What keeps two models from having every tensor in common, a clause each; reads headers only.

    Args:
        where: What messages call the first one.
        folder: Its folder.
        of: What messages call the second one.
        other: Its folder.
        fix: What to do about it.

    Raises:
        WeightsError: The weights of one are not what safetensors are.
    """
    for what in (used_otherwise(folder, other), other_labels(folder, other)):
        if what is not None:
            yield f"{where}: {what[0]}, expected {what[1]} as in {of}. {fix}"
            return
    theirs, ours = Weights(folder).headers, Weights(other).headers
    if lacking := [name for name in ours if name not in theirs]:
        yield f"{where}: no tensor {first_of(lacking)}, expected all that {of} has. {fix}"
    if beside := [name for name in theirs if name not in ours]:
        yield f"{where}: tensor {first_of(beside)}, expected only what {of} has. {fix}"
    for name in theirs:
        if name in ours and theirs[name].shape != ours[name].shape:
            yield str(ShapeError(f"{where} {name!r}", theirs[name].shape, ours[name].shape, fix))
            return


def _labels(folder: Path) -> tuple[str, ...]:
    return networks.labels_of(folder) if networks.is_network(folder) else classifiers.labels_of(folder)


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
