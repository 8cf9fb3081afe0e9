"""The verb `remember`: facts are put beside a model."""

from collections.abc import Iterator

import torch

from lfm.errors import HyperparameterError, LfmError
from lfm.hooks import Blocks
from lfm.memory.base import OtherMemory, Remember, State
from operators.artifact import Dataset, Memory, Model
from operators.base import operator
from operators.data.facts import FactRow, carry, holds_facts, read_facts, tokenized
from operators.data.rows import columns_of
from operators.engines.native import Native
from operators.measures.edit_scores import Asked, heard
from operators.models.language_models import config_of, load, load_tokenizer
from operators.models.memory_files import name_of, read, unfit, write
from operators.workspace import Workspace


def _foreseen(
    *, model: Model | None, facts: Dataset | None, memory: Memory | None, method: Remember, **_: object
) -> Iterator[str]:
    try:
        name_of(method)
    except LfmError as problem:
        yield str(problem)
    if model is not None:
        layers = config_of(model.path).get("num_hidden_layers")
        try:
            if isinstance(layers, int):
                method.check(layers)
        except HyperparameterError as problem:
            yield str(problem)
    try:
        if facts is not None and not holds_facts(known := columns_of(facts.uri)):
            found = ", ".join(map(repr, known))
            yield f"facts: {facts.uri} has the columns {found}, expected 'subject', 'prompt' and 'target'. Rename them."
        if memory is not None:
            yield from map(str, unfit(memory, model))
    except LfmError as problem:
        yield str(problem)


@operator(problems=_foreseen)
def remember(
    work: Workspace, *, model: Model, facts: Dataset, memory: Memory | None = None, method: Remember, seed: int = 0
) -> Memory:
    """Keep facts beside a model, whose weights stay as they are, for when it answers.

    Args:
        work: The step's workspace.
        model: Who shall say them.
        facts: Rows with a subject, a prompt and a target; they are learnt one after the other.
        memory: An earlier memory of this model, to which they are added.
        method: How they are kept.
        seed: Of the draws.

    Raises:
        OtherMemory: `memory` belongs to another model, or was made by another method.
        DatasetError: The facts cannot be read, or a token reaches over the edge of a prompt and its answer.
        HyperparameterError: The method names a layer that the model does not have.
        UnknownName: Nobody could read what the method remembers.
    """
    name_of(method)
    rows = read_facts(facts)
    whole = load(model.path, torch.float32).to(work.resources.device)
    engine = Native(whole, load_tokenizer(model.path))
    blocks = Blocks(whole)
    state = None if memory is None else _earlier(memory, model, method)
    for done, row in enumerate(rows, 1):
        state = method.remember(state, whole, blocks, [tokenized(row, engine.tokenizer)], seed=seed)
        work.progress(done, len(rows), said=_said(engine, method, blocks, state, [row]))
    assert state is not None, "there are facts"
    folder = work.scratch / "memory"
    folder.mkdir()
    write(folder, method, state, model.digest)
    carry([] if memory is None else [memory.path], folder, rows)
    # Of these facts, as those before them may have been lost to them: which of all are said, `evaluate` finds.
    said = _said(engine, method, blocks, state, rows)
    return work.save(Memory, folder, {"model": model.digest, "facts": len(rows), "said": said})


def _earlier(memory: Memory, model: Model, method: Remember) -> State:
    for problem in unfit(memory, model):
        raise problem
    made_by, state = read(memory)
    if type(made_by) is not type(method):
        what, allowed = f"it was made by {type(made_by).__name__}", f"one made by {type(method).__name__}"
        raise OtherMemory(f"memory {memory.uri!r}", what, allowed, "Use the same method, or begin a new memory.")
    return state


def _said(engine: Native, method: Remember, blocks: Blocks, state: State, rows: list[FactRow]) -> float:
    """The share of facts of which every token is the likeliest one, shown those before it."""
    asked = [tokenized(row, engine.tokenizer) for row in rows]
    with method.attach(engine.model, blocks, state):
        found = heard(engine, [Asked(f.prompts[0].ids.tolist(), f.target.tolist()) for f in asked], batch_size=32)
    return sum(h.right == 1 for h in found) / len(found)
