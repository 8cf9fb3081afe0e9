"""CLINC150's questions -> rows of text and intent by domain."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from json_lines import kept

QUESTIONS, DOMAINS = "clinc150/data_full.json", "clinc150/domains.json"
PROBE = 5  # questions of each intent


def probe(questions: Iterable[tuple[str, str]], draw: random.Random) -> Iterator[Mapping[str, str]]:
    """A few questions of each intent."""
    by_intent = defaultdict(list)
    for text, intent in questions:
        by_intent[intent].append(text)
    for intent, texts in by_intent.items():
        yield from ({"text": text, "label": intent} for text in draw.sample(texts, PROBE))


def write(data: Path, folder: Path, seeds: Iterable[int]) -> None:
    """What `configurations/fisher_ada_merging.yaml` takes.

    - ``<domain>_train.jsonl`` and ``<domain>_test.jsonl``: the questions of a domain's intents.
    - ``<domain>_unlabelled.jsonl``: those of the validation set, without their intents.
    - ``seed_<seed>/probe.jsonl``: a few training questions of each of the 150 intents.
    """
    questions = json.loads((data / QUESTIONS).read_text())
    for domain, intents in json.loads((data / DOMAINS).read_text()).items():
        for part in ("train", "test"):
            rows = ({"text": text, "label": intent} for text, intent in questions[part] if intent in intents)
            kept(folder / f"{domain}_{part}.jsonl", rows)
        bare = ({"text": text} for text, intent in questions["val"] if intent in intents)
        kept(folder / f"{domain}_unlabelled.jsonl", bare)
    for seed in seeds:
        kept(folder / f"seed_{seed}" / "probe.jsonl", probe(questions["train"], random.Random(seed)))
