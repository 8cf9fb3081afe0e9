"""The verb `edit`: a model shall say some facts; what changes in it for that is an artifact of its own."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lfm.deltas import Delta as Changes, applied, write
from lfm.editing.base import TOKENS, Edit, Fact, TrainedEdit
from lfm.errors import HyperparameterError, LfmError
from lfm.hooks import Blocks
from lfm.weights import Weights
from operators.artifact import Artifact, Dataset, Delta, Editor, Model, Statistics
from operators.base import operator
from operators.catalog import method_name
from operators.data.facts import COLUMNS, FactRow, carry, holds_facts, read_facts, tokenized
from operators.data.rows import columns_of
from operators.engines.native import Native, Sampling
from operators.models.belonging import noted, strange
from operators.models.editors import read as read_editor, unsuited
from operators.models.language_models import architecture_of, config_of, load, load_tokenizer
from operators.needs import unmet
from operators.workspace import Workspace

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")  # what configs call how many layers there are
LENGTHS = (5, 10)  # tokens of the texts before a prompt, as ROME has them: one half each
NUCLEUS = 0.9  # of what the model may write there: what is unlikely teaches nothing about ordinary text


class EditingError(LfmError, ValueError):
    """A model, facts and statistics that do not go together, a clause each."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(self.clauses)


def _foreseen(*, kinds: Mapping[str, Sequence[type[Artifact]]], **arguments: Any) -> Iterator[str]:
    arguments.pop("resources")
    yield from problems(**{"num_contexts": 20, **arguments}, given=kinds)


def problems(
    *,
    model: Model | None,
    facts: Dataset | None,
    statistics: Statistics | None,
    editor: Editor | None,
    method: Edit,
    num_contexts: int,
    given: Collection[str],
) -> Iterator[str]:
    """What headers tell is wrong, a clause each.

    Args:
        model: Who is edited; None as every artifact that cannot be looked at yet.
        facts: What it shall say.
        statistics: What was measured of it.
        editor: Who was trained to edit it.
        method: How.
        num_contexts: Texts that each prompt is put behind.
        given: The inputs that there will be.
    """
    if num_contexts < 0:
        yield str(HyperparameterError("edit", "num_contexts", num_contexts, "num_contexts >= 0"))
    if model is not None:
        yield from unfit_decoder(model.path, method)
    if facts is not None:
        yield from unfit_facts("facts", facts)
    name = type(method).__name__
    if "editor" in given and not method.taught:
        yield f"editor: one is given, expected none, as {name} uses none. Leave it out."
    if "editor" not in given and method.taught:
        yield f"editor: none is given, expected one that was trained for the model. {name} works through it; name it."
    try:
        yield from unmet(method, statistics=_measured(statistics, given), called="model")
    except LfmError as error:
        yield str(error)
        return
    yield from map(str, strange("edit", statistics, model, "Measure this model."))
    if editor is not None and isinstance(method, TrainedEdit):
        yield from unsuited("edit", editor, method, model)


def _measured(statistics: Statistics | None, given: Collection[str]) -> Collection[str] | None:
    """The kinds of statistics that there are; None where nobody knows yet."""
    if statistics is not None:
        return [str(kind) for kind in noted(statistics).get("kinds", ())]
    return None if "statistics" in given else ()


def unfit_decoder(folder: Path, method: Edit) -> Iterator[str]:
    """What a model's config tells against editing it, a clause each."""
    yield from unmet(method, architectures=[architecture_of(folder)], called="model")
    config = config_of(folder)
    layers = next((config[key] for key in LAYERS if isinstance(config.get(key), int)), None)
    if layers is not None:
        try:
            method.check(layers)
        except HyperparameterError as error:
            yield str(error)


def unfit_facts(name: str, facts: Dataset) -> Iterator[str]:
    """What headers tell against rows that shall be facts, a clause each; messages call them `name`."""
    try:
        columns = columns_of(facts.uri)
    except LfmError as error:
        yield f"{name}: {error}"
        return
    if not holds_facts(columns):
        wanted = ", ".join(map(repr, COLUMNS))
        yield f"{name}: {facts.uri} has the columns {', '.join(columns)}, expected {wanted}. Give rows that are facts."


@operator(problems=_foreseen)
def edit(
    work: Workspace,
    *,
    model: Model,
    facts: Dataset,
    statistics: Statistics | None = None,
    editor: Editor | None = None,
    method: Edit,
    num_contexts: int = 20,
) -> Delta:
    """Find the change of a model's weights that makes it say some facts.

    The result is no model: `apply` makes one of it, and it can be kept, sent and looked at by itself.

    Args:
        work: The step's workspace.
        model: Who is edited; it stays as it is.
        facts: Rows with `subject`, `prompt` and `target`.
        statistics: What was measured of the model, where the method needs that.
        editor: Who was trained to edit it, where the method works through one.
        method: How.
        num_contexts: Each prompt is also put behind so many texts that the model itself writes, one half of them of 5
            tokens and the other of 10, so that what is learnt holds wherever the prompt stands. Those that turn out
            empty are left out. A method that works through an editor takes the prompt alone, and gets none.

    Raises:
        EditingError: These do not go together.
        EditError: The method cannot do it with these facts or statistics.
        DamagedEditor: The editor does not hold what its method has for this model.
    """
    arguments: dict[str, Any] = {"model": model, "facts": facts, "statistics": statistics, "editor": editor}
    given = [name for name, artifact in arguments.items() if artifact is not None]
    wrong = tuple(problems(**arguments, method=method, num_contexts=num_contexts, given=given))
    if wrong:
        raise EditingError(wrong)
    rows = read_facts(facts)
    whole = load(model.path, torch.float32).requires_grad_(False)
    whole.to(work.resources.device)
    tokenizer = load_tokenizer(model.path)
    engine = Native(whole, tokenizer)
    contexts = written(engine, 0 if method.taught else num_contexts, work.seed)
    asked = [tokenized(row, tokenizer, contexts) for row in rows]
    _check_lengths(asked, engine.context)
    blocks, measured = Blocks(whole), Measured(statistics, method.needs.statistics)
    judged = method.judged(blocks, measured)
    for name, value in judged.items():
        print(f"{name.replace('_', ' ')}: {value:.4g}")  # the step's log
    before = surprise(whole, asked)
    network = None
    if editor is not None and isinstance(method, TrainedEdit):
        network = read_editor(editor, method, whole, blocks)
    changes = method.solve(whole, blocks, asked, statistics=measured, editor=network)
    with applied(whole, changes):
        after = surprise(whole, asked)
    work.progress(len(rows), len(rows), loss_before=before, loss_after=after)
    about = {"base": model.digest, "method": method_name(type(method)), "facts": len(rows), "contexts": len(contexts)}
    about |= {"loss_before": before, "loss_after": after, **judged}
    folder = work.scratch / "delta"
    _save(folder, changes, {**about, "fields": method.hyperparameters()}, rows)
    return work.save(Delta, folder, about)


def _save(folder: Path, changes: Changes, noting: Mapping[str, Any], rows: Sequence[FactRow]) -> None:
    folder.mkdir()
    write(changes, folder)
    (folder / "delta.json").write_text(json.dumps(noting, indent=2, sort_keys=True) + "\n")
    carry([], folder, rows)


def _check_lengths(asked: Sequence[Fact], context: int | None) -> None:
    longest = max(len(p.ids) + len(fact.target) for fact in asked for p in fact.prompts)
    if context is not None and longest > context:
        fix = "Shorten the prompts, or set num_contexts to 0."
        raise EditingError((f"facts: one has {longest} tokens, expected at most the model's {context}. {fix}",))


def written(engine: Native, number: int, seed: int) -> list[str]:
    """Texts that a model writes out of nothing, of 5 and of 10 tokens; fewer where some say nothing."""
    texts: list[str] = []
    for i, length in enumerate(LENGTHS):
        share = (number + 1 - i) // 2
        if share:
            sampling = Sampling(max_tokens=length, temperature=1.0, top_p=NUCLEUS, seed=seed + i)
            said = engine.complete([[engine.start]] * share, sampling)
            texts += [engine.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    return [text for text in texts if text]


@torch.inference_mode()
def surprise(model: Any, facts: Sequence[Fact]) -> float:
    """The mean loss of a target's token after the bare prompt, each fact weighing the same."""
    device = next(model.parameters()).device
    found = []
    for fact in facts:
        asked = fact.prompts[0].ids
        ids = torch.cat([asked, fact.target[:-1]])[None].to(device)
        said = model(input_ids=ids, use_cache=False).logits[0, len(asked) - 1 :].float()
        found.append(float(torch.nn.functional.cross_entropy(said, fact.target.to(device))))
    return sum(found) / len(found)


@dataclass(frozen=True)
class Measured(Mapping[str, Tensor]):
    """What was measured of a model, each tensor read when it is asked for: together they may be larger than memory."""

    statistics: Statistics | None
    kinds: Collection[str]

    @override
    def __getitem__(self, name: str) -> Tensor:
        if self.statistics is None:
            raise KeyError(name)
        if name == TOKENS:
            return torch.tensor(float(noted(self.statistics)[TOKENS]))
        weights = self._weights
        if name not in weights.headers:
            raise KeyError(name)
        return weights.read(name)

    @override
    def __iter__(self) -> Iterator[str]:
        if self.statistics is not None:
            yield TOKENS
            yield from (n for n in self._weights.headers if n.partition("/")[0] in self.kinds)

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def _weights(self) -> Weights:
        assert self.statistics is not None
        return Weights(self.statistics.path, "statistics")
