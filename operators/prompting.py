"""The verb `prompt`: a soft prompt for a model that is only ever asked for probabilities."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lfm.errors import HyperparameterError
from lfm.oracle import Oracle
from lfm.prompting.base import Prompt
from operators.artifact import Adapter, Dataset, Model
from operators.base import operator
from operators.data.rows import Form
from operators.models.choices import Choices, Reader, read_choices
from operators.models.language_models import DTYPES, check, load, load_tokenizer
from operators.models.soft_prompts import write
from operators.models.texts import longest_row, unfit
from operators.needs import unmet
from operators.sharing.notices import Preempted
from operators.sharing.pace import Pace
from operators.training import Training
from operators.workspace import Workspace

STATE = "manifest.json"


def problems(
    *,
    model: Model | None,
    data: Dataset | None,
    held_out: Dataset | None,
    method: Prompt,
    batch_size: int = 32,
    seed: int = 0,
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    yield from unmet(method)
    yield from map(str, _out_of_range(batch_size, seed))
    sets = {"data": data, "held_out": held_out}
    yield from unfit(Training(length=2), None if model is None else model.path, sets, (Form.PROMPT_COMPLETION,))
    context = None if model is None else longest_row(model.path)
    if context is not None and method.length >= context:
        yield f"length={method.length}, expected fewer than the model's context of {context} tokens. Lower it."


def _out_of_range(batch_size: int, seed: int) -> Iterator[HyperparameterError]:
    if batch_size < 1:
        yield HyperparameterError("prompt", "batch_size", batch_size, "batch_size >= 1")
    if seed < 0:
        yield HyperparameterError("prompt", "seed", seed, "seed >= 0")


@operator(problems=problems)
def prompt(
    work: Workspace,
    *,
    model: Model,
    data: Dataset,
    held_out: Dataset | None = None,
    method: Prompt,
    batch_size: int = 32,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 0,
) -> Adapter:
    """Search virtual tokens to put before every text, by asking a model how likely a few words are.

    No gradient is taken, and no more prompts are tried than the method's budget: one question is one prompt before all
    rows of `data`. The result is an adapter in PEFT's form; a model reads it as PEFT does.

    Args:
        work: The step's workspace.
        model: Who is asked; it stays as it is.
        data: Examples: each completion is the word of a label, known by its first token.
        held_out: More of them, of which the accuracy is told at the end; that takes nothing of the budget.
        method: How prompts are searched.
        batch_size: Rows at once.
        precision: What the model computes in.
        seed: Decides where the search begins and all that it draws.

    Raises:
        HyperparameterError: A number is out of range.
        DatasetError: There are fewer than two labels, two begin with the same token, or a prompt leaves no room.
        Preempted: The machine is about to be taken away; what was answered is kept.
    """
    for problem in _out_of_range(batch_size, seed):
        raise problem
    whole, tokenizer = load(model.path, DTYPES[precision]), load_tokenizer(model.path)
    check(whole, packed=False)
    context = longest_row(model.path)
    room = None if context is None else context - method.length
    rows = read_choices(data, tokenizer, room=room)
    others = None if held_out is None else read_choices(held_out, tokenizer, room=room, like=rows)
    words = whole.get_input_embeddings().weight.detach().float().cpu()
    initial = words[torch.randint(len(tokenizer), (method.length,), generator=torch.Generator().manual_seed(seed))]
    device = torch.device(work.resources.device)
    reader = Reader(whole.to(device), tokenizer.pad_token_id, batch_size=batch_size)
    oracle = Oracle(lambda candidates: reader.probabilities(candidates, rows), budget=method.budget)
    state = method.start(initial, spread=float(words.std()), seed=seed)
    state, scores = _searched(work, method, state, oracle, rows)
    found = method.best(state)
    about: dict[str, object] = {"method": type(method).__name__, "base": model.digest, "labels": list(rows.words)}
    about |= {"calls": method.budget, "loss": min(scores)}
    for name, some in (("accuracy", rows), ("held_out_accuracy", others)):
        if some is not None:
            about[name] = accuracy(reader, found, some)
    folder = work.scratch / "prompt"
    write(folder, found)
    return work.save(Adapter, folder, about)


def _searched(
    work: Workspace, method: Prompt, state: Any, oracle: Oracle, rows: Choices
) -> tuple[Any, Sequence[float]]:
    """Spend the budget; what an earlier attempt was answered is told again and not asked again.

    Returns:
        The last state, and all scores in their order.
    """
    kept, pace = work.kept(), Pace()
    known: list[float] = [] if kept is None else json.loads((kept / STATE).read_text())["scores"]
    scores: list[float] = []
    while len(scores) < method.budget:
        candidates = method.ask(state)
        end = len(scores) + len(candidates)
        if end <= len(known):
            found = torch.tensor(known[len(scores) : end], dtype=torch.float64)
            oracle.spent += len(candidates)
        else:
            found = method.score(oracle(candidates), rows.labels).double()
        state = method.tell(state, found)
        scores += found.tolist()
        if end <= len(known):
            continue
        work.progress(end, method.budget, loss=float(found.min()), best=min(scores))
        leaving = work.leaving()
        if end < method.budget and (leaving or pace.due(end)):
            with pace.kept():
                _keep(work, scores)
            if leaving:
                raise Preempted(end, method.budget)
    return state, scores


def _keep(work: Workspace, scores: Sequence[float]) -> None:
    folder = work.scratch / f"asked-{len(scores)}"
    folder.mkdir()
    (folder / STATE).write_text(json.dumps({"scores": scores}))
    work.keep(folder)


@torch.no_grad()
def accuracy(reader: Reader, found: Tensor, rows: Choices) -> float:
    """The share of rows whose label is the likeliest of all labels."""
    said = reader.probabilities(found[None], rows)[0]
    return float((said.argmax(dim=-1) == rows.labels).double().mean())
