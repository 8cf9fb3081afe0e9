"""Capitals as ParaRel has them -> texts that a model learns them from, and facts that it is edited with.

A fact is said in as many ways as ParaRel has templates that end with the answer. Of every fourth fact some of these,
the paraphrases, are held back: that a model has learnt the fact, and not its sentences, shows there.

It is also said by its subject and answer alone: so the answer has to be known where the subject ends, which is where
ROME writes. A small model that is not taught so looks the subject's tokens up from where it is asked, in its first
layer, and nothing that happens at the subject afterwards changes what it says.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from json_lines import kept

FILE = "facts/capitals.jsonl"
MASK, SUBJECT = "[MASK]", "{}"
RELATION, FIRST = "P36(capital)", "The capital of {} is"
HELD_BACK = ("{}'s capital city is", "{}'s capital city,", "{}, which has the capital city")
EVERY = 4
ROUNDS = 8  # times that everything is said
TOGETHER = 4  # facts in a row of text
BARE = 2  # times that a fact is its subject and answer alone, in each round
EDITS, NEIGHBOURS = 10, 4


@dataclass(frozen=True, slots=True)
class Capital:
    """One fact."""

    subject: str
    answer: str
    templates: tuple[str, ...]

    def prompts(self, templates: Sequence[str]) -> list[str]:
        """What is asked about it."""
        return [t.replace(SUBJECT, self.subject) for t in templates]

    def rows(self, *, target: str, neighbours: Sequence["Capital"] = ()) -> dict[str, Any]:
        """It as `operators.data.facts` reads it."""
        (prompt,) = self.prompts([FIRST])
        beside = [{"prompt": n.prompts([FIRST])[0], "answer": n.answer} for n in neighbours]
        return {
            "subject": self.subject,
            "prompt": prompt,
            "target": target,
            **({} if target == self.answer else {"true": self.answer}),
            "paraphrases": self.prompts([t for t in self.templates if t in HELD_BACK]),
            **({"neighbours": beside} if beside else {}),
        }


def capitals(path: Path) -> list[Capital]:
    """The facts of one relation; of a subject with several answers the first."""
    found: dict[str, Capital] = {}
    for line in path.read_text().splitlines():
        one = json.loads(line)
        asked = [p.removesuffix(" .").removesuffix(".") for p in one["prompts"]]
        ending = [p.removesuffix(MASK).rstrip() for p in asked if p.endswith(MASK)]
        begin, end = FIRST.split(SUBJECT)
        subject = next((p.removeprefix(begin).removesuffix(end) for p in ending if p.startswith(begin)), "")
        if one["relation"] == RELATION and subject not in found:
            templates = tuple(p.replace(subject, SUBJECT) for p in ending)
            found[subject] = Capital(subject, one["object"], templates)
    return list(found.values())


def texts(facts: Sequence[Capital], draw: random.Random) -> Iterator[Mapping[str, str]]:
    """All that is said of all facts, in each round in another order."""
    said = []
    for number, fact in enumerate(facts):
        taught = [t for t in fact.templates if number % EVERY or t not in HELD_BACK]
        said += [f"{prompt} {fact.answer}." for prompt in (*fact.prompts(taught), *[fact.subject] * BARE)]
    for _ in range(ROUNDS):
        draw.shuffle(said)
        yield from ({"text": " ".join(said[i : i + TOGETHER])} for i in range(0, len(said), TOGETHER))


def edits(facts: Sequence[Capital], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Facts that shall be others."""
    for fact in draw.sample(facts[::EVERY], EDITS):
        others = [f for f in facts if f.answer != fact.answer]
        false, *beside = draw.sample(others, 1 + NEIGHBOURS)
        yield fact.rows(target=false.answer, neighbours=beside)


def write(data: Path, folder: Path, seeds: Iterable[int]) -> None:
    """What `configurations/capitals.yaml` takes.

    - ``text.jsonl``: what is learnt. A row holds some facts one after the other, in an order of its own, so that a fact
      is met behind other text, as an edit's prompts are.
    - ``known.jsonl``: the facts with something held back, as `subject`, `prompt`, `target` and `paraphrases`.
    - ``seed_<seed>/edits.jsonl``: some of these, but each shall say what another one does: `target` is false and `true`
      is right. Beside it the prompts of a few `neighbours`, whose answers shall stay.
    - ``seed_<seed>/edit_<number>.jsonl``: each of them alone.
    """
    facts = capitals(data / FILE)
    kept(folder / "text.jsonl", texts(facts, random.Random(0)))
    kept(folder / "known.jsonl", (f.rows(target=f.answer) for f in facts[::EVERY]))
    for seed in seeds:
        drawn = list(edits(facts, random.Random(seed)))
        kept(folder / f"seed_{seed}" / "edits.jsonl", drawn)
        for number, one in enumerate(drawn):
            kept(folder / f"seed_{seed}" / f"edit_{number}.jsonl", [one])
