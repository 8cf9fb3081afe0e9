"""Labels <-> their numbers."""

from collections.abc import Iterable, Sequence

from lfm.errors import UnknownName
from operators.data.row_files import DatasetError


def distinct(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """What there is to tell apart, sorted.

    Raises:
        DatasetError: It is one label alone.
    """
    found = tuple(sorted(set(labels)))
    if len(found) < 2:
        what = f"has the label {found[0]!r} alone, expected at least two to tell apart"
        raise DatasetError(where, what, "Give rows of more labels.")
    return found


def numbered(given: Sequence[str], labels: Sequence[str], where: str) -> list[int]:
    """The numbers of labels.

    Raises:
        UnknownName: One of them is none of `labels`.
    """
    numbers = {label: i for i, label in enumerate(labels)}
    strange = next((label for label in given if label not in numbers), None)
    if strange is not None:
        raise UnknownName(f"label of the model (in {where!r})", strange, tuple(labels))
    return [numbers[label] for label in given]
