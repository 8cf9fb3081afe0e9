"""Capitals as ParaRel has them -> texts that a model learns them from, and facts that it is edited with.

    python benchmarks/capitals.py facts/capitals.jsonl folder

A fact is said in as many ways as ParaRel has templates that end with the answer. Of every fourth fact some of these,
the paraphrases, are held back: that a model has learnt the fact, and not its sentences, shows there. It writes

- ``text.jsonl``: what is learnt. A row holds some facts one after the other, in an order of its own, so that a fact is
  met behind other text, as an edit's prompts are.
- ``known.jsonl``: the facts with something held back, as `subject`, `prompt`, `target` and `paraphrases`.
- ``edits.jsonl``: the same, but each shall say what another one does: `target` is false and `true` is right. Beside it
  the prompts of a few `neighbours`, whose answers shall stay.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MASK, SUBJECT = "[MASK]", "{}"
RELATION, FIRST = "P36(capital)", "The capital of {} is"
HELD_BACK = ("{}'s capital city is", "{}'s capital city,", "{}, which has the capital city")
EVERY = 4


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


def texts(facts: Sequence[Capital], *, rounds: int, together: int, draw: random.Random) -> Iterator[Mapping[str, str]]:
    """All that is said of all facts, as often as there are rounds."""
    said = []
    for number, fact in enumerate(facts):
        taught = [t for t in fact.templates if number % EVERY or t not in HELD_BACK]
        said += [f"{prompt} {fact.answer}." for prompt in fact.prompts(taught)]
    for _ in range(rounds):
        draw.shuffle(said)
        yield from ({"text": " ".join(said[i : i + together])} for i in range(0, len(said), together))


def edits(facts: Sequence[Capital], *, number: int, neighbours: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Facts that shall be others."""
    for fact in draw.sample(facts[::EVERY], number):
        others = [f for f in facts if f.answer != fact.answer]
        false, *beside = draw.sample(others, 1 + neighbours)
        yield fact.rows(target=false.answer, neighbours=beside)


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capitals", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=8, help="times that everything is in text.jsonl")
    parser.add_argument("--together", type=int, default=4, help="facts in a row of it")
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--neighbours", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    facts, draw = capitals(asked.capitals), random.Random(asked.seed)
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("text", texts(facts, rounds=asked.rounds, together=asked.together, draw=draw)),
        ("known", (f.rows(target=f.answer) for f in facts[::EVERY])),
        ("edits", edits(facts, number=asked.edits, neighbours=asked.neighbours, draw=draw)),
    ):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (asked.folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}: {len(lines)} rows")


if __name__ == "__main__":
    main()
