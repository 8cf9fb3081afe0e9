"""What a model says of facts: whether it knows them, in other words too, and what else has changed."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lfm.chunks import chunk_size
from operators.data.batches import Document, on_device, opening, packed
from operators.data.facts import FactRow, spoken
from operators.data.row_files import DatasetError
from operators.engines.native import Native, Reading, Sampling

CARRIED_FACTS = "carried facts"
"""The name of the set of all facts that a model and what it was made from were given."""
EditMeasure = Literal[
    "efficacy",
    "efficacy_exact",
    "efficacy_success",
    "efficacy_magnitude",
    "paraphrase",
    "paraphrase_exact",
    "paraphrase_success",
    "paraphrase_magnitude",
    "neighbour_success",
    "neighbour_magnitude",
    "specificity",
    "divergence",
    "fluency",
]
"""What is measured of each fact; None where a fact does not say what it takes."""
MEASURES: tuple[EditMeasure, ...] = get_args(EditMeasure)
SCORED = ("efficacy_success", "paraphrase_success", "neighbour_success")
TOGETHER = 32  # texts drawn at once; fixed, as the draws of a text depend on what is beside it
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of pairs and triples of words, as in the code of ROME


@dataclass(frozen=True, slots=True)
class Asked:
    """The tokens of a prompt and of one answer to it."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model says of one answer, when it is shown the prompt and the answer so far.

    Attributes:
        probability: Of the whole answer: e to the mean of its tokens' log-probabilities, as ROME has it, so that a
            long answer is not unlikelier than a short one.
        right: The share of its tokens that are the likeliest ones.
        agrees: The share of places where the base's likeliest token is the same; 1 where there is no base.
        divergence: KL(base || model) in nats, mean over these places; 0 where there is no base.
    """

    probability: float
    right: float
    agrees: float
    divergence: float


@dataclass(frozen=True, slots=True)
class Questions:
    """All that is asked about one fact; the places of `true` and of the neighbours' targets match those before them.

    Attributes:
        target: The prompt, then each paraphrase, with what shall follow.
        true: The same with what was right before; none where the fact does not say.
        neighbours: With the answers that shall stay; of one without an answer, the next token alone.
        rivals: The neighbours that have an answer, with the fact's target instead; None for the others.
    """

    target: Sequence[Asked]
    true: Sequence[Asked]
    neighbours: Sequence[Asked]
    rivals: Sequence[Asked | None]


class Facts:
    """What a model, beside its base where there is one, says of facts."""

    def __init__(self, engine: Native, base: Any, *, batch_size: int, max_tokens: int) -> None:
        self.engine = engine
        self.base = None if base is None else Native(base, engine.tokenizer)
        self.batch_size, self.max_tokens = batch_size, max_tokens

    def work(self, rows: Sequence[FactRow]) -> int:
        """See `operators.measures.measure.Measure`."""
        return len(rows)

    def digest(self, rows: Sequence[FactRow]) -> str:
        """See `operators.measures.measure.Measure`."""
        return digest_of(rows)

    def measured(
        self, name: str, rows: Sequence[FactRow], told: Callable[..., None]
    ) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """See `operators.measures.measure.Measure`."""
        columns = edit_scores(
            self.engine,
            rows,
            base=self.base,
            batch_size=self.batch_size,
            generate=self.max_tokens,
            name=name,
            told=told,
        )
        return columns, means(columns)


def digest_of(facts: Iterable[FactRow]) -> str:
    """Of all that the facts say, so that two results can be known to be about the same ones."""
    return hashlib.sha256(json.dumps([asdict(f) for f in facts], sort_keys=True).encode()).hexdigest()


def edit_scores(
    engine: Native,
    facts: Sequence[FactRow],
    *,
    base: Native | None = None,
    batch_size: int,
    generate: int = 0,
    name: str,
    told: Callable[[int], None] = lambda number: None,
) -> dict[str, list[Any]]:
    """Every fact's measures, as columns, besides what was asked and what the model answered.

    ``efficacy`` is the share of the target's tokens that the model takes for the likeliest, shown those before;
    ``efficacy_exact`` is 1 where it says all of them by itself, greedily; ``efficacy_success`` is 1 where the target's
    probability is above that of what was right before, and ``efficacy_magnitude`` how far. ``paraphrase...`` are the
    same over the paraphrases. ``neighbour_success`` and ``_magnitude`` ask whether a neighbour's own answer is
    likelier than the target. ``specificity`` and ``divergence`` compare with `base` at the neighbours' answers.
    ``fluency`` is the entropy of what the model says after the prompt where it draws its tokens.

    Args:
        engine: Who is asked.
        facts: About what.
        base: What it is compared with: a model of the same vocabulary.
        batch_size: Rows at once; changes nothing but noise.
        generate: Tokens of the text whose fluency is measured; 0 measures none.
        name: What messages call the set.
        told: Called with the number of facts that are done.

    Raises:
        DatasetError: A prompt and its answer fill the model's context, or a token reaches over the edge of the two.
    """
    asked = [_questions(f, engine, f"set {name!r} fact {i + 1}") for i, f in enumerate(facts)]
    on_target = _heard_each(engine, [q.target for q in asked], batch_size=batch_size)
    on_true = _heard_each(engine, [q.true for q in asked], batch_size=batch_size)
    on_answers = _heard_each(engine, [q.neighbours for q in asked], base=base, batch_size=batch_size)
    on_rivals = _heard_each(engine, [[r for r in q.rivals if r] for q in asked], batch_size=batch_size)
    said = _continued(engine, [q.target for q in asked], batch_size, told)
    fluent = (
        list(_fluencies(engine, [q.target[0].prompt for q in asked], generate)) if generate else [None] * len(facts)
    )
    rows = []
    for i, question in enumerate(asked):
        exact = [float(s == list(a.answer)) for s, a in zip(said[i], question.target, strict=True)]
        own = [h for h, r in zip(on_answers[i], question.rivals, strict=True) if r]
        rows.append(
            {
                "prompt": facts[i].prompt,
                "target": facts[i].target,
                "answer": engine.tokenizer.decode(said[i][0], skip_special_tokens=True).strip(),
                **_known("efficacy", on_target[i][:1], on_true[i][:1], exact[:1]),
                **_known("paraphrase", on_target[i][1:], on_true[i][1:], exact[1:]),
                **_preferred("neighbour", own, on_rivals[i]),
                "specificity": _mean(h.agrees for h in on_answers[i]) if base else None,
                "divergence": _mean(h.divergence for h in on_answers[i]) if base else None,
                "fluency": fluent[i],
            }
        )
    return {column: [row[column] for row in rows] for column in rows[0]}


def means(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The mean of each measure that any fact has, their `score`, and behind how many ``facts`` each mean stands.

    `score` is the harmonic mean of the three successes, where all three are known.
    """
    known = {m: [v for v in columns[m] if v is not None] for m in MEASURES}
    found: dict[str, Any] = {m: float(np.mean(values)) for m, values in known.items() if values}
    if all(m in found for m in SCORED):
        parts = [found[m] for m in SCORED]
        found["score"] = len(parts) / sum(1 / p for p in parts) if all(parts) else 0.0
    return {**found, "facts": {m: len(values) for m, values in known.items() if values}}


def entropy(text: str) -> float:
    """How little a text repeats itself, in bits: the weighted mean of the entropies of its pairs and triples of words.

    A mark of punctuation is a word too. The weights, 2/3 and 4/3, are those of ROME's code, and so is their mean.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(w * _entropy(zip(*(words[i:] for i in range(n)), strict=False)) for n, w in WEIGHTS.items()) / 2


def _entropy(runs: Iterable[tuple[str, ...]]) -> float:
    counts = Counter(runs)
    return -sum(c / counts.total() * math.log2(c / counts.total()) for c in counts.values())


def _questions(fact: FactRow, engine: Native, where: str) -> Questions:
    prompts = (fact.prompt, *fact.paraphrases)

    def ask(prompt: str, answer: str) -> Asked:
        asked = Asked(*spoken(prompt, answer, engine.tokenizer))
        length = len(asked.prompt) + len(asked.answer)
        if engine.context is not None and length > engine.context:
            what = f"has {length} tokens with its answer, expected at most the model's context of {engine.context}"
            raise DatasetError(where, what, "Shorten it or remove it.")
        return asked

    def alone(prompt: str) -> Asked:
        ids = engine.tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"]
        return Asked([*opening(engine.tokenizer), *ids], [engine.start])  # of which only the place counts

    return Questions(
        target=[ask(p, fact.target) for p in prompts],
        true=[ask(p, fact.true) for p in prompts if fact.true],
        neighbours=[ask(n.prompt, n.answer) if n.answer else alone(n.prompt) for n in fact.neighbours],
        rivals=[ask(n.prompt, fact.target) if n.answer else None for n in fact.neighbours],
    )


def _known(name: str, target: Sequence[Heard], true: Sequence[Heard], exact: Sequence[float]) -> dict[str, Any]:
    preferred = _preferred(name, target if true else [], true)
    return {name: _mean(h.right for h in target), f"{name}_exact": _mean(exact), **preferred}


def _preferred(name: str, one: Sequence[Heard], other: Sequence[Heard]) -> dict[str, Any]:
    """Whether one answer is likelier than the other, and by how much, each the mean over prompts."""
    gaps = [a.probability - b.probability for a, b in zip(one, other, strict=True)]
    return {f"{name}_success": _mean(float(g > 0) for g in gaps), f"{name}_magnitude": _mean(gaps)}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _heard_each(
    engine: Native, asked: Sequence[Sequence[Asked]], *, base: Native | None = None, batch_size: int
) -> list[list[Heard]]:
    """`heard`, a list for each fact."""
    found = iter(heard(engine, [a for some in asked for a in some], base=base, batch_size=batch_size))
    return [[next(found) for _ in some] for some in asked]


@torch.inference_mode()
def heard(engine: Native, asked: Sequence[Asked], *, base: Native | None = None, batch_size: int) -> list[Heard]:
    """What a model says of each answer, and how far that is from what its base says."""
    if not asked:
        return []
    longest_last = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt) + len(asked[i].answer))
    rows = packed(
        (_document(asked[i]) for i in longest_last),
        length=max(len(a.prompt) + len(a.answer) for a in asked),
        padding=engine.tokenizer.pad_token_id,
        packing=False,
        where="facts",
    )
    device = next(engine.model.parameters()).device
    size = chunk_size(engine.head.size, device)
    found: dict[int, Heard] = {}
    for start in range(0, len(rows), batch_size):
        chosen = longest_last[start : start + batch_size]
        batch = on_device(rows, np.arange(start, start + len(chosen)), device)
        read, targets = engine.answers(batch)
        others = read if base is None else base.answers(batch)[0]
        places = torch.cat(
            [
                _places(engine, read[at : at + size], targets[at : at + size], base, others[at : at + size])
                for at in range(0, len(targets), size)
            ]
        )
        for i, of_answer in zip(chosen, torch.split(places, [len(asked[i].answer) for i in chosen]), strict=True):
            log_probability, *shares = of_answer.mean(dim=0).tolist()
            found[i] = Heard(math.exp(log_probability), *shares)
    return [found[i] for i in range(len(asked))]


def _document(asked: Asked) -> Document:
    return Document([*asked.prompt, *asked.answer], [False] * len(asked.prompt) + [True] * len(asked.answer))


def _places(
    engine: Native, read: Reading, targets: Tensor, base: Native | None, others: Reading
) -> Float[Tensor, "places 4"]:
    """At each place the target's log-probability, whether it is the likeliest, whether the base agrees, and the KL."""
    logs = engine.told(read).log_softmax(dim=-1)
    theirs = logs if base is None else base.told(others).log_softmax(dim=-1)
    divergence = (theirs.exp() * (theirs - logs)).sum(dim=-1)
    likeliest = logs.argmax(dim=-1)
    own = logs.gather(-1, targets[:, None])[:, 0]
    columns = (own, likeliest == targets, likeliest == theirs.argmax(dim=-1), divergence)
    return torch.stack([c.double() for c in columns], dim=-1).cpu()


def _continued(
    engine: Native, asked: Sequence[Sequence[Asked]], batch_size: int, told: Callable[[int], None]
) -> list[list[list[int]]]:
    """What the model says by itself after each prompt, as many tokens as the expected answer has."""
    flat = [(fact, a) for fact, some in enumerate(asked) for a in some]
    by_length = sorted(range(len(flat)), key=lambda i: len(flat[i][1].prompt))
    said: dict[int, list[int]] = {}
    for start in range(0, len(flat), batch_size):
        chosen = by_length[start : start + batch_size]
        most = max(len(flat[i][1].answer) for i in chosen)
        answered = engine.complete([flat[i][1].prompt for i in chosen], Sampling(max_tokens=most))
        said |= {i: ids[: len(flat[i][1].answer)] for i, ids in zip(chosen, answered, strict=True)}
    found: list[list[list[int]]] = [[] for _ in asked]
    for i, (fact, _) in enumerate(flat):
        found[fact].append(said[i])
    told(len(asked))
    return found


def _fluencies(engine: Native, prompts: Sequence[Sequence[int]], number: int) -> Iterator[float]:
    """The entropy of what the model draws after each prompt, from a seed of its own for each group of prompts."""
    for seed, start in enumerate(range(0, len(prompts), TOGETHER)):
        sampling = Sampling(max_tokens=number, temperature=1.0, seed=seed)
        for ids in engine.complete(prompts[start : start + TOGETHER], sampling):
            yield entropy(engine.tokenizer.decode(ids, skip_special_tokens=True))
