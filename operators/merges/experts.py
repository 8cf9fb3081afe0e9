"""What experts are to the base they were fine-tuned from: whether they fit it, and their value of each parameter."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lfm.errors import LfmError, ShapeError
from lfm.weights import Header, Weights, equal
from operators.artifact import Adapter, Delta, Model, kind_of
from operators.data.vocabulary import tokens
from operators.models.adapters import read_adapter
from operators.models.alike import first_of, other_labels, used_otherwise
from operators.models.language_models import config_of
from operators.models.rewrites import is_rewrites, read
from operators.models.weight_changes import Change, Values, base_of, read_delta, unchanged

HEAD = "lm_head.weight"  # the one name that a folder may leave out, where the input embedding is used for it
COUNTER = "num_batches_tracked"  # of batch normalisation, which only counts; the base's stays
SAME_BASE = "Give the model that the expert was fine-tuned from as base."

Expert = Model | Adapter | Delta
Opened = Callable[[str], AbstractContextManager[Values]]
"""An expert's value of a parameter, to be read in stretches while a block runs, given its name in the base."""
Alike = Callable[[Weights, str, Weights, str], bool]
"""Whether two stored parameters of one shape and dtype hold the same values."""


class MergeError(LfmError, ValueError):
    """Models that cannot be merged, with everything that is known to keep them from it, a clause each."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(self.clauses)


def clause(where: str, what: str, allowed: str, fix: str) -> str:
    """One reason not to merge."""
    return f"{where}: {what}, expected {allowed}. {fix}"


def called(index: int, expert: Expert) -> str:
    """What messages call an expert."""
    return f"experts[{index}] {expert.uri!r}"


def unfit_to(base: Model | None, experts: Sequence[Expert | None]) -> Generator[str, None, Weights | None]:
    """What headers tell is wrong with experts of a base, a clause each; what is None cannot be looked at yet.

    Returns:
        The base's weights, where they can be read.
    """
    source = None
    if base is not None:
        try:
            source = opened(f"base {base.uri!r}", base)
        except LfmError as problem:
            yield str(problem)
    for i, expert in enumerate(experts):
        if expert is not None:
            yield from unfit(called(i, expert), expert, base, source)
    return source


def unfit(where: str, expert: Expert, base: Model | None, source: Weights | None) -> Iterator[str]:
    """What headers tell against an expert, a clause each.

    Args:
        where: What messages call it.
        expert: One of this machine.
        base: What it is merged with, or None where that is not here yet.
        source: The base's weights, or None where they are not here or cannot be read.
    """
    try:
        if not isinstance(expert, Model):
            yield from _unfit_changes(where, expert, base, source)
            return
        weights = opened(where, expert)
        if base is not None and source is not None:
            yield from _differences(where, weights, source, expert, base, alike=lambda *_: True)
    except LfmError as problem:
        yield str(problem)


def opened(where: str, model: Model) -> Weights:
    """A model's weights; reads headers only.

    Raises:
        MergeError: They are quantized: what is stored is no weight then.
        WeightsError: They are not what safetensors are.
    """
    if config_of(model.path).get("quantization_config"):
        fix = "Merge the models it was quantized from."
        raise MergeError((clause(where, "quantized weights", "plain ones", fix),))
    return Weights(model.path)


def reader(where: str, expert: Expert, base: Model, source: Weights) -> Opened:
    """How to read an expert that headers tell nothing against.

    Raises:
        MergeError: Its values do.
    """
    if not isinstance(expert, Model):
        return _changed(where, expert, base, source)
    weights = opened(where, expert)
    problems = tuple(_differences(where, weights, source, expert, base, alike=equal))
    if problems:
        raise MergeError(problems)
    names = {n: n if n in weights.headers else _twin(n, source, weights, equal) or n for n in source.headers}

    @contextmanager
    def opened_at(name: str) -> Iterator[Values]:
        with weights.opened(names[name]) as stored:
            yield lambda first, base, out: stored.values(first, out)

    return opened_at


def _differences(
    where: str, weights: Weights, source: Weights, expert: Model, base: Model, *, alike: Alike
) -> Iterator[str]:
    """What a whole model has otherwise than its base, as far as `alike` can tell."""
    if otherwise := used_otherwise(expert.path, base.path):
        yield clause(where, otherwise[0], f"{otherwise[1]} as in the base's", "Merge models of one architecture.")
        return
    if other := other_labels(expert.path, base.path):
        fix = "Merge classifiers of the same labels in the same order."
        yield clause(where, other[0], f"{other[1]} as in the base's", fix)
    headers = {name: twin for name in source.headers if (twin := _header(name, weights, source, alike)) is not None}
    lacking = [n for n in source.headers if n not in headers]
    if lacking:
        yield clause(where, f"no parameter {first_of(lacking)}", "all that the base has", SAME_BASE)
    beside = [n for n in weights.headers if n not in source.headers and _twin(n, weights, source, alike) is None]
    if beside:
        yield clause(where, f"parameter {first_of(beside)} beside the base's", "only what the base has", SAME_BASE)
    shapes = [n for n, h in headers.items() if h.shape != source.headers[n].shape]
    if shapes:
        fix = "Align the vocabularies, or merge models of one architecture."
        yield _shape(where, first_of(shapes), headers[shapes[0]].shape, source.headers[shapes[0]].shape, fix)
    fitting = [n for n in headers if n not in shapes]
    floats = [n for n in fitting if source.headers[n].dtype.is_floating_point]
    for name in fitting:
        got, wanted = headers[name].dtype, source.headers[name].dtype
        if got != wanted and not (got.is_floating_point and wanted.is_floating_point):
            yield clause(where, f"{name!r} stored as {got}", f"{wanted} as in the base", SAME_BASE)
            return
        if name not in floats and not name.endswith(COUNTER) and not alike(source, name, weights, name):
            fix = "Integers cannot be merged; make them equal."
            yield clause(where, f"{name!r} differs from the base's", "the same integers", fix)
    if len(fitting) == len(source.headers):
        yield from _other_tokens(where, expert.path, base.path)


def _header(name: str, weights: Weights, source: Weights, alike: Alike) -> Header | None:
    """What an expert has for a parameter of the base."""
    return weights.headers.get(name if name in weights.headers else _twin(name, source, weights, alike) or name)


def _other_tokens(where: str, expert: Path, base: Path) -> Iterator[str]:
    theirs = tokens(expert, added=False)
    ours = None if theirs is None else tokens(base, added=False)
    if theirs is None or ours is None:
        return
    number = next((n for n in sorted(theirs.keys() & ours.keys()) if theirs[n] != ours[n]), None)
    if number is not None:
        what = f"token {number} is {theirs[number]!r} in its tokenizer"
        yield clause(where, what, f"{ours[number]!r} as in the base's", "Merge models of one vocabulary.")


def _unfit_changes(where: str, expert: Adapter | Delta, base: Model | None, source: Weights | None) -> Iterator[str]:
    if isinstance(expert, Adapter) and is_rewrites(expert.path):
        names = " and ".join(type(m).__name__ for m in read(expert.path).methods)
        fix = "Tune the experts with lora or full."
        yield clause(where, f"modules that {names} puts in", "changes of the base's weights, as of a LoRA", fix)
        return
    made_for = expert.about.get("base") or (base_of(expert.path) if isinstance(expert, Delta) else "")
    if made_for and base is not None and base.digest and made_for != base.digest:
        word = "an adapter" if isinstance(expert, Adapter) else "a delta"
        fix = f"{word.capitalize()} is merged into the model that it was made for."
        yield clause(where, f"{word} of {made_for!r}", f"one of the base {base.digest!r}", fix)
        return
    changes = _changes(expert)
    if source is None:
        return
    known = {n for n, h in source.headers.items() if h.dtype.is_floating_point}
    strange = [n for n in changes if n not in known]
    if strange:
        fix = f"Take it out of the {kind_of(type(expert))}, or merge with the base that has it."
        yield clause(where, f"a change of {first_of(strange)}", "changes of what the base has", fix)
    shapes = [n for n, c in changes.items() if n in known and c.shape != source.headers[n].shape]
    if shapes:
        yield _shape(where, first_of(shapes), changes[shapes[0]].shape, source.headers[shapes[0]].shape, SAME_BASE)


def _changes(expert: Adapter | Delta) -> Mapping[str, Change]:
    return read_adapter(expert.path) if isinstance(expert, Adapter) else read_delta(expert.path)


def _changed(where: str, expert: Adapter | Delta, base: Model, source: Weights) -> Opened:
    changes = _changes(expert)
    tied = _tied(base, source)
    for name in tied.keys() & changes.keys():
        fix = "Give a base whose config says tie_word_embeddings: false."
        allowed = f"none, as it is {tied[name]!r} in the base"
        raise MergeError((clause(where, f"a change of {name!r}", allowed, fix),))

    @contextmanager
    def opened_at(name: str) -> Iterator[Values]:
        change = changes.get(tied.get(name, name))
        if change is None:
            yield unchanged
        else:
            with change.opened() as values:
                yield values

    return opened_at


def _shape(where: str, names: str, got: tuple[int, ...], wanted: tuple[int, ...], fix: str) -> str:
    return str(ShapeError(f"{where} {names}", got, wanted, fix))


def _tied(base: Model, source: Weights) -> dict[str, str]:
    """The output head, where the base stores it although it is the input embedding, with that embedding's name."""
    if not config_of(base.path).get("tie_word_embeddings", True):
        return {}
    twins = {name: _twin(name, source, source, equal) for name in source.headers}
    return {name: twin for name, twin in twins.items() if twin is not None}


def _twin(name: str, there: Weights, here: Weights, alike: Alike) -> str | None:
    """What stands in for an output head: a parameter equal to it in `there`, which `here` has as well."""
    if not name.endswith(HEAD):
        return None
    for other, header in there.headers.items():
        if (
            other != name
            and other in here.headers
            and header == there.headers[name]
            and alike(there, name, there, other)
        ):
            return other
    return None
